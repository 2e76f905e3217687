"""What a method is: a client half and a server half, in one file and one class.  Nouns; torch only by name.

A method is a frozen dataclass: its fields are its settings, with defaults.  The round loop passes its state through it
and never looks inside; there is no branch on a method's name anywhere in this package.

    server (controller)                                client (node)
    start ─► state ─► order ─► jobs  ───────────────►  work(workplace) ─► update
               ▲                                            │
               └────────── combine ◄── received ◄───────────┘
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from testbed.errors import WireError

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace
    from testbed.task import Batch

CAUSAL_LM = "causal_lm"
SEQUENCE_CLASSIFICATION = "sequence_classification"
IMAGE_CLASSIFICATION = "image_classification"

ATTENTION = "attention"
FEED_FORWARD = "feed_forward"
PARTS = (ATTENTION, FEED_FORWARD)

RESIDENT = "resident"
MAPPED = "mapped"
STREAMED = "streamed"
HOLDINGS = (RESIDENT, MAPPED, STREAMED)

#: What methods do, in the order of the survey of the field (arXiv:2503.12016), and what it has no word for.
FAMILIES = (
    "LoRA, homogeneous",
    "LoRA, heterogeneous ranks",
    "LoRA, personalized",
    "LoRA, layers that fit",
    "LoRA, reused",
    "prompts",
    "adapters",
    "selective",
    "zeroth order",
    "width or depth, from scratch",
    "bounds",
)

#: The kind of a job that trains nothing: it tells the quality of a client's own model.
EVALUATE = "evaluate"
#: Before the names of tensors that the server keeps to itself, where they stand beside the model's.
SERVER = "server/"


@dataclass(frozen=True)
class Linear:
    """A linear map inside a block: y = W x with W of shape (outputs, inputs)."""

    path: str  # inside the block: "self_attn.q_proj"
    inputs: int
    outputs: int
    part: str  # ATTENTION or FEED_FORWARD


@dataclass(frozen=True)
class ModelShape:
    """Structure and sizes of a base model, without its weights."""

    architecture: str  # the configuration's model_type
    config: Mapping[str, Any]  # the Hugging Face configuration, as plain data
    hidden: int
    vocabulary: int
    block_prefix: str  # "model.layers": block p's tensors are named f"{block_prefix}.{p}.…"
    blocks: tuple[tuple[Linear, ...], ...]  # the linear maps of every block, by position
    block_elements: tuple[int, ...]  # parameters of every block
    part_elements: tuple[Mapping[str, int], ...]  # … of its separable parts, by position and part
    outside_elements: int  # embeddings, final norm and head, tied weights counted once
    head_elements: int = 0  # of a task head that the checkpoint does not have (new, and trained by most methods)
    stored_dtype: str = "float32"

    def __len__(self) -> int:
        return len(self.blocks)

    def linear_name(self, position: int, linear: Linear) -> str:
        """The map's name in the original model: "model.layers.7.self_attn.q_proj"."""
        return f"{self.block_prefix}.{position}.{linear.path}"


@dataclass(frozen=True)
class Block:
    """One position of a submodel.  A part that is not kept is the identity (only the residual stream passes)."""

    position: int
    content: str | None = None  # hash of the weights; None: those of the base model at this position
    parts: tuple[str, ...] = PARTS
    streamed: bool = (
        False  # in memory only while it computes, and the next one is read meanwhile; whatever the plan's holding
    )

    @property
    def whole(self) -> bool:
        return set(self.parts) == set(PARTS)


@dataclass(frozen=True)
class Submodel:
    """A *description* of the part one client trains: the kept blocks in their original order, and how wide they are.

    A width below 1 is for methods that slice every layer: it says which share of the model's widths is kept.
    `trained` is for methods that train on some of the kept blocks only: their positions; None: all.
    """

    blocks: tuple[Block, ...]
    width: float = 1.0
    trained: tuple[int, ...] | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(block.position for block in self.blocks)

    def keep(self, positions: Sequence[int]) -> Submodel:
        """The same, with only these positions kept."""
        wanted = set(positions)
        return replace(self, blocks=tuple(block for block in self.blocks if block.position in wanted))

    @classmethod
    def first(cls, count: int) -> Submodel:
        """The first `count` blocks, whole."""
        return cls(tuple(Block(position) for position in range(count)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Submodel:
        """What `dataclasses.asdict` made of one, after JSON has made lists of its tuples."""
        blocks = tuple(
            Block(block["position"], block["content"], tuple(block["parts"]), block.get("streamed", False))
            for block in data["blocks"]
        )
        trained = data.get("trained")
        return cls(blocks, data.get("width", 1.0), None if trained is None else tuple(trained))


@dataclass(frozen=True)
class Workload:
    """What passes through a submodel in one local step, and how weights are held: settled by the plan."""

    task: str = SEQUENCE_CLASSIFICATION
    labels: int = 2
    batch_size: int = 8
    length: int = 128
    dtype: str = "float32"
    holding: str = RESIDENT
    checkpointing: bool = False
    accelerator: str = "cpu"


@dataclass(frozen=True)
class Outfit:
    """What a method mounts on a submodel for a phase, and the loss it takes there, so that the footprint can trace it.

    Its fields say everything that the traced passes depend on: traces are remembered by them.
    """

    def trains(self, position: int) -> bool:  # noqa: ARG002 -- optional: most train on every block
        """Whether anything that it mounts on the block at `position` is trained."""
        return True

    def mount(self, built: Built) -> None:
        """Put the modules on, with any values: the trace needs their shapes and which of them are trained."""

    def loss(self, built: Built, batch: Batch) -> Tensor:
        """What is back-propagated: the task's own loss unless a method says otherwise."""
        return built.loss(batch)


@dataclass(frozen=True)
class Phase:
    """One phase of a job, as the footprint sees it; the prediction is the largest phase, by name."""

    name: str
    blocks: tuple[Block, ...]
    batch_size: int
    length: int
    backward: bool
    head: bool = True  # whether logits are computed
    streamed: bool = False  # blocks held one at a time, whatever the plan's holding
    outfit: Outfit | None = None  # what the method mounts; None: nothing
    writable: tuple[int, ...] = ()  # positions whose base weights are trained too
    outside_writable: bool = False  # whether the weights outside the blocks are trained too
    config: Mapping[str, Any] | None = None  # of another model than the base (a narrower one); None: the base's own
    trained_elements: int = 0  # trainable parameters beside outfit and writable weights (a new head)
    optimizer_slots: int = 2  # per trainable element, fp32 (AdamW: 2)
    kept_bytes: int = 0  # what the method itself holds on to, by its own arithmetic


@dataclass(frozen=True)
class Client:
    """One participant's data and share of a budget, as the plan placed it."""

    index: int
    device: str
    examples: int
    submodel: Submodel  # the largest of the method's choices that fits
    label_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    """All that a method knows between two rounds; checkpointed after each.  `scalars` is JSON."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    #: Content hash of the block now at each position of the global model; empty: the base model's own.
    blocks: tuple[str, ...] = ()
    #: What the server keeps to itself (moments, the last round's changes): no part of the model, and never sent.
    server: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def every_tensor(self) -> dict[str, Tensor]:
        """The model's tensors, and the server's own by "server/" and their name."""
        return {**self.tensors, **{f"{SERVER}{name}": tensor for name, tensor in self.server.items()}}


@dataclass(frozen=True)
class Order:
    """What one client is asked to do this round."""

    client: int
    submodel: Submodel
    kind: str = "train"  # the method's own word; a round may be a probe
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    contents: tuple[str, ...] = ()  # hashes of further files that the job reads: sent once, and kept on the device
    reads_base: bool = True  # False: `tensors` has every weight that the job needs, and nothing of the base is sent


@dataclass(frozen=True)
class Part:
    """A tensor, whole (`ranges` None) or the piece of it that lies in [start, stop) along each axis.

    A piece may go on around the end of an axis: `stop` is then larger than the axis is long, and element i of the
    piece lies at (start + i) mod size.  No element is in a piece twice.
    """

    tensor: Tensor
    ranges: tuple[tuple[int, int], ...] | None = None

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this is a tensor of that shape, or a piece of one."""
        if self.ranges is None:
            return tuple(self.tensor.shape) == tuple(shape)
        return (
            len(self.ranges) == len(shape)
            and all(_inside(*edges, size) for edges, size in zip(self.ranges, shape, strict=True))
            and tuple(self.tensor.shape) == tuple(stop - start for start, stop in self.ranges)
        )


def _inside(start: int, stop: int, size: int) -> bool:
    """Whether [start, stop) lies on an axis of that size, around its end or not."""
    return 0 <= start <= stop <= (size if start == size else start + size) and start <= size


@dataclass(frozen=True)
class Update:
    """What a client sends back, and what it keeps for its next job (`state`, private to the node)."""

    tensors: Mapping[str, Part] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    examples: int = 0
    state: Mapping[str, Tensor] | None = None


class Received(Protocol):
    """One client's update on the controller: spooled on disk, read tensor by tensor."""

    client: int
    examples: int
    scalars: Mapping[str, Any]
    names: tuple[str, ...]

    def read(self, name: str) -> Part: ...


@dataclass(frozen=True)
class Snapshot:
    """A model to evaluate or export: which blocks, with which tensors mounted; of one client, or global (None)."""

    submodel: Submodel
    tensors: Mapping[str, Tensor]
    client: int | None = None


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method.  Subclasses are frozen dataclasses whose fields are the settings."""

    #: What the method can be used for; others are refused in the plan.
    tasks: ClassVar[frozenset[str]] = frozenset({CAUSAL_LM, SEQUENCE_CLASSIFICATION})
    #: What it is used for when nobody says.
    default_task: ClassVar[str] = SEQUENCE_CLASSIFICATION
    #: Whether its model changes at all: a lower bound may train nothing.
    learns: ClassVar[bool] = True
    #: Where `testbed methods` lists it: one of `FAMILIES`, or another word, which is listed after them.
    family: ClassVar[str] = ""
    #: In a few words, for that list: what a client must hold, what travels in a round, what it is learned from.
    memory: ClassVar[str] = ""
    traffic: ClassVar[str] = ""
    data: ClassVar[str] = "its shard"
    #: How the contract suite's run on its tiny model must be, other than for most, to learn: fields of RunConfig.
    short_run: ClassVar[Mapping[str, float]] = {}

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:  # noqa: B027 -- optional: most methods accept all
        """Raise UsageError when the settings cannot work with this model or workload."""

    def choices(self, shape: ModelShape) -> Iterator[Submodel]:
        """Every submodel that a client could be given, largest first: by default only the whole model."""
        yield Submodel.first(len(shape))

    def agree(self, submodels: Sequence[Submodel]) -> Sequence[Submodel]:
        """What devices train that were fitted with these, once each is known: by default that, in the same order.

        There is at least one, and none may become larger than it was.
        """
        return submodels

    def promises(self, clients: int, participants: int, rounds: int) -> Sequence[str]:  # noqa: ARG002
        """What a run of so many rounds, each with so many of the clients, promises beyond its result: for the plan."""
        return ()

    @abstractmethod
    def phases(self, submodel: Submodel, shape: ModelShape, work: Workload) -> tuple[Phase, ...]:
        """What a job on this submodel does, phase by phase, for the footprint."""

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    @abstractmethod
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        """The state before the first of `rounds` rounds; the same for the same seed."""

    def begin(self, state: State, base: BaseModel, round_index: int) -> State:  # noqa: ARG002 -- optional
        """The state with which a round begins: where a stage begins, new blocks are made here.

        It must not depend on anything but its arguments; what it gives is forgotten if the round has no result.
        """
        return state

    def admits(self, state: State, base: BaseModel, client: Client) -> bool:  # noqa: ARG002 -- optional
        """Whether a client can take part in the round that has begun: a stage may be more than its device holds."""
        return True

    def order(self, state: State, base: BaseModel, clients: Sequence[Client], round_index: int) -> Sequence[Order]:  # noqa: ARG002
        """What each of this round's participants does; a client may be left out.

        By default all train their own submodel, with every tensor of the state.
        """
        return [Order(client.index, client.submodel, tensors=state.tensors) for client in clients]

    @abstractmethod
    def combine(self, state: State, base: BaseModel, received: Sequence[Received]) -> State:
        """The next state; `received` comes in client order and is never empty."""

    def verify(self, state: State, update: Received) -> None:
        """Raise WireError when an update is not what this method expects: by default, tensors of the state's shapes."""
        for name in update.names:
            if name not in state.tensors:
                raise WireError(f"client {update.client}: it sent {name!r}, which is no tensor of this run's state")
            part, whole = update.read(name), tuple(state.tensors[name].shape)
            if not part.fits(whole):
                raise WireError(
                    f"client {update.client}: {name} has the shape {tuple(part.tensor.shape)} over {part.ranges}, "
                    f"expected a piece of {whole}"
                )

    def snapshots(self, state: State, base: BaseModel) -> Sequence[Snapshot]:
        """What is evaluated: the global model with the state's tensors, unless a method evaluates per client."""
        contents = state.blocks or (None,) * len(base.shape)
        blocks = tuple(Block(position, content) for position, content in enumerate(contents))
        return (Snapshot(Submodel(blocks), state.tensors),)

    def evaluations(self, state: State, base: BaseModel, clients: Sequence[Client]) -> Sequence[Order]:  # noqa: ARG002
        """Orders by which clients evaluate what only they can put together, of those that keep something on their node.

        By default none: the controller evaluates the snapshots.  A job of such an order has the kind `EVALUATE`, and
        its shard is the held-out set; it answers with the scalars "loss" and "accuracy", and keeps nothing new.
        """
        return ()

    @abstractmethod
    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write the result in the form that users of the method expect (PEFT folder, model folder, safetensors)."""

    # ── client half, on the node (and on the controller, to evaluate) ──────────────────────────────────────────────
    @abstractmethod
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        """Put the method's own modules on a built submodel and fill them."""

    @abstractmethod
    def work(self, workplace: Workplace) -> Update:
        """Do one job."""
