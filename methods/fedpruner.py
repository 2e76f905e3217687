"""FedPruner: every client fine-tunes a pruned submodel that fits its own memory; blocks or their parts are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from methods._grouping import linear_cka, spectral_groups
from methods._lora import LoraMethod, random_positions, tensors_of
from methods._similarity import Probe, probe_blocks
from testbed.errors import UsageError
from testbed.method import (
    ATTENTION,
    FEED_FORWARD,
    PARTS,
    Block,
    Client,
    ModelShape,
    Order,
    Phase,
    Received,
    State,
    Submodel,
    Update,
    Workload,
)

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.node.workplace import Workplace

#: What is left out together: whole blocks (FedPruner), or attention and feed-forward apart (FedPruner+).
_UNITS: Mapping[str, tuple[tuple[str, ...], ...]] = {"block": (PARTS,), "part": ((ATTENTION,), (FEED_FORWARD,))}


@dataclass(frozen=True)
class FedPruner(LoraMethod):
    """Macro: group blocks by what they do; micro: keep one block of each group; train LoRA on what was kept.

    Paper: Wu et al., "Memory-Efficient Federated Fine-Tuning of LLMs via Layer Pruning" (arXiv:2508.17209), also
    "Prune to Fit".  What its readable sources say: each device runs the global model on a local batch and collects
    the blocks' outputs; similarity is CKA; the complete graph of blocks is cut into K groups by L = D - W; one block
    of each group is chosen by its importance, as a probability inside the group; LoRA is trained on the K kept
    blocks.  FedPruner+ does the same for attention and feed-forward apart.

    Our reading, where they are silent: CKA is linear, on up to 512 token vectors in float64; the K smallest
    eigenvectors and k-means; K is the largest that the plan's prediction admits; aggregation is the examples-weighted
    mean of each adapter over the clients that held its block, and blocks that nobody held keep their value.  The
    importance formula was not readable: see `importance`.  The paper runs the global model on a device that cannot
    hold it; here that pass is streamed, one block at a time.

    granularity  "block": FedPruner; "part": FedPruner+
    selection    "importance": the method; its ablations: "random", "even", "first", "last"
    importance   of a block in its group. "block_influence": 1 - cos(input, output), from the very pass that yields
                 the similarities; "leave_one_out": max(0, loss without it - loss), which streams about N²/2 blocks;
                 "adapter_norm": ‖B A‖ of the global adapters (a stand-in for gradient criteria, none at the start)
    pick         "sample" from the group's distribution, or "argmax"
    probe_every  rounds for which a client keeps its selection before it probes again
    samples      token vectors on which similarity is computed
    """

    family: ClassVar[str] = "LoRA, layers that fit"
    memory: ClassVar[str] = "the blocks that fit, trained through; a probe holds one"
    traffic: ClassVar[str] = "A and B of all down, of the kept blocks up"

    granularity: Literal["block", "part"] = "block"
    selection: Literal["importance", "random", "even", "first", "last"] = "importance"
    importance: Literal["block_influence", "leave_one_out", "adapter_norm"] = "block_influence"
    pick: Literal["sample", "argmax"] = "sample"
    probe_every: int = 1
    samples: int = 512

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def leaks(self) -> str:
        return "which blocks a client trains follows from its data" if self.selection == "importance" else ""

    def check(self, shape: ModelShape, work: Workload) -> None:
        super().check(shape, work)
        if self.probe_every < 1 or self.samples < 2:
            raise UsageError("settings probe_every and samples: expected at least 1 and at least 2")
        if self.granularity == "part" and any(set(parts) != set(PARTS) for parts in shape.part_elements):
            raise UsageError(
                f"setting granularity=part: attention and feed-forward cannot be told apart in "
                f"{shape.architecture} blocks; use granularity=block"
            )

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        """K whole blocks; or K attentions and K' feed-forwards, by the elements they hold."""
        if self.granularity == "block":
            yield from (_first({PARTS: count}) for count in range(len(shape), 0, -1))
            return
        counts = [(a, f) for a in range(1, len(shape) + 1) for f in range(1, len(shape) + 1)]
        submodels = [_first({(ATTENTION,): a, (FEED_FORWARD,): f}) for a, f in counts]
        yield from sorted(submodels, key=lambda submodel: _elements(submodel, shape), reverse=True)

    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        train = self.train_phase(submodel.blocks, shape, work)
        if not self._probes(submodel, len(shape)):
            return (train,)
        everything = Submodel.first(len(shape)).blocks
        grams = len(_UNITS[self.granularity]) * len(shape) * min(self.samples, work.batch_size * work.length) ** 2 * 8
        probe = Phase(
            "probe",
            everything,
            work.batch_size,
            work.length,
            backward=False,
            head=self.importance == "leave_one_out",
            streamed=True,
            outfit=self.lora(shape),
            kept_bytes=grams,
        )
        return (probe, train)

    def _probes(self, submodel: Submodel, blocks: int) -> bool:
        """Whether there is anything to choose, and the choice needs a pass over the model."""
        return self.selection == "importance" and any(count < blocks for count in self._counts(submodel).values())

    def _counts(self, submodel: Submodel) -> dict[tuple[str, ...], int]:
        units = _UNITS[self.granularity]
        return {unit: sum(set(unit) <= set(block.parts) for block in submodel.blocks) for unit in units}

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:
        return [self._order(state, base.shape, client, round_index) for client in clients]

    def _order(self, state: State, shape: ModelShape, client: Client, round_index: int) -> Order:
        counts = self._counts(client.submodel)
        if not self._probes(client.submodel, len(shape)):
            seed = f"{state.scalars['seed']}/{round_index}/{client.index}"
            kept = {unit: self._positions(len(shape), count, seed) for unit, count in counts.items()}
        elif (last := state.scalars["kept"].get(str(client.index))) and round_index - last["round"] < self.probe_every:
            kept = _kept_from_json(last["kept"])
        else:
            return Order(
                client.index,
                Submodel.first(len(shape)),
                kind="probe and train",
                tensors=state.tensors,
                scalars={"keep": [[list(unit), count] for unit, count in counts.items()], "round": round_index},
            )
        submodel = _submodel(kept)
        return Order(client.index, submodel, tensors=tensors_of(state, shape, submodel.positions))

    def _positions(self, blocks: int, count: int, seed: str) -> list[int]:
        """The ablations' choice of `count` positions, which needs no look at the model."""
        if self.selection == "random":
            return random_positions(blocks, count, seed)
        if self.selection == "even":
            return [index * blocks // count for index in range(count)]
        if self.selection == "last":
            return list(range(blocks - count, blocks))
        return list(range(count))

    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        return replace(super().start(base, work, clients, seed, rounds), scalars={"seed": seed, "kept": {}})

    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        selections = {
            str(update.client): {"round": update.scalars["probed"], "kept": update.scalars["kept"]}
            for update in received
            if "kept" in update.scalars
        }
        scalars = {**state.scalars, "kept": {**state.scalars["kept"], **selections}}
        return replace(super().combine(state, base, received), scalars=scalars)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def work(self, workplace: Workplace) -> Update:
        job = workplace.job
        if "keep" not in job.scalars:
            return self.train(workplace, job.submodel)
        kept = self._probe(workplace)
        workplace.phase("load")
        submodel = _submodel(kept, {block.position: block for block in job.submodel.blocks})
        return self.train(workplace, submodel, kept=_kept_to_json(kept), probed=job.scalars["round"])

    def _probe(self, workplace: Workplace) -> dict[tuple[str, ...], list[int]]:
        """What to keep, from a look at the whole model; nothing of that look is left when training begins."""
        workplace.phase("probe")
        keep = [(tuple(unit), count) for unit, count in workplace.job.scalars["keep"]]
        losses = self.importance == "leave_one_out"
        probe = probe_blocks(self, workplace, [unit for unit, _ in keep], self.samples, losses=losses)
        return {unit: self._select(workplace, probe, unit, count) for unit, count in keep}

    def _select(self, workplace: Workplace, probe: Probe, unit: tuple[str, ...], count: int) -> list[int]:
        """One member of each of `count` groups (FDLO), by its importance inside the group (IALS)."""
        job = workplace.job
        groups = spectral_groups(linear_cka(probe.grams[unit]), count, seed=job.seed)
        weights = self._importance(workplace, probe, unit)
        draw = Random(f"{job.seed}/{job.round}/{job.client}/{'+'.join(unit)}")
        return sorted(self._pick([(node, weights[node]) for node in group], draw) for group in groups)

    def _importance(self, workplace: Workplace, probe: Probe, unit: tuple[str, ...]) -> Sequence[float]:
        if self.importance == "adapter_norm":
            return adapter_norms(workplace.tensors, workplace.job.submodel, unit, probe.shape)
        if self.importance == "leave_one_out":
            return [max(0.0, loss - probe.loss) for loss in probe.losses_without[unit]]
        return probe.influence[unit]

    def _pick(self, group: Sequence[tuple[int, float]], draw: Random) -> int:
        """The chosen block of a group: by probability proportional to importance, uniform where all are 0."""
        total = sum(weight for _, weight in group)
        if self.pick == "argmax":
            return max(group, key=lambda member: (member[1], -member[0]))[0]
        if total <= 0:
            return draw.choice(group)[0]
        return draw.choices([node for node, _ in group], [weight for _, weight in group])[0]


def adapter_norms(
    tensors: Mapping[str, Any], submodel: Submodel, unit: tuple[str, ...], shape: ModelShape
) -> list[float]:
    """Frobenius norm of B A over a unit's adapted maps, by block."""
    norms = []
    for block in submodel.blocks:
        names = [shape.linear_name(block.position, li) for li in shape.blocks[block.position] if li.part in unit]
        pairs = [
            (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
            for name in names
            if f"{name}.lora_A.weight" in tensors
        ]
        norms.append(sum(float((b @ a).square().sum()) for a, b in pairs) ** 0.5)
    return norms


def _first(counts: Mapping[tuple[str, ...], int]) -> Submodel:
    return _submodel({unit: list(range(count)) for unit, count in counts.items()})


def _submodel(kept: Mapping[tuple[str, ...], Sequence[int]], blocks: Mapping[int, Block] | None = None) -> Submodel:
    """The blocks of which something is kept, each with the parts that are."""
    positions = sorted({position for chosen in kept.values() for position in chosen})
    parts = {
        position: tuple(part for part in PARTS if any(part in unit and position in kept[unit] for unit in kept))
        for position in positions
    }
    known = blocks or {}
    return Submodel(tuple(replace(known.get(p, Block(p)), position=p, parts=parts[p]) for p in positions))


def _elements(submodel: Submodel, shape: ModelShape) -> int:
    return sum(shape.part_elements[block.position][part] for block in submodel.blocks for part in block.parts)


def _kept_to_json(kept: Mapping[tuple[str, ...], Sequence[int]]) -> list[list[Any]]:
    return [[list(unit), list(positions)] for unit, positions in kept.items()]


def _kept_from_json(kept: Sequence[Sequence[Any]]) -> dict[tuple[str, ...], list[int]]:
    return {tuple(unit): list(positions) for unit, positions in kept}
