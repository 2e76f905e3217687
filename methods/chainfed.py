"""ChainFed: a window of adapters moves through the blocks from round to round; what lies below it is streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods._adapters import AdapterMethod
from methods._grouping import centred_gram, linear_cka
from testbed.errors import UsageError, WireError
from testbed.method import (
    STREAMED,
    Block,
    Client,
    ModelShape,
    Order,
    Outfit,
    Phase,
    Received,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace
    from testbed.task import Batch

_PROBE, _WINDOW, _LAST = "probe", "window", "last window"
#: Streaming takes no more from here on: two blocks, and hidden states that come and go.
_ALIKE_FROM = 4


@dataclass(frozen=True)
class Window(Outfit):
    """Adapters on all blocks of a submodel, of which those from `first` on are trained, and later ones as a branch.

    `later`: how many blocks follow the submodel's last one in the branch; `weight`: of the loss through it.
    """

    bottleneck: int
    first: int
    later: int
    weight: float

    def trains(self, position: int) -> bool:
        return position >= self.first

    def mount(self, built: Built) -> None:
        from testbed.model.bottleneck import mount_adapters, mount_branch

        positions = built.submodel.positions
        mount_adapters(built, self.bottleneck, [position for position in positions if self.trains(position)])
        if self.later:
            stop = positions[-1] + 1
            mount_branch(built, self.bottleneck, range(stop, stop + self.later))

    def loss(self, built: Built, batch: Batch) -> Tensor:
        """GPO: the loss at the window's end, and λ times the loss behind the later adapters alone."""
        from testbed.model.bottleneck import both_losses

        if not self.later:
            return built.loss(batch)
        local, overall = both_losses(built, batch)
        return local + self.weight * overall


@dataclass(frozen=True)
class ChainFed(AdapterMethod):
    """Q adjacent adapters are trained at a time, with an early exit behind them; the window moves on every round.

    Paper: "Beyond End-to-End: Dynamic Chain Optimization for Private LLM Adaptation on the Edge" (ChainFed,
    arXiv:2604.06819).  There is no public code; the evidence are readers' notes of the paper.  Known from them:
    FOAT - before training, devices tell CKA(Z_l, Z_0) of every block's output and the embeddings on one local batch,
    and the first block whose mean is below T is the first that is tuned (L_start; T = 0.8, 1.0 tunes all); DLCT - the
    adapters of a window of Q blocks are trained together, the rest frozen, and the next round's window begins one block
    further, over and over; GPO - the loss is that of the head behind the window's last block, plus λ times that of
    the same hidden state sent through the later adapters alone (no blocks) and the head; the last window has no such
    branch; λ is 0.1 for BERT and 0.2 for other models; Q is what the lowest-memory device can hold.
    Our reading: linear CKA on token vectors; the mean is weighted by examples; a model without any score below T is
    tuned from its last block on; the first round is FOAT's, where T < 1; windows begin at
    L_start + t mod (L - L_start - Q + 1), t counting the rounds after it, blocks counted from 0, Q at most
    L - L_start; the loss through the later adapters trains the window's adapters and the head; adapters are Houlsby et
    al.'s bottleneck (arXiv:1902.00751), one behind each block.

    Blocks below the window are in memory one at a time while they compute, the next one being read meanwhile, and
    nothing is kept of them for the backward pass; blocks behind it are not there at all.  The adapters of both are.

    window         Q of every device where window_by is "fixed"; else it has no meaning
    window_by      "lowest": Q is the largest that every device of the run can hold (the paper's); "fixed"; "device":
                   windows begin at the same block and are as long as each device can hold
    global_weight  λ; none: 0.1 for BERT, 0.2 for other models
    threshold      T; 1 or more: no probe, and every block is tuned
    samples        token vectors on which similarity is computed, at most
    """

    family: ClassVar[str] = "adapters"
    memory: ClassVar[str] = "a window of blocks, trained through; what lies below one at a time"
    traffic: ClassVar[str] = "all adapters down, the window's up"

    window: int = 2
    window_by: Literal["lowest", "fixed", "device"] = "lowest"
    global_weight: float | None = None
    threshold: float = 0.8
    samples: int = 512

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def leaks(self) -> str:
        return "the first block that is trained follows from what clients say of their data"

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.window < 1 or self.samples < 2:
            raise UsageError("settings window and samples: expected at least 1 and at least 2")
        if self.threshold <= 0 or (self.global_weight is not None and self.global_weight < 0):
            raise UsageError("settings threshold and global_weight: expected more than 0, and at least 0")

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        """A window at the model's end: its blocks resident, all below streamed; the largest first."""
        blocks = len(shape)
        sizes = (min(self.window, blocks),) if self.window_by == "fixed" else range(blocks, 0, -1)
        yield from (_ending_with(blocks, size) for size in sizes)

    def agree(self, submodels: Sequence[Submodel]) -> Sequence[Submodel]:
        if self.window_by == "device":
            return submodels
        return [min(submodels, key=_size)] * len(submodels)

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        """The probe, a window that stands for all with a branch, and the last window."""
        blocks, size = len(shape), _size(submodel)
        phases = [self._probe_phase(shape, work)] if self.threshold < 1 else []
        if blocks > 1:
            shorter = min(size, blocks - 1)
            window = range(blocks - 1 - shorter, blocks - 1)
            phases.append(self._train_phase(_WINDOW, window, blocks - shorter, shape, work))
        return (*phases, self._train_phase(_LAST, range(blocks - size, blocks), 0, shape, work))

    def _train_phase(self, name: str, window: range, later: int, shape: ModelShape, work: Workload) -> Phase:
        """A window whose branch has `later` adapters.

        Traced is a window that takes the same, with one adapter in its branch (blocks and adapters are alike), so that
        a plan needs few traces.  Beside it stand the other adapters below the window, and what GELU keeps of its inputs
        in the rest of the branch; the branch's adapters are counted below a later window, or in an earlier branch.
        """
        first, weight = min(window.start, _ALIKE_FROM), self._weight(shape)
        item = 8 if work.dtype == "float64" else 4
        adapter = item * (2 * self.bottleneck * shape.hidden + self.bottleneck + shape.hidden)
        kept = item * self.bottleneck * work.batch_size * work.length
        later = later if weight else 0
        return Phase(
            name,
            _ending_with(first + len(window), len(window)).blocks,
            work.batch_size,
            work.length,
            backward=True,
            outfit=Window(self.bottleneck, first, min(later, 1), weight),
            trained_elements=shape.head_elements,
            kept_bytes=(window.start - first) * adapter + max(0, later - 1) * kept,
        )

    def _probe_phase(self, shape: ModelShape, work: Workload) -> Phase:
        tokens = min(self.samples, work.batch_size * work.length)
        return Phase(
            _PROBE,
            Submodel.first(len(shape)).blocks,
            work.batch_size,
            work.length,
            backward=False,
            head=False,
            streamed=True,
            kept_bytes=4 * tokens**2 * 8 + tokens * shape.hidden * (4 + 2 * 8),  # Gram matrices; vectors, and centred
        )

    def _weight(self, shape: ModelShape) -> float:
        """λ."""
        if self.global_weight is not None:
            return self.global_weight
        return 0.1 if shape.architecture == "bert" else 0.2

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """Scalars: the smallest Q, L_start (none before the probe) and the training rounds that had a result."""
        smallest = min((_size(client.submodel) for client in clients), default=len(base.shape))
        scalars = {"window": smallest, "start": None if self.threshold < 1 else 0, "turn": 0}
        return replace(super().start(base, work, clients, seed, rounds), scalars=scalars)

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        if state.scalars["start"] is None:
            everything = Submodel.first(len(base.shape))
            return [Order(client.index, everything, kind=_PROBE) for client in clients]
        return [self._order(state, base.shape, client) for client in clients]

    def _order(self, state: State, shape: ModelShape, client: Client) -> Order:
        smallest, own = state.scalars["window"], _size(client.submodel)
        first = window_at(state.scalars["turn"], state.scalars["start"], smallest, len(shape)).start
        size = own if self.window_by == "device" else min(own, smallest)  # one that was refitted may hold less
        stop = min(first + size, len(shape))
        return Order(client.index, _ending_with(stop, stop - first), tensors=state.tensors)

    def verify(self, state: State, update: Received) -> None:
        super().verify(state, update)
        blocks = sum(name.endswith(".adapter.down.weight") for name in state.tensors)
        if state.scalars["start"] is None and not _are_scores(update.scalars.get("scores"), blocks):
            raise WireError(f"client {update.client}: its probe gave no similarity for each of the {blocks} blocks")

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        if state.scalars["start"] is None:
            scores = [(update.examples, update.scalars["scores"]) for update in received]
            return replace(state, scalars={**state.scalars, "start": first_tuned(scores, self.threshold)})
        combined = super().combine(state, base, received)
        return replace(combined, scalars={**state.scalars, "turn": state.scalars["turn"] + 1})

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        return self._probe(workplace) if workplace.job.kind == _PROBE else self._train(workplace)

    def _train(self, workplace: Workplace) -> Update:
        from testbed.model.bottleneck import fill_adapters
        from testbed.node.training import local_steps, update_of

        submodel = workplace.job.submodel
        built = workplace.build(submodel)
        later, weight = len(built.shape) - len(submodel.blocks), self._weight(built.shape)
        first = len(submodel.blocks) - _size(submodel)
        window = Window(self.bottleneck, first, later if weight else 0, weight)
        window.mount(built)
        fill_adapters(built, workplace.tensors)
        workplace.phase(_WINDOW if later else _LAST)
        trained = local_steps(workplace, built, loss=window.loss)
        return update_of(workplace, built.trainable(), trained)

    def _probe(self, workplace: Workplace) -> Update:
        """One pass over the base model: adapters that nothing has trained yet would add nothing."""
        import torch

        from testbed.task import inputs

        job = workplace.job
        built = workplace.build(job.submodel, replace(job.work, holding=STREAMED, checkpointing=False))
        built.model.eval()
        workplace.phase(_PROBE)
        batch = workplace.batch(0)
        listener = _Similarities(_rows(batch, self.samples, job.seed))
        first, *_ = modules = list(built.block_modules.values())
        handles = [first.register_forward_pre_hook(listener.entered, with_kwargs=True)]
        handles += [module.register_forward_hook(listener.left) for module in modules]
        with torch.no_grad():
            built.model.base_model(**inputs(built.model, batch))
        for handle in handles:
            handle.remove()
        return Update(scalars={"scores": listener.scores}, examples=len(workplace.shard))


class _Similarities:
    """Hooks that compare every block's output with what goes into the first one, and keep nothing else."""

    def __init__(self, rows: Tensor) -> None:
        self.scores: list[float] = []
        self._rows = rows
        self._embedded: Tensor | None = None

    def entered(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._embedded = self._look(inputs[0] if inputs else named["hidden_states"])

    def left(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._embedded is not None:
            found = self._look(output[0] if isinstance(output, tuple) else output)
            self.scores.append(float(linear_cka([self._embedded, found])[0, 1]))

    def _look(self, hidden: Tensor) -> Tensor:
        return centred_gram(hidden.flatten(0, 1)[self._rows])


def _rows(batch: Batch, samples: int, seed: int) -> Tensor:
    """Places (in the flattened batch) of at most so many tokens that are no padding, drawn by seed."""
    import torch

    from testbed.task import shuffled

    assert batch.attention_mask is not None  # texts only
    places = batch.attention_mask.flatten().nonzero().squeeze(1)
    drawn = sorted(shuffled(len(places), "similarity", seed)[:samples])
    return places[torch.tensor(drawn, device=places.device)]


def window_at(turn: int, start: int, size: int, blocks: int) -> range:
    """The blocks of the window of training round `turn`, from 0: it sweeps from `start` to the last block and again."""
    size = min(size, blocks - start)
    first = start + turn % (blocks - start - size + 1)
    return range(first, first + size)


def first_tuned(scores: Sequence[tuple[int, Sequence[float]]], threshold: float) -> int:
    """L_start, from each client's examples and its similarity of every block: the last block where none is below T."""
    blocks = range(len(scores[0][1]))
    total = sum(examples for examples, _ in scores)
    means = [sum(examples * own[block] for examples, own in scores) / total for block in blocks]
    return next((block for block in blocks if means[block] < threshold), blocks[-1])


def _ending_with(stop: int, size: int) -> Submodel:
    """The first `stop` blocks, of which the last `size` stay in memory."""
    return Submodel(tuple(Block(position, streamed=position < stop - size) for position in range(stop)))


def _size(submodel: Submodel) -> int:
    """Q of a choice: how many of its blocks stay in memory."""
    return sum(not block.streamed for block in submodel.blocks)


def _are_scores(found: Any, blocks: int) -> bool:
    numbers = isinstance(found, list) and len(found) == blocks and all(isinstance(one, (int, float)) for one in found)
    return numbers and all(math.isfinite(one) for one in found)
