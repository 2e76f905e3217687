"""Steps that methods share: functions they call, not flags in a shared loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.method import Part, Update
from testbed.model.submodel import Built
from testbed.node.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from testbed.task import Batch


@dataclass(frozen=True)
class Trained:
    """What the local steps of a job came to: mean loss over the steps, and the last one."""

    loss: float
    last_loss: float


def local_steps(
    workplace: Workplace,
    built: Built,
    *,
    steps: range | None = None,
    loss: Callable[[Built, Batch], Tensor] = Built.loss,
    optimizer: Callable[[list[Parameter]], Optimizer] | None = None,
    max_norm: float | None = 1.0,
    after_backward: Callable[[], None] = lambda: None,
) -> Trained:
    """The job's local steps on everything trainable in `built`: AdamW without decay, unless `optimizer` makes another.

    `steps` are others than the job's own, for a job that trains more than once: they choose batches and randomness.
    `loss` is what a step descends; `max_norm` clips the gradients' norm over all parameters (None: not clipped);
    `after_backward` is called while a step's gradients are there, before they are clipped.
    Every random number of a step (dropout) derives from run seed, round, client and step, so that a job gives the
    same update wherever it runs again.  Raises TestbedError when the loss is no longer a number.
    """
    import torch

    job = workplace.job
    steps = range(job.steps) if steps is None else steps
    parameters = list(built.trainable().values())
    if optimizer is None:
        descent: Optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, foreach=False)
    else:
        descent = optimizer(parameters)
    losses = []
    for step in steps:
        torch.manual_seed(step_seed(job.seed, job.round, job.client, step))
        value = loss(built, workplace.batch(step))
        value.backward()  # type: ignore[no-untyped-call]
        after_backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=False)
        descent.step()
        descent.zero_grad(set_to_none=True)
        losses.append(value.item())
        if losses[-1] != losses[-1]:  # NaN
            raise TestbedError(f"the loss of local step {step} is not a number; a smaller learning rate may help")
        workplace.progress(step=step + 1, steps=steps.stop, loss=losses[-1])
    return Trained(sum(losses) / len(losses), losses[-1])


def evaluated(workplace: Workplace, built: Built) -> Update:
    """The answer to an evaluation: loss and accuracy of a built model on the job's shard, which is the held-out set."""
    from testbed.task import evaluate_batches

    work = workplace.job.work
    quality = evaluate_batches(
        built.model, workplace.shard, work.batch_size, work.length, built.pad_token_id, work.accelerator
    )
    return Update(scalars={"loss": quality.loss, "accuracy": quality.accuracy}, examples=len(workplace.shard))


def step_seed(seed: int, round_index: int, client: int, step: int) -> int:
    """One integer out of (run seed, round, client, step): the same on every machine."""
    import hashlib

    digest = hashlib.sha256(f"{seed}/{round_index}/{client}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def update_of(workplace: Workplace, tensors: Mapping[str, Tensor], trained: Trained, **scalars: object) -> Update:
    """An update of whole tensors, weighted by the client's number of examples."""
    return Update(
        tensors={name: Part(tensor.detach()) for name, tensor in tensors.items()},
        scalars={"loss": trained.loss, "last_loss": trained.last_loss, **scalars},
        examples=len(workplace.shard),
    )
