"""Six methods of at most 30 lines, one per seam of the interface that `lora` alone does not use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch

from methods._lora import LoraMethod
from testbed.method import Block, Order, Part, Phase, State, Submodel, Update
from testbed.model.combine import weighted_mean
from testbed.model.surgery import add_to_weight


@dataclass(frozen=True)
class Everything(LoraMethod):
    """What the probe methods share: all blocks, trained as `lora` trains them."""

    rank: int = 4

    def phases(self, submodel, shape, work):
        return (self.train_phase(submodel.blocks, shape, work),)

    def work(self, workplace):
        return self.train(workplace, workplace.job.submodel)


@dataclass(frozen=True)
class PrivateTensor(Everything):
    """A tensor kept private: only A travels, B stays on the node between rounds."""

    def order(self, state, base, clients, round_index):
        shared = {name: tensor for name, tensor in state.tensors.items() if "lora_B" not in name}
        return [Order(client.index, client.submodel, tensors=shared) for client in clients]

    def work(self, workplace):
        built = workplace.build(workplace.job.submodel)
        self.mount(built, {**workplace.tensors, **(workplace.state or {})})
        update = self.train_in("train", workplace, built)
        private = {name: part.tensor for name, part in update.tensors.items() if "lora_B" in name}
        shared = {name: part for name, part in update.tensors.items() if "lora_B" not in name}
        return replace(update, tensors=shared, state=private)


@dataclass(frozen=True)
class MergedStack(Everything):
    """A stack merged into the base: clients add every past round's adapters to their copy, and start fresh ones."""

    def start(self, base, work, clients, seed, rounds):
        return replace(super().start(base, work, clients, seed, rounds), scalars={"stacks": 0})

    def mount(self, built, tensors):
        for name in [name for name in tensors if name.startswith("stack.") and "lora_A" in name]:
            delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * (self.alpha / self.rank)
            add_to_weight(built, name.split(".", 2)[2].replace("lora_A.weight", "weight"), delta)
        super().mount(built, {name: tensor for name, tensor in tensors.items() if not name.startswith("stack.")})

    def combine(self, state, base, received):
        stack = state.scalars["stacks"]
        mean = weighted_mean({n: t for n, t in state.tensors.items() if not n.startswith("stack.")}, received)
        fresh = {name: torch.zeros_like(mean[name]) if "lora_B" in name else mean[name] for name in mean}
        merged = {f"stack.{stack}.{name}": tensor for name, tensor in mean.items() if "lora_" in name}
        return replace(state, tensors={**state.tensors, **fresh, **merged}, scalars={"stacks": stack + 1})


@dataclass(frozen=True)
class WidthSlice(Everything):
    """A width slice: client c holds half of the ranks, as index ranges of A and B."""

    def order(self, state, base, clients, round_index):
        return [
            Order(client.index, client.submodel, tensors=state.tensors, scalars={"half": client.index % 2})
            for client in clients
        ]

    def work(self, workplace):
        half = self.rank // 2
        start = workplace.job.scalars["half"] * half
        update = self.train(workplace, workplace.job.submodel)
        return replace(
            update,
            tensors={
                name: self._slice(name, part.tensor, start, start + half) for name, part in update.tensors.items()
            },
        )

    @staticmethod
    def _slice(name, tensor, start, stop):
        if "lora_A" in name:
            return Part(tensor[start:stop], ((start, stop), (0, tensor.shape[1])))
        if "lora_B" in name:
            return Part(tensor[:, start:stop], ((0, tensor.shape[0]), (start, stop)))
        return Part(tensor)


@dataclass(frozen=True)
class ScalarsOnly(Everything):
    """Scalars only, no back-propagation: two losses along a seeded direction of the head; the server replays it."""

    def phases(self, submodel, shape, work):
        return (Phase("forward", submodel.blocks, work.batch_size, work.length, backward=False, optimizer_slots=0),)

    def work(self, workplace):
        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        workplace.phase("forward")
        name = built.head_names[0]
        weight, seed = built.trainable()[name], workplace.job.round * 1000 + workplace.job.client
        direction = rademacher(weight.shape, seed)
        losses = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * 0.05)
                losses.append(float(built.loss(workplace.batch(0))))
                weight.sub_(direction, alpha=sign * 0.05)
        scalars = {"seed": seed, "slope": (losses[0] - losses[1]) / 0.1, "name": name}
        return Update(scalars=scalars, examples=len(workplace.shard))

    def combine(self, state, base, received):
        tensors = dict(state.tensors)
        for update in received:
            name, slope = update.scalars["name"], update.scalars["slope"]
            step = rademacher(tensors[name].shape, update.scalars["seed"])
            tensors[name] = tensors[name] - 0.05 * slope / len(received) * step
        return replace(state, tensors=tensors)


@dataclass(frozen=True)
class ProbeThenTrain(Everything):
    """Probe, then train: the first round only asks for losses; later ones train the half that had the highest."""

    def phases(self, submodel, shape, work):
        probe = Phase("probe", submodel.blocks, work.batch_size, work.length, backward=False, outfit=self.lora(shape))
        return (probe, *super().phases(submodel, shape, work))

    def order(self, state, base, clients, round_index):
        if "losses" not in state.scalars:
            return [Order(client.index, client.submodel, kind="probe", tensors=state.tensors) for client in clients]
        losses = state.scalars["losses"]
        worst = sorted(clients, key=lambda client: -losses.get(str(client.index), 0.0))[: max(1, len(clients) // 2)]
        return super().order(state, base, sorted(worst, key=lambda client: client.index), round_index)

    def work(self, workplace):
        if workplace.job.kind != "probe":
            return super().work(workplace)
        built = workplace.build(workplace.job.submodel)
        self.mount(built, workplace.tensors)
        workplace.phase("probe")
        with torch.no_grad():
            loss = float(built.loss(workplace.batch(0)))
        return Update(scalars={"probe": loss}, examples=len(workplace.shard))

    def combine(self, state, base, received):
        if "losses" in state.scalars:
            return super().combine(state, base, received)
        return replace(state, scalars={"losses": {str(u.client): u.scalars["probe"] for u in received}})


@dataclass(frozen=True)
class NewBlocks(Everything):
    """New blocks in mid-run: after the first round, every block is its old self mixed with its neighbour."""

    def order(self, state, base, clients, round_index):
        blocks = tuple(Block(p, content) for p, content in enumerate(state.blocks or base.blocks))
        return [Order(client.index, Submodel(blocks), tensors=state.tensors) for client in clients]

    def combine(self, state, base, received):
        state = super().combine(state, base, received)
        if state.blocks:
            return state
        return State(state.tensors, state.scalars, tuple(self._mixed(base, p) for p in range(len(base.shape))))

    @staticmethod
    def _mixed(base, position):
        own = base.tensors(base.blocks[position])
        other = base.tensors(base.blocks[(position + 1) % len(base.blocks)])
        return base.put({name: 0.9 * own[name] + 0.1 * other[name] for name in own})


PROBE_METHODS = (PrivateTensor, MergedStack, WidthSlice, ScalarsOnly, ProbeThenTrain, NewBlocks)


def rademacher(shape, seed):
    """±1 from a counter-based integer generator: the same on every CPU."""
    draw = Random(seed)
    return torch.tensor([draw.choice((-1.0, 1.0)) for _ in range(shape.numel())]).view(shape)
