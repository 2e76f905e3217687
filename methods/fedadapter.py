"""FedAdapter: adapters begin on few blocks and narrow, and trials among the clients make them deeper or wider."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from methods._adapters import AdapterMethod
from testbed.errors import UsageError, WireError
from testbed.method import Client, ModelShape, Order, Part, Received, State, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace
    from testbed.task import Batch

Configuration = tuple[int, int]
"""How many of the last blocks have an adapter, and how wide it is."""


@dataclass(frozen=True)
class FedAdapter(AdapterMethod):
    """Adapters of a present width on the last blocks; now and then clients try deeper and wider ones beside them.

    Paper: Cai et al., "Efficient Federated Learning for Modern NLP" (FedAdapter, MobiCom 2023, arXiv:2205.10162).
    Evidence: background knowledge only: depth and width of the adapters are raised in the run, and groups of clients
    try the next configurations online.

    Our reading: every `trial_every` rounds the round's clients train in turns the present configuration, a deeper and a
    wider one; a client's gain is the loss of its first local step less that of its last, divided by its cost, the
    number of blocks that have adapters; the configuration of the highest mean gain goes on, of equal ones the present.
    What was trained outside of it is dropped.  In other rounds all train the present one.  A wider adapter's new
    units begin as drawn with `up` zero, so that nothing changes.  Means are per element over those who trained it,
    weighted by examples.

    The plan must fit every device with adapters of full width on all blocks: it cannot know how far the trials go.

    bottleneck    outputs of down at the end: how wide the adapters can become
    depth         how many of the last blocks have an adapter at first
    width         outputs of down at first; a trial doubles them
    depth_step    how many blocks more a trial has
    trial_every   rounds from one trial to the next
    """

    family: ClassVar[str] = "adapters"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "adapters of the present depth and width, both ways"

    depth: int = 1
    width: int = 4
    depth_step: int = 1
    trial_every: int = 2

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 1 <= self.depth <= len(shape):
            raise UsageError(f"setting depth={self.depth}: expected 1 to {len(shape)}, the model's blocks")
        if not 1 <= self.width <= self.bottleneck:
            raise UsageError(f"setting width={self.width}: expected 1 to {self.bottleneck}, the setting bottleneck")
        for name in ("depth_step", "trial_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"setting {name}={getattr(self, name)}: expected at least 1")

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the present configuration, and how many blocks the model has."""
        scalars = {"depth": self.depth, "width": self.width, "blocks": len(base.shape)}
        return replace(super().start(base, work, clients, seed, rounds), scalars=scalars)

    def _tried(self, state: State) -> tuple[Configuration, Configuration, Configuration]:
        """The present configuration, the deeper and the wider one: the same again where there is none."""
        depth, width, blocks = (state.scalars[name] for name in ("depth", "width", "blocks"))
        deeper, wider = min(depth + self.depth_step, blocks), min(2 * width, self.bottleneck)
        return (depth, width), (deeper, width), (depth, wider)

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        tried = self._tried(state)
        turns = tried if (round_index + 1) % self.trial_every == 0 else tried[:1]
        sent = {own: _cut_all(state, own) for own in turns}
        return [
            Order(client.index, client.submodel, tensors=sent[own], scalars={"depth": own[0], "width": own[1]})
            for client, own in ((client, turns[index % len(turns)]) for index, client in enumerate(clients))
        ]

    def verify(self, state: State, update: Received) -> None:
        super().verify(state, update)
        gain = update.scalars.get("gain")
        if not isinstance(gain, (int, float)) or not math.isfinite(gain) or _of(update) not in self._tried(state):
            raise WireError(f"client {update.client}: its gain is no number, or of adapters that were not asked for")

    def _best(self, state: State, received: Sequence[Received]) -> Configuration:
        """The configuration that goes on."""
        gains: dict[Configuration, list[float]] = {own: [] for own in self._tried(state)}
        for update in received:
            gains[_of(update)].append(update.scalars["gain"])
        means = {own: sum(values) / len(values) for own, values in gains.items() if values}
        return max(means, key=lambda own: means[own])  # the first of equal ones

    def mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        """The mean within the configuration that goes on; all else stays as it was drawn."""
        own, mean = self._best(state, received), super().mean(state, received)
        blocks = state.scalars["blocks"]
        for name, before in state.tensors.items():
            if ".adapter." in name:
                whole = before.clone()
                inside, found = cut(name, whole, own, blocks), cut(name, mean[name], own, blocks)
                if inside is not None and found is not None:
                    inside.copy_(found)
                mean[name] = whole
        return mean

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        depth, width = self._best(state, received)
        scalars = {**state.scalars, "depth": depth, "width": width}
        return replace(super().combine(state, base, received), scalars=scalars)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        from testbed.model.bottleneck import fill_adapters, mount_adapters
        from testbed.node.training import local_steps, update_of

        depth, width = (workplace.job.scalars[name] for name in ("depth", "width"))
        built = workplace.build(workplace.job.submodel)
        mount_adapters(built, width, positions=built.submodel.positions[-depth:])
        fill_adapters(built, workplace.tensors)
        workplace.phase("train")
        losses: list[float] = []

        def noted(built: Built, batch: Batch) -> Tensor:
            value = built.loss(batch)
            losses.append(value.item())
            return value

        trained = local_steps(workplace, built, loss=noted)
        gain = (losses[0] - losses[-1]) / depth
        update = update_of(workplace, built.trainable(), trained, depth=depth, width=width, gain=gain)
        return replace(update, tensors={name: _piece(name, part.tensor) for name, part in update.tensors.items()})


def cut(name: str, tensor: Tensor, own: Configuration, blocks: int) -> Tensor | None:
    """The part of a tensor of the state that belongs to a configuration, as a view; None: nothing of it does."""
    block, adapter, rest = name.partition(".adapter.")
    if not adapter or rest == "up.bias":
        inside = tensor
    else:
        inside = tensor[:, : own[1]] if rest == "up.weight" else tensor[: own[1]]
    return None if adapter and int(block.rpartition(".")[2]) < blocks - own[0] else inside


def _cut_all(state: State, own: Configuration) -> dict[str, Tensor]:
    """The tensors that a client with this configuration is sent."""
    parts = {name: cut(name, tensor, own, state.scalars["blocks"]) for name, tensor in state.tensors.items()}
    return {name: part.contiguous() for name, part in parts.items() if part is not None}


def _piece(name: str, tensor: Tensor) -> Part:
    """What a client sends of a tensor: an adapter's first units."""
    return Part(tensor, tuple((0, size) for size in tensor.shape) if ".adapter." in name else None)


def _of(update: Received) -> Configuration:
    return update.scalars.get("depth", 0), update.scalars.get("width", 0)
