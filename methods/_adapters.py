"""What methods that train bottleneck adapters share: settings, initial state, the mean, the exported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from methods._averaging import AveragingMethod
from methods._export import export_tensors
from testbed.errors import UsageError
from testbed.method import Client, ModelShape, Outfit, State, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built


@dataclass(frozen=True)
class AdapterMethod(AveragingMethod):
    """An adapter h + up(gelu(down h)) behind every block, and the task's head where it has a new one.

    bottleneck   outputs of down: how narrow the adapters are
    """

    bottleneck: int = 32

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.bottleneck < 1:
            raise UsageError(f"setting bottleneck={self.bottleneck}: expected at least 1")

    def outfit(self, shape: ModelShape) -> Outfit | None:
        from testbed.model.bottleneck import BottleneckShape

        return BottleneckShape(self.bottleneck)

    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.bottleneck import adapter_tensors

        return State({**adapter_tensors(base.shape, self.bottleneck, seed), **base.new_head(seed)})

    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.bottleneck import fill_adapters, mount_adapters

        mount_adapters(built, self.bottleneck)
        fill_adapters(built, tensors)

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write adapters.safetensors (adapters and new head by canonical name) and adapters.json, which describes it.

        No library that we know of reads such adapters; the description says where each one belongs and what it does.
        """
        export_tensors(
            folder,
            "adapters",
            state,
            base,
            work,
            blocks=base.shape.block_prefix,
            bottleneck=self.bottleneck,
            adapter="of block i, on its output h: h + up(gelu(down(h))), exact GELU, computed in float32",
        )
