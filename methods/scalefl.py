"""ScaleFL, once NeuLite: a network is trained stage by stage, with an output module for the stages to come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from methods._sgd import SgdMethod
from methods._stages import phase_name, stage_of
from testbed.errors import UsageError
from testbed.method import (
    Client,
    ModelShape,
    Order,
    Phase,
    Received,
    Snapshot,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.output_module import StageOutfit
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace

_NEVER = -1


@dataclass(frozen=True)
class ScaleFL(SgdMethod):
    """Stage t of T trains block t with an output module for the later ones, and every round is another stage's.

    Paper: Wu et al., "Bridging Memory Gaps: Scaling Federated Learning for Heterogeneous Clients" (ScaleFL), at first
    "NeuLite: Memory-Efficient Federated Learning via Elastic Progressive Training" (arXiv:2408.10826).  It is not the
    ScaleFL of Ilhan, Su and Liu (CVPR 2023), which scales width and depth with early exits.

    Evidence: the official code, on a ResNet: a block is a stage of the network, T = 4, stage = round mod T.
    - Output module: each stage to come is one 3x3 convolution of stride 2; then the mean over the picture and a
      classifier of the stage's own.  A projection (three linear maps) of that mean serves the loss alone.
    - Curriculum mentor: Loss = CE - λ1_t · nHSIC(Z, X) - λ2_t · nHSIC(P, Y), with X the picture, Z the feature behind
      the convolutions, P the projection, Y the label; Gaussian kernels with sigma = 5.  The code's third term is 0.
    - Training harmonizer, backward: the last convolution of block t - 1 and its BatchNorm are trained along; all
      before is frozen, though its BatchNorm's running statistics move on.  Forward: every stage has a version of the
      model of its own, which takes the earlier blocks from the newest version of stage t - 1 and block t from the
      newest version of stage T, and keeps its output module.
    - SGD at 0.01 with momentum 0.9 and weight decay 5e-4.

    Our reading, where they are silent: λ (the code's defaults are none): λ1 falls evenly, λ2 rises evenly.  The stem
    goes with block 1.  nHSIC is 0 in a batch in which one side does not vary.  Updates are averaged by examples, the
    running statistics too (the code: without weights).  Where rounds failed, or no device can hold some stage, each
    block comes from the version trained last of those that hold it, which is what the rule comes to otherwise.  What
    is evaluated is the version of the deepest stage that was ever trained, with its output module: from the first
    round of stage T on that is the network itself.  The result is that network; where stage T was never trained, its
    blocks are those of the versions trained last, and what no stage has trained has its initial values.

    Our reading for transformers: blocks are the layers, in T groups as even as they can be; a stage to come is
    h + gelu(W h + b); the final norm and the head are the stage's own; P is of the mean over all tokens, X of a text
    its embeddings; trained along is the last linear map of the group before, with a norm that directly follows it.

    stages  T of a transformer; a convolutional network has its own
    growth  "round_robin": each round is another stage's; "progressive": equal shares of consecutive rounds
    lambda1  λ1 of every stage; empty: T/T, …, 2/T, 1/T
    lambda2  λ2 of every stage; empty: 1/T, 2/T, …, T/T
    sigma   of the kernels
    """

    family: ClassVar[str] = "width or depth, from scratch"
    memory: ClassVar[str] = "the stage's blocks, trained through"
    traffic: ClassVar[str] = "the stage's weights, both ways"

    stages: int = 4
    growth: Literal["round_robin", "progressive"] = "round_robin"
    lambda1: tuple[float, ...] = ()
    lambda2: tuple[float, ...] = ()
    sigma: float = 5.0

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        from testbed.model.output_module import stage_channels

        super().check(shape, work)
        if self.stages < 1:
            raise UsageError(f"setting stages={self.stages}: expected at least 1")
        if self.sigma <= 0:
            raise UsageError(f"setting sigma={self.sigma}: expected more than 0")
        count = len(self.depths(shape))
        for name, values in (("lambda1", self.lambda1), ("lambda2", self.lambda2)):
            if values and (len(values) != count or min(values) < 0):
                told = ",".join(f"{value:g}" for value in values)
                raise UsageError(f"setting {name}={told}: expected {count} numbers of at least 0, one for each stage")
        stage_channels(shape)

    def depths(self, shape: ModelShape) -> tuple[int, ...]:
        """Blocks of every stage's model: strictly increasing, the last one is the network."""
        from testbed.model.output_module import is_convolutional

        count = len(shape) if is_convolutional(shape) else min(self.stages, len(shape))
        return tuple(math.ceil(len(shape) * stage / count) for stage in range(1, count + 1))

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        """The deepest stage that a device can do; it does all before that one, too."""
        yield from (Submodel.first(depth) for depth in reversed(self.depths(shape)))

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        stages = self.depths(shape).index(len(submodel.blocks)) + 1
        return tuple(self._phase(stage, shape, work) for stage in range(1, stages + 1))

    def _phase(self, stage: int, shape: ModelShape, work: Workload) -> Phase:
        outfit = self.stage_outfit(stage, shape)
        return Phase(
            phase_name(stage),
            Submodel.first(outfit.depths[stage - 1]).blocks,
            work.batch_size,
            work.length,
            backward=True,
            outfit=outfit,
            writable=tuple(outfit.positions),
            optimizer_slots=self.optimizer_slots,
        )

    def stage_outfit(self, stage: int, shape: ModelShape) -> StageOutfit:
        """What a stage, counted from 1, mounts and descends."""
        from testbed.model.output_module import StageOutfit

        depths = self.depths(shape)
        count = len(depths)
        about_input = self.lambda1 or [(count - earlier) / count for earlier in range(count)]
        about_label = self.lambda2 or [(earlier + 1) / count for earlier in range(count)]
        return StageOutfit(stage, depths, about_input[stage - 1], about_label[stage - 1], self.sigma)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Tensors: every stage's version of the model, "stage2.…" being canonical names of the second one.

        Scalars: the run's rounds; stage and index of the round that has begun; by stage the round in which it was last
        trained (-1: never); names of the stem's tensors.
        """
        from testbed.model import blocks
        from testbed.model.output_module import names_behind, output_tensors
        from testbed.model.whole import whole_tensors

        prefix, depths = base.shape.block_prefix, self.depths(base.shape)
        network = whole_tensors(base, seed)
        behind = names_behind(blocks.skeleton(base.config, base.task, base.labels, "float32"), prefix)
        position = {name: blocks.place(prefix, name)[0] for name in network}
        tensors: dict[str, Tensor] = {}
        for stage, depth in enumerate(depths, start=1):
            kept = {name: network[name] for name in network if (position[name] or 0) < depth}
            own = {**kept, **output_tensors(base.shape, stage, len(depths), seed)}
            tensors |= {f"{_prefix(stage)}{name}": tensor for name, tensor in own.items()}
        scalars = {
            "rounds": rounds,
            "stage": 0,
            "round": _NEVER,
            "trained": [_NEVER] * len(depths),
            "stem": sorted(name for name in network if position[name] is None and name not in behind),
        }
        return State(tensors, scalars)

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        """Forward coupling: the version of the round's stage takes blocks from others."""
        stage = self._stage(round_index, state, base.shape)
        scalars = {**state.scalars, "stage": stage, "round": round_index}
        return replace(state, tensors={**state.tensors, **self._coupled(state, base.shape, stage)}, scalars=scalars)

    def _stage(self, round_index: int, state: State, shape: ModelShape) -> int:
        count = len(self.depths(shape))
        if self.growth == "progressive":
            return stage_of(round_index, state.scalars["rounds"], count, ())
        return round_index % count + 1

    def _coupled(self, state: State, shape: ModelShape, stage: int) -> dict[str, Tensor]:
        """What a stage's version takes: each block from the version that was trained last of those that hold it.

        Unless rounds failed, that is stage t - 1's for earlier blocks, and stage T's for the stage's own.
        """
        coupled, trained = {}, state.scalars["trained"]
        for name in version(state.tensors, stage):
            home = self._home(name, state, shape)
            if home is not None:
                source = max(range(home, len(trained) + 1), key=lambda holder: trained[holder - 1])
                coupled[f"{_prefix(stage)}{name}"] = state.tensors[f"{_prefix(source)}{name}"]
        return coupled

    def _home(self, name: str, state: State, shape: ModelShape) -> int | None:
        """The stage to which a tensor belongs, the stem to the first; None for what every version has of its own."""
        from testbed.model import blocks

        position, _ = blocks.place(shape.block_prefix, name)
        if position is None:
            return 1 if name in state.scalars["stem"] else None
        return next(stage for stage, depth in enumerate(self.depths(shape), start=1) if position < depth)

    def admits(self, state: State, base: BaseModel, client: Client) -> bool:
        stage: int = state.scalars["stage"]
        return len(client.submodel.blocks) >= self.depths(base.shape)[stage - 1]

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        stage = state.scalars["stage"]
        submodel = Submodel.first(self.depths(base.shape)[stage - 1])
        tensors, scalars = version(state.tensors, stage), {"stage": stage}
        return [Order(client.index, submodel, tensors=tensors, scalars=scalars, reads_base=False) for client in clients]

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        trained = list(state.scalars["trained"])
        trained[state.scalars["stage"] - 1] = state.scalars["round"]
        return replace(super().combine(state, base, received), scalars={**state.scalars, "trained": trained})

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        depths, trained = self.depths(base.shape), state.scalars["trained"]
        stage = max((stage for stage, last in enumerate(trained, start=1) if last != _NEVER), default=len(depths))
        return (Snapshot(Submodel.first(depths[stage - 1]), version(state.tensors, stage)),)

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the network as a Hugging Face model folder."""
        from testbed.model.whole import export_whole

        stages = len(self.depths(base.shape))
        newest = state.tensors
        if state.scalars["trained"][-1] == _NEVER:
            newest = {**newest, **self._coupled(state, base.shape, stages)}
        export_whole(folder, base, version(newest, stages))

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.output_module import mount_output

        depths = self.depths(built.shape)
        mount_output(built, depths.index(len(built.submodel.blocks)) + 1, len(depths))
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.whole import running_statistics
        from testbed.node.training import local_steps, update_of

        job = workplace.job
        stage = job.scalars["stage"]
        built = self._built(workplace, stage)
        workplace.phase(phase_name(stage))
        trained = local_steps(
            workplace,
            built,
            loss=self.stage_outfit(stage, built.shape).loss,
            optimizer=self.descent(job.learning_rate),
            max_norm=None,
        )
        moved = {**built.trainable(), **running_statistics(built)}
        return update_of(workplace, {f"{_prefix(stage)}{name}": tensor for name, tensor in moved.items()}, trained)

    def _built(self, workplace: Workplace, stage: int) -> Built:
        """The stage's model as the job brings it, with its output module, ready to train."""
        from testbed.model.output_module import OUTPUT_MODULE

        tensors = workplace.tensors
        built = workplace.whole(workplace.job.submodel, tensors, lambda _: False)
        self.stage_outfit(stage, built.shape).mount(built)
        built.fill({name: tensor for name, tensor in tensors.items() if name.startswith(f"{OUTPUT_MODULE}.")})
        return built


def version(tensors: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
    """A stage's version of the model, by canonical name, out of a state's tensors."""
    prefix = _prefix(stage)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefix(stage: int) -> str:
    return f"stage{stage}."
