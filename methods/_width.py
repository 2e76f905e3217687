"""What methods that give every client a narrower model share: settings, slices, one client's training, the export."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._sgd import SgdMethod
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Order, Part, Phase, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_PHASE = "train"


@dataclass(frozen=True)
class WidthMethod(SgdMethod):
    """Every client trains all weights of a narrower model by SGD; an element is averaged over those who held it.

    ratios   p: the widths that a client may have, of the whole one; those at which a width of the model is no whole
             number are passed over
    """

    family: ClassVar[str] = "width or depth, from scratch"
    memory: ClassVar[str] = "the width that fits, trained through"
    traffic: ClassVar[str] = "these weights, both ways"

    ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)

    @abstractmethod
    def shift(self, round_index: int) -> int:
        """By how many channels (of heads: by how many heads) the clients' windows are moved on in a round."""

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        told = ",".join(f"{ratio:g}" for ratio in self.ratios)
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise UsageError(f"setting ratios={told}: expected numbers above 0, up to 1")
        if not list(self.choices(shape)):
            raise UsageError(
                f"setting ratios={told}: a {shape.architecture} model of these widths has no narrower one of any of "
                "them, because some width would be no whole number; name others (1 always fits)"
            )

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        from testbed.model.width import admits

        for ratio in sorted(set(self.ratios), reverse=True):
            if admits(shape, ratio):
                yield Submodel(Submodel.first(len(shape)).blocks, ratio)

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        from testbed.model.width import narrow_config

        return (
            Phase(
                _PHASE,
                submodel.blocks,
                work.batch_size,
                work.length,
                backward=True,
                writable=submodel.positions,
                outside_writable=True,
                config=narrow_config(shape.config, submodel.width),
                optimizer_slots=self.optimizer_slots,
            ),
        )

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Tensors: the whole wide model."""
        from testbed.model.whole import whole_tensors

        return State(whole_tensors(base, seed))

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        shift = self.shift(round_index)
        slices = {width: _slices(state, base, width, shift) for width in {client.submodel.width for client in clients}}
        return [
            Order(client.index, client.submodel, tensors=slices[client.submodel.width], reads_base=False)
            for client in clients
        ]

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the wide model as a Hugging Face model folder."""
        from testbed.model.whole import export_whole

        export_whole(folder, base, state.tensors)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.whole import running_statistics
        from testbed.model.width import narrow_config, windows
        from testbed.node.training import local_steps

        job, wide = workplace.job, workplace.config
        narrow = narrow_config(wide, job.submodel.width)
        built = workplace.whole(job.submodel, workplace.tensors, lambda _: True, narrow)
        workplace.phase(_PHASE)
        trained = local_steps(workplace, built, optimizer=self.descent(job.learning_rate), max_norm=None)
        places = windows(wide, job.submodel.width, job.work.task, job.work.labels, self.shift(job.round))
        held = {**built.trainable(), **running_statistics(built)}
        return Update(
            tensors={name: Part(tensor.detach(), places[name]) for name, tensor in held.items()},
            scalars={"loss": trained.loss, "last_loss": trained.last_loss},
            examples=len(workplace.shard),
        )


def _slices(state: State, base: BaseModel, width: float, shift: int) -> dict[str, Tensor]:
    """What a client of this width holds of every tensor."""
    from testbed.model.width import cut, windows

    places = windows(base.config, width, base.task, base.labels, shift)
    return {name: cut(tensor, places[name]) for name, tensor in state.tensors.items()}
