"""What a run needs on its devices, known by hash: our code, contents of the model and the method, the shards.

The engine makes it present on every job's way, because a method may bring new blocks in mid-run; here it is told
beforehand what would travel, or sent beforehand.  A device that cannot be reached is an answer, and keeps nobody from
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errands import side_by_side
from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.devices import NodeSettings
    from testbed.devices._agent_node import AgentNode
    from testbed.inventory import Device
    from testbed.prepare import Prepared


@dataclass(frozen=True)
class Cargo:
    """What one device lacks, in bytes; with `error` it could not be asked or sent."""

    device: str
    code_bytes: int = 0
    model_bytes: int = 0  # configuration, blocks, what is outside of them, and files that the method reads
    shard_bytes: int = 0
    error: str | None = None

    @property
    def bytes(self) -> int:
        return self.code_bytes + self.model_bytes + self.shard_bytes


def needed(prepared: Prepared) -> dict[str, tuple[str, ...]]:
    """Device → every hash that its clients' jobs of the first round name: the model's first, then the shards.

    As if all clients were drawn; of one that cannot take part in the first stage, the configuration alone.
    """
    method, base, config = prepared.method, prepared.base, prepared.config
    planned = prepared.plan.taking_part
    clients = [plan.client() for plan in planned]
    state = method.begin(method.start(base, prepared.work, clients, config.seed, config.rounds), base, 0)
    able = [client for client in clients if method.admits(state, base, client)]
    orders = {order.client: order for order in method.order(state, base, able, 0)}
    model: dict[str, dict[str, None]] = {}
    own: dict[str, dict[str, None]] = {}
    for plan in planned:
        hashes = [base.config_hash]
        if order := orders.get(plan.index):
            blocks = [block.content for block in base.fill_in(order.submodel).blocks if block.content]
            hashes += [*([base.outside, *blocks] if order.reads_base else []), *order.contents]
        model.setdefault(plan.device, {}).update(dict.fromkeys(hashes))
        own.setdefault(plan.device, {})[prepared.shards[plan.index]] = None
    return {device: (*model[device], *own[device]) for device in model}


class Deployment:
    """The devices of a run on other machines, and what they need."""

    def __init__(
        self,
        devices: Iterable[Device],
        contents: Mapping[str, Sequence[str]],
        shards: Iterable[str],
        path: Callable[[str], Path],
        settings: NodeSettings,
    ) -> None:
        """`contents`: as from `needed`; `path(hash)`: where the controller has it."""
        self._devices = tuple(device for device in devices if device.access is not None)
        self._contents = contents
        self._shards = frozenset(shards)
        self._path = path
        self._settings = settings

    def survey(self) -> list[Cargo]:
        """What each device lacks; touches nothing."""
        return self._on_all(self._cargo)

    def send(self) -> list[Cargo]:
        """Send it; what each device has been sent."""
        return self._on_all(self._seeded)

    def _on_all(self, ask: Callable[[AgentNode], Cargo]) -> list[Cargo]:
        from testbed.devices._board import remote_node

        nodes: list[AgentNode] = []

        def asked(device: Device) -> Cargo:
            node = remote_node(device, self._settings, board=device.kind != "emulated")
            nodes.append(node)
            try:
                return ask(node)
            except TestbedError as error:
                return Cargo(device.name, error=str(error))
            finally:
                node.hang_up()

        def hang_up() -> None:
            for node in nodes:
                node.hang_up()

        return side_by_side(asked, self._devices, hang_up)

    def _cargo(self, node: AgentNode) -> Cargo:
        code, missing = node.lacks(self._contents[node.name])
        wheel = self._settings.wheel
        sizes = {content: self._path(content).stat().st_size for content in missing}
        return Cargo(
            node.name,
            code_bytes=wheel.path.stat().st_size if code and wheel is not None else 0,
            model_bytes=sum(size for content, size in sizes.items() if content not in self._shards),
            shard_bytes=sum(size for content, size in sizes.items() if content in self._shards),
        )

    def _seeded(self, node: AgentNode) -> Cargo:
        cargo = self._cargo(node)
        if cargo.bytes:
            node.seed({content: self._path(content) for content in self._contents[node.name]})
        return cargo
