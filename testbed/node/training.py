"""Steps that methods share: functions they call, not flags in a shared loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.method import Part, Update
from testbed.node.workplace import Workplace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from testbed.model.submodel import Built


@dataclass(frozen=True)
class Trained:
    """What the local steps of a job came to: mean loss over the steps, and the last one."""

    loss: float
    last_loss: float


def local_steps(workplace: Workplace, built: Built, weight_decay: float = 0.0) -> Trained:
    """The job's local steps of AdamW on everything trainable in `built`.

    Every random number of a step (dropout) derives from run seed, round, client and step, so that a job gives the
    same update wherever it runs again.  Raises TestbedError when the loss is no longer a number.
    """
    import torch

    job = workplace.job
    parameters = list(built.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=weight_decay, foreach=False)
    losses = []
    for step in range(job.steps):
        torch.manual_seed(step_seed(job.seed, job.round, job.client, step))
        loss = workplace.loss(built, workplace.batch(step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if losses[-1] != losses[-1]:  # NaN
            raise TestbedError(f"the loss of local step {step} is not a number; a smaller learning rate may help")
        workplace.progress(step=step + 1, steps=job.steps, loss=losses[-1])
    return Trained(sum(losses) / len(losses), losses[-1])


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
