"""Stochastic gradient descent, for methods that train base weights as papers on convolutional networks do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from methods._averaging import AveragingMethod
from testbed.errors import UsageError
from testbed.method import IMAGE_CLASSIFICATION, RESIDENT, SEQUENCE_CLASSIFICATION, ModelShape, Workload

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer


@dataclass(frozen=True)
class SgdMethod(AveragingMethod):
    """Base weights are trained by SGD, without clipping.

    momentum      of SGD
    weight_decay  of SGD: part of the gradient
    rate_scale    SGD's learning rate is the run's times this: at the run's default of 0.002, 0.01
    """

    tasks: ClassVar[frozenset[str]] = frozenset({IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION})
    default_task: ClassVar[str] = IMAGE_CLASSIFICATION

    momentum: float = 0.9
    weight_decay: float = 5e-4
    rate_scale: float = 5.0

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"setting momentum={self.momentum}: expected at least 0, below 1")
        if self.weight_decay < 0:
            raise UsageError(f"setting weight_decay={self.weight_decay}: expected at least 0")
        if self.rate_scale <= 0:
            raise UsageError(f"setting rate_scale={self.rate_scale}: expected more than 0")
        if work.holding != RESIDENT:
            raise UsageError(
                f"holding {work.holding!r}: this method trains base weights; leave it at --holding {RESIDENT}"
            )

    @property
    def optimizer_slots(self) -> int:
        """Per trained element, as `testbed.method.Phase` counts them."""
        return 1 if self.momentum else 0

    def descent(self, learning_rate: float) -> Callable[[list[Parameter]], Optimizer]:
        """What makes the optimizer of a job's local steps, for the run's learning rate."""
        from torch.optim import SGD

        rate = self.rate_scale * learning_rate
        return partial(SGD, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay, foreach=False)
