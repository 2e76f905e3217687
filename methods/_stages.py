"""What methods that grow in stages share: when each begins, who is large enough for it, its submodel and its phase."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from methods._lora import LoraMethod
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Phase, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class StagedLora(LoraMethod):
    """LoRA in stages, each on a deeper submodel than the one before it; all clients of a stage train the same.

    stages            how many; a model too shallow for so many depths has fewer
    rounds_per_stage  rounds of each stage; empty: the run's rounds in equal shares, and a run of fewer rounds than
                      stages leaves stages out, but never the last one
    """

    stages: int = 4
    rounds_per_stage: tuple[int, ...] = ()

    @abstractmethod
    def depths(self, blocks: int) -> tuple[int, ...]:
        """Blocks of every stage's submodel on a model of so many: strictly increasing, the last one is the model."""

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.stages < 1:
            raise UsageError(f"setting stages={self.stages}: expected at least 1")
        depths = self.depths(len(shape))
        if self.rounds_per_stage and (len(self.rounds_per_stage) != len(depths) or min(self.rounds_per_stage) < 1):
            raise UsageError(
                f"setting rounds_per_stage={_text(self.rounds_per_stage)}: expected {len(depths)} numbers of at least "
                f"1, for stages of {_text(depths)} blocks"
            )

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        yield from (Submodel.first(depth) for depth in reversed(self.depths(len(shape))))

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        """One for each stage that a client with this submodel is large enough for."""
        able = [depth for depth in self.depths(len(shape)) if depth <= len(submodel.blocks)]
        return tuple(
            replace(self.train_phase(Submodel.first(depth).blocks, shape, work), name=phase_name(stage))
            for stage, depth in enumerate(able, start=1)
        )

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the run's seed and rounds, and the stage that has begun, counted from 1 (0: none yet)."""
        if self.rounds_per_stage and sum(self.rounds_per_stage) != rounds:
            raise UsageError(
                f"setting rounds_per_stage={_text(self.rounds_per_stage)}: that is {sum(self.rounds_per_stage)} "
                f"rounds, the run has {rounds}; change either"
            )
        scalars = {"seed": seed, "rounds": rounds, "stage": 0}
        return replace(super().start(base, work, clients, seed, rounds), scalars=scalars)

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        stages = len(self.depths(len(base.shape)))
        stage = stage_of(round_index, state.scalars["rounds"], stages, self.rounds_per_stage)
        return replace(state, scalars={**state.scalars, "stage": stage})

    def admits(self, state: State, base: BaseModel, client: Client) -> bool:
        return len(client.submodel.blocks) >= self.depth(state, base.shape)

    def depth(self, state: State, shape: ModelShape) -> int:
        """Blocks of the submodel of the stage that has begun; all of the model before the first one."""
        stage: int = state.scalars["stage"]
        return self.depths(len(shape))[stage - 1]

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        return self.train_in(phase_name(workplace.job.scalars["stage"]), workplace, built)


def phase_name(stage: int) -> str:
    """The phase in which a stage, counted from 1, is trained."""
    return f"stage {stage}"


def stage_of(round_index: int, rounds: int, stages: int, rounds_per_stage: Sequence[int]) -> int:
    """The stage of a round, counted from 1.

    Equal shares where nothing else is said: stage s ends with round floor(s · rounds / stages), so that the last round
    is always one of the last stage.
    """
    if not rounds_per_stage:
        return math.ceil((round_index + 1) * stages / rounds)
    return next(stage for stage, end in enumerate(accumulate(rounds_per_stage), start=1) if round_index < end)


def strictly_increasing(depths: Sequence[int]) -> bool:
    """Whether there is one at least, and each is larger than the one before it."""
    return bool(depths) and all(first < second for first, second in pairwise(depths))


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
