"""C2A: a hypernetwork makes every block's adapter from the client's label histogram, and is what is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from methods._adapters import AdapterMethod
from methods._export import export_tensors
from testbed.errors import UsageError
from testbed.method import SEQUENCE_CLASSIFICATION, Client, ModelShape, Outfit, State, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace


@dataclass(frozen=True)
class C2A(AdapterMethod):
    """Clients train one hypernetwork and the head; it makes adapters that fit a client's labels, for every block.

    Paper: Kim et al., "Client-Customized Adaptation for Parameter-Efficient Federated Learning" (C2A, Findings of
    ACL 2023).  Evidence: in the official code a hypernetwork conditioned on the label histogram (condition 32) makes
    the adapter of every layer (bottleneck 16); hypernetwork and classifier are trained and averaged; evaluation uses a
    uniform histogram.

    Our reading: z_i = tanh(P h + e_i), a linear map of z_i for down and one for up, which begins at zero; h is the
    histogram of the client's own shard, where the official code takes that of the batch; adapters are one behind each
    block, without biases; means are weighted by examples.  The histogram stays on the client.

    condition   elements of z_i, from which an adapter is made
    """

    tasks: ClassVar[frozenset[str]] = frozenset({SEQUENCE_CLASSIFICATION})
    family: ClassVar[str] = "adapters"
    memory: ClassVar[str] = "whole model and a hypernetwork, trained through"
    traffic: ClassVar[str] = "the hypernetwork, both ways"
    data: ClassVar[str] = "its shard, and how many examples of each label it has"

    bottleneck: int = 16
    condition: int = 32

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.condition < 1:
            raise UsageError(f"setting condition={self.condition}: expected at least 1")

    def outfit(self, shape: ModelShape) -> Outfit | None:
        from testbed.model.hypernetwork import HypernetworkShape

        return HypernetworkShape(self.bottleneck, self.condition)

    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.hypernetwork import hypernetwork_tensors

        made = hypernetwork_tensors(base.shape, work.labels, self.bottleneck, self.condition, seed)
        return State({**made, **base.new_head(seed)})

    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.hypernetwork import mount_hypernetwork

        mount_hypernetwork(built, self.bottleneck, self.condition)
        built.fill(tensors)

    def work(self, workplace: Workplace) -> Update:
        from testbed.model.hypernetwork import mount_hypernetwork
        from testbed.node.training import local_steps, update_of

        built = workplace.build(workplace.job.submodel)
        hypernetwork = mount_hypernetwork(built, self.bottleneck, self.condition)
        built.fill(workplace.tensors)
        hypernetwork.see(workplace.shard.label_counts)
        workplace.phase("train")
        trained = local_steps(workplace, built, after_backward=hypernetwork.forget)
        return update_of(workplace, built.trainable(), trained)

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write adapters.safetensors (hypernetwork and new head) and adapters.json, which describes it.

        No library that we know of reads them; the description says what is computed.
        """
        export_tensors(
            folder,
            "adapters",
            state,
            base,
            work,
            blocks=base.shape.block_prefix,
            bottleneck=self.bottleneck,
            condition=self.condition,
            histogram="share of every class in the data; 1/labels each for data that is not known",
            adapter="of block i, on its output x: x + up(gelu(down(x))), exact GELU, computed in float32; with "
            "z = tanh(hypernetwork.condition.weight @ histogram + hypernetwork.blocks.weight[i]), down is "
            "(hypernetwork.down.weight @ z) as (bottleneck, hidden), up (hypernetwork.up.weight @ z) as "
            "(hidden, bottleneck), both row by row",
        )
