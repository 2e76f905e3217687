"""What methods share whose server averages: what it does with the mean, and clipping and noise on the updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from testbed.errors import UsageError
from testbed.method import (
    Block,
    Method,
    ModelShape,
    Outfit,
    Phase,
    Received,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class AveragingMethod(Method):
    """The server's next state is the mean of what clients sent, weighted by examples, or a step towards it.

    server           "average" takes the mean; "fedavgm", "fedadam", "fedyogi" step towards it with a momentum
    server_rate      length of that step; none: 1 for fedavgm, 0.01 for the adaptive ones
    server_momentum  share of the last momentum that is kept
    server_decay     share of the last squared changes that is kept (fedadam, fedyogi)
    server_floor     what their root is raised by (fedadam, fedyogi)
    clip             longest change that a client's update may make, as a Euclidean norm; 0: any
    noise            standard deviation of the noise on a round's sum, in clips: differential privacy; 0: none
    delta            of the (epsilon, delta) that the plan then promises
    """

    #: Whether what clients send is averaged at all; else the server takes no step, and clips nothing.
    averages: ClassVar[bool] = True
    server: Literal["average", "fedavgm", "fedadam", "fedyogi"] = "average"
    server_rate: float | None = None
    server_momentum: float = 0.9
    server_decay: float = 0.99
    server_floor: float = 1e-3
    clip: float = 0.0
    noise: float = 0.0
    delta: float = 1e-5

    @property
    def leaks(self) -> str:
        """Why noise on the updates promises nothing here; empty: it does."""
        return ""

    def check(self, shape: ModelShape, work: Workload) -> None:
        if not self.averages and (self.server != "average" or self.clip):
            raise UsageError("settings server and clip: this method's server does not average; leave them as they are")
        if self.server_rate is not None and self.server_rate <= 0:
            raise UsageError(f"setting server_rate={self.server_rate}: expected more than 0")
        for name in ("server_momentum", "server_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"setting {name}={getattr(self, name)}: expected at least 0, below 1")
        if self.server_floor <= 0:
            raise UsageError(f"setting server_floor={self.server_floor}: expected more than 0")
        self._check_privacy()

    def _check_privacy(self) -> None:
        if self.clip < 0 or self.noise < 0:
            raise UsageError(f"settings clip={self.clip} and noise={self.noise}: expected at least 0")
        if not 0 < self.delta < 1:
            raise UsageError(f"setting delta={self.delta}: expected above 0 and below 1")
        if self.noise and not self.clip:
            raise UsageError("setting noise: it is measured in clips; give clip too, for instance clip=1")
        if self.clip and type(self).mean is not AveragingMethod.mean:
            raise UsageError("setting clip: this method weighs updates in its own way; leave it at 0")
        if self.noise and self.leaks:
            raise UsageError(f"setting noise: it would promise nothing here, because {self.leaks}")

    def promises(self, clients: int, participants: int, rounds: int) -> tuple[str, ...]:
        if not self.noise:
            return ()
        from testbed.model.privacy import epsilon

        spent = epsilon(self.noise, clients, participants, rounds, self.delta)
        words = (
            f"differential privacy of clients: epsilon {spent:.3g} at delta {self.delta:g} after {rounds} rounds of "
            f"{participants} of {clients} clients (clip {self.clip:g}, noise {self.noise:g}); the noise follows from "
            f"the seed, so it shows what privacy costs and protects nobody"
        )
        return (words,)

    # ── what a client does, unless the method says otherwise: train all that is mounted, end to end ────────────────
    def outfit(self, shape: ModelShape) -> Outfit | None:
        """What is mounted on the kept blocks; None: nothing."""
        return None

    def train_phase(self, blocks: Sequence[Block], shape: ModelShape, work: Workload) -> Phase:
        """The phase in which what is mounted on `blocks`, and a new head, are trained end to end."""
        return Phase(
            "train",
            tuple(blocks),
            work.batch_size,
            work.length,
            backward=True,
            outfit=self.outfit(shape),
            trained_elements=shape.head_elements,
        )

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        return (self.train_phase(submodel.blocks, shape, work),)

    def work(self, workplace: Workplace) -> Update:
        return self.train(workplace, workplace.job.submodel)

    def train(self, workplace: Workplace, submodel: Submodel, **scalars: object) -> Update:
        """Mount what the job brings on `submodel`, do the local steps, send all that was trained."""
        built = workplace.build(submodel)
        self.mount(built, workplace.tensors)  # what the job brought is let go of: training has its own copy
        return self.train_in("train", workplace, built, **scalars)

    def train_in(self, phase: str, workplace: Workplace, built: Built, **scalars: object) -> Update:
        """The local steps, in a phase of that name, on a model on which everything is mounted already."""
        from testbed.node.training import local_steps, update_of

        workplace.phase(phase)
        trained = local_steps(workplace, built)
        return update_of(workplace, built.trainable(), trained, **scalars)

    # ── the server ─────────────────────────────────────────────────────────────────────────────────────────────────
    def mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        """The mean of the updates, for every tensor of the state."""
        from testbed.model.combine import weighted_mean

        return weighted_mean(state.tensors, received)

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        mean = self._private_mean(state, received) if self.clip else self.mean(state, received)
        if self.server == "average":
            return replace(state, tensors=mean)
        from testbed.model.server_optimizer import ServerOptimizer

        rate = self.server_rate or (1.0 if self.server == "fedavgm" else 0.01)
        rule = ServerOptimizer(self.server, rate, self.server_momentum, self.server_decay, self.server_floor)
        moved = [name for name in state.tensors if any(name in update.names for update in received)]
        tensors, moments = rule.step(state.tensors, mean, state.server, moved)
        return replace(state, tensors=tensors, server={**state.server, **moments})

    def _private_mean(self, state: State, received: Sequence[Received]) -> dict[str, Tensor]:
        from testbed.model.privacy import private_mean

        return private_mean(state.tensors, received, self.clip, self.noise)
