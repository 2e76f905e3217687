"""FwdLLM: LoRA is trained by forward passes alone; the server steps where the clients' gradients agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from methods._lora import LoraMethod
from methods._zeroth_order import slope
from testbed.errors import UsageError, WireError
from testbed.method import Client, ModelShape, Order, Part, Phase, Received, State, Submodel, Update, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace

GRADIENT = "gradient."
_HALVES = ("even.", "odd.")
_ITEM_BYTES = 4


@dataclass(frozen=True)
class FwdLLM(LoraMethod):
    """Clients send forward gradients of LoRA and head; the server takes a step down their mean, or waits for more.

    Paper: Xu et al., "FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences"
    (USENIX ATC 2024, arXiv:2308.13894).  Evidence: the official code takes (L(w + h v) − L(w − h v)) / 2h · v for every
    mini-batch with a normal direction v over what is trained (adapters or biases), of ten candidates the one with the
    largest cosine with the last global gradient.  The server's rate warms up and decays linearly.  Where the variance
    between two halves of the gradients is above a threshold it does not step, keeps them and asks for more.  Its
    runs have 3,000 rounds of 100 clients, batches of 8, a rate of 0.01, h = 0.01.

    Our reading: LoRA is what is trained; a client's weights stay as they are during a round; its losses are of the
    model as it is evaluated, without dropout; gradients are weighted by examples.  The halves are the updates at even
    and at odd places since the last step, and their variance is ‖g₁ − g₂‖² / ‖g₁ + g₂‖², which is 1 for noise alone.
    More is twice the perturbations each time, and after `patience` times the server steps all the same.  The run's own
    learning rate means nothing here.

    server_rate      length of the server's step, before warm-up and decay
    warmup           share of the rounds in which it rises to that
    decay            whether it falls afterwards, to nothing behind the last round
    h                h
    candidates       directions of which one is taken
    perturbations    directions taken for each local step
    variance_limit   largest variance with which the server steps
    patience         times in a row that it may ask for more
    """

    family: ClassVar[str] = "zeroth order"
    memory: ClassVar[str] = "whole model, forward only"
    traffic: ClassVar[str] = "A and B and a gradient down, a gradient up"
    short_run: ClassVar[Mapping[str, float]] = {"rounds": 10}
    averages: ClassVar[bool] = False

    server_rate: float = 0.01
    warmup: float = 0.1
    decay: bool = True
    h: float = 0.01
    candidates: int = 10
    perturbations: int = 1
    variance_limit: float = 1.0
    patience: int = 3

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        for name, least in (("candidates", 1), ("perturbations", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"setting {name}={getattr(self, name)}: expected at least {least}")
        for name in ("h", "variance_limit"):
            if getattr(self, name) <= 0:
                raise UsageError(f"setting {name}={getattr(self, name)}: expected more than 0")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"setting warmup={self.warmup}: expected a number from 0 to 1")

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        """Beside the model there are the gradient so far, the last global one, and one tensor's direction."""
        from testbed.model.adapters import adapted, lora_elements

        lora = self.lora(shape)
        largest = max(lora.rank * max(linear.inputs, linear.outputs) for _, linear in adapted(shape, lora))
        elements = 2 * (lora_elements(shape, lora) + shape.head_elements) + max(largest, shape.head_elements)
        return (
            Phase(
                "train",
                submodel.blocks,
                work.batch_size,
                work.length,
                backward=False,
                outfit=lora,
                trained_elements=shape.head_elements,
                optimizer_slots=0,
                kept_bytes=_ITEM_BYTES * elements,
            ),
        )

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: of the updates since the last step, how many there are and each half's examples."""
        scalars = {"rounds": rounds, "round": 0, "updates": 0, "examples": [0, 0], "asked": 0}
        return replace(super().start(base, work, clients, seed, rounds), scalars=scalars)

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:
        return replace(state, scalars={**state.scalars, "round": round_index})

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        last = {name: tensor for name, tensor in state.server.items() if name.startswith(GRADIENT)}
        tensors = {**state.tensors, **last}
        scalars = {"perturbations": self.perturbations * 2 ** state.scalars["asked"]}
        return [Order(client.index, client.submodel, tensors=tensors, scalars=scalars) for client in clients]

    def verify(self, state: State, update: Received) -> None:
        super().verify(state, update)
        for name, tensor in state.tensors.items():
            if name not in update.names or update.read(name).tensor.shape != tensor.shape:
                raise WireError(f"client {update.client}: it did not send the gradient of the whole of {name}")

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        scalars, examples = dict(state.scalars), list(state.scalars["examples"])
        for place, update in enumerate(received, start=scalars["updates"]):
            examples[place % 2] += update.examples
        sums = dict(self._summed(state, received))
        scalars |= {"updates": scalars["updates"] + len(received), "examples": examples}
        if scalars["updates"] > 1 and scalars["asked"] < self.patience and self._disagree(sums, examples):
            kept = {name: tensor for name, tensor in state.server.items() if name.startswith(GRADIENT)}
            return replace(state, scalars={**scalars, "asked": scalars["asked"] + 1}, server={**kept, **sums})
        rate, tensors, last = self.rate(scalars["round"], scalars["rounds"]), {}, {}
        for name, before in state.tensors.items():
            even, odd = (sums[f"{half}{name}"] for half in _HALVES)
            gradient = (even + odd) / sum(examples)
            tensors[name] = (before.double() - rate * gradient).to(before.dtype)
            last[f"{GRADIENT}{name}"] = gradient.to(before.dtype)
        return replace(
            state, tensors=tensors, server=last, scalars={**scalars, "updates": 0, "examples": [0, 0], "asked": 0}
        )

    def _summed(self, state: State, received: Sequence[Received]) -> Iterator[tuple[str, Tensor]]:
        """Each half's gradients since the last step, times their examples; float64."""
        import torch

        for name, like in state.tensors.items():
            nothing = torch.zeros(like.shape, dtype=torch.float64)
            sums = [state.server.get(f"{half}{name}", nothing).clone() for half in _HALVES]
            for place, update in enumerate(received, start=state.scalars["updates"]):
                sums[place % 2] += update.read(name).tensor.to(torch.float64) * update.examples
            yield from ((f"{half}{name}", total) for half, total in zip(_HALVES, sums, strict=True))

    def _disagree(self, sums: Mapping[str, Tensor], examples: Sequence[int]) -> bool:
        """Whether the variance between the two halves' means is above the limit."""
        apart = together = 0.0
        for name in [name for name in sums if name.startswith(_HALVES[0])]:
            even, odd = sums[name] / examples[0], sums[name.replace(*_HALVES, 1)] / examples[1]
            apart += float((even - odd).square().sum())
            together += float((even + odd).square().sum())
        return apart > self.variance_limit * together

    def rate(self, round_index: int, rounds: int) -> float:
        """The server's rate in a round."""
        rising = round(self.warmup * rounds)
        if round_index < rising:
            return self.server_rate * (round_index + 1) / rising
        return self.server_rate * ((rounds - round_index) / (rounds - rising) if self.decay else 1.0)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        """Weights are moved in place, there and back, which leaves a rounding behind that nobody is sent."""
        import torch

        job = workplace.job
        tensors = dict(workplace.tensors)
        last = {name.removeprefix(GRADIENT): tensors.pop(name) for name in list(tensors) if name.startswith(GRADIENT)}
        built = workplace.build(job.submodel)
        self.mount(built, tensors)
        del tensors
        built.model.eval()
        workplace.phase("train")
        trained = {name: parameter.detach() for name, parameter in built.trainable().items()}
        last = {name: tensor.to(job.work.accelerator) for name, tensor in last.items()}
        sums = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
        count, losses = job.scalars["perturbations"], []
        for step, batch in enumerate(workplace.batches()):
            for place in range(count):
                direction = self._direction(workplace, step, place, last)
                found, loss = slope(built, batch, partial(direction.add_to, trained), self.h)
                direction.add_to(trained, self.h)
                direction.add_to(sums, found)
                losses.append(loss)
            workplace.progress(step=step + 1, steps=job.steps, loss=losses[-1])
        return Update(
            tensors={name: Part(total.div_(job.steps * count)) for name, total in sums.items()},
            scalars={"loss": sum(losses) / len(losses), "last_loss": losses[-1]},
            examples=len(workplace.shard),
        )

    def _direction(self, workplace: Workplace, step: int, place: int, last: Mapping[str, Tensor]) -> _Direction:
        """Of the candidates, the one with the largest cosine with the last global gradient; without one, the first."""
        from testbed.node.training import step_seed

        job = workplace.job
        seed = step_seed(job.seed, job.round, job.client, step)
        first = place * self.candidates
        if not last:
            return _Direction(seed, first)
        return max((_Direction(seed, first + number) for number in range(self.candidates)), key=lambda v: v.along(last))


@dataclass(frozen=True)
class _Direction:
    """A normal direction over named tensors: made again, one tensor at a time, whenever it is needed."""

    seed: int
    number: int

    def add_to(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        from testbed.model.perturbation import add_normals

        for name, tensor in tensors.items():
            add_normals(tensor, scale, self.seed, self._key(name))

    def along(self, others: Mapping[str, Tensor]) -> float:
        """Its cosine with these, times their norm."""
        from testbed.model.perturbation import normals

        product = square = 0.0
        for name, other in others.items():
            own = normals(other.shape, self.seed, self._key(name)).to(other).flatten()
            product += float(own.dot(other.flatten()))
            square += float(own.dot(own))
        return product / math.sqrt(square)

    def _key(self, name: str) -> str:
        return f"{self.number}/{name}"
