"""Quality of the global (or the personal) model on the held-out set, computed on the controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from testbed.model.submodel import build
from testbed.task import Quality, evaluate_batches

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.method import Method, State, Submodel, Workload
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.task import Shard

_BATCH = 32


def evaluate(method: Method, base: BaseModel, state: State, work: Workload, held_out: Shard) -> Quality:
    """Mean over the method's snapshots (one, unless it evaluates per client) of loss and accuracy on `held_out`."""
    qualities = [
        evaluate_snapshot(method, base, snapshot.submodel, snapshot.tensors, work, held_out)
        for snapshot in method.snapshots(state, base)
    ]
    return Quality(
        loss=sum(quality.loss for quality in qualities) / len(qualities),
        accuracy=sum(quality.accuracy for quality in qualities) / len(qualities),
        examples=len(held_out),
    )


def evaluate_snapshot(
    method: Method | None,
    base: BaseModel,
    submodel: Submodel,
    tensors: Mapping[str, Tensor],
    work: Workload,
    held_out: Shard,
) -> Quality:
    """Quality of one submodel with these tensors mounted; without a method, of the base weights alone."""
    built = mounted(method, base, submodel, tensors, work)
    try:
        return evaluate_batches(built.model, held_out, _BATCH, work.length, built.pad_token_id, work.accelerator)
    finally:
        built.close()


def mounted(
    method: Method | None, base: BaseModel, submodel: Submodel, tensors: Mapping[str, Tensor], work: Workload
) -> Built:
    """A submodel with the tensors of a method mounted; without a method, the base weights alone."""
    built = build(base.config, base.fill_in(submodel), base.store.path, base.outside, work, seed=0)
    if method is not None:
        method.mount(built, tensors)
    return built
