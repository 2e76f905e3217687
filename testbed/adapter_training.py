"""Make a pool of LoRA adapters: one for each slice of a data set, trained here, as PEFT folders with their cards.

Recipe ─► make_pool ─► <folder>/slice-1, slice-2, …, each whole or not there, and <folder>/README.md
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch

from testbed.adapter_pool import CONFIG, QUICKSTART
from testbed.cache import cache_folder
from testbed.data import DataSet, load_data
from testbed.data_sources import DOCSTRINGS, Row
from testbed.durable import write_json
from testbed.errors import TestbedError, UsageError
from testbed.method import SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model.adapters import LoraShape, export_peft, lora_tensors, mount_lora
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.submodel import build
from testbed.options import HELD_OUT_LIMIT, spec_of
from testbed.prepare import model_folder, tokenizer_of
from testbed.task import Example, Shard, batch_indices, evaluate_batches

if TYPE_CHECKING:
    from testbed.model.submodel import Built

MADE = "made.json"
_ALL = 10**9
_HELD_OUT = ("held_out_limit", HELD_OUT_LIMIT)


@dataclass(frozen=True)
class Recipe:
    """How the adapters of a pool are made: LoRA and a new head, trained on one slice of the data each.

    Classes are divided among the slices in their order, and each adapter learns to tell those of its slice apart; texts
    of a causal LM are dealt out in turn.  Initial values and batches follow from `seed`; the learning rate falls
    linearly to 0.
    """

    model: str = QUICKSTART
    data: Mapping[str, Any] = field(default_factory=dict)  # fields of data.DataSpec, as a run has them
    task: str = SEQUENCE_CLASSIFICATION
    slices: int = 4
    rank: int = 4
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 100
    batch_size: int = 16
    length: int = 64
    learning_rate: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("slices", "rank", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')}={getattr(self, name)}: expected at least 1")

    @property
    def alpha(self) -> float:
        return 2.0 * self.rank


@dataclass(frozen=True)
class Slice:
    """What one adapter is trained on, and the held-out texts by which its card judges it."""

    number: int
    classes: tuple[str, ...]  # empty for a causal LM
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]

    @property
    def name(self) -> str:
        return f"slice-{self.number}"


#: Called with the slice's name, the steps done and the last loss.
Progress = Callable[[str, int, float], None]


def make_pool(
    recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda _: None, progress: Progress = lambda *_: None
) -> tuple[Path, ...]:
    """Train the adapters that `folder` lacks; gives the folders of all.

    An adapter appears under its name when it is whole: after an interruption those that are missing are made.
    Raises UsageError when `folder` holds adapters of another recipe, or the data has too few classes for the slices.
    """
    names = [f"slice-{number}" for number in range(1, recipe.slices + 1)]
    missing = [name for name in names if not _is_made(folder / name, recipe)]
    if missing:
        slices, source = _slices(recipe, say)
        for each in slices:
            if each.name in missing:
                _make(recipe, each, source, folder, progress)
                say(f"{folder / each.name} is made")
        (folder / "README.md").write_text(_pool_card(recipe, folder, names), encoding="utf-8")
    return tuple(folder / name for name in names)


def _is_made(folder: Path, recipe: Recipe) -> bool:
    if not folder.exists():
        return False
    try:
        made = json.loads((folder / MADE).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        made = None
    if made != _plain(recipe):
        raise UsageError(
            f"{folder} is there already and was not made with these options; choose another folder, or remove it"
        )
    return True


def _plain(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return found


# ── … the texts ────────────────────────────────────────────────────────────────────────────────────────────────────
def _slices(recipe: Recipe, say: Callable[[str], None]) -> tuple[list[Slice], str]:
    """The slices, and in words where their texts come from."""
    data, source = _texts(recipe, say)
    groups = _class_groups(recipe, data) if data.classes else [()] * recipe.slices
    made = []
    for number, classes in enumerate(groups, 1):
        deal = slice(None) if classes else slice(number - 1, None, recipe.slices)
        train = _examples(data.train, data.train_rows, classes)[deal]
        held_out = _examples(data.held_out, data.held_out_rows, classes)
        if not train:
            raise UsageError(f"slices={recipe.slices}: there are {len(data.train)} training texts; ask for fewer")
        made.append(Slice(number, classes, train, held_out))
    return made, source


def _texts(recipe: Recipe, say: Callable[[str], None]) -> tuple[DataSet, str]:
    """Training texts that a run with the same data options gives to no client; where they are too few, its own."""
    spec = spec_of(dict(recipe.data), recipe.task, recipe.length)
    tokenizer = tokenizer_of(model_folder(recipe.model))
    of_clients = load_data(spec, tokenizer, cache_folder(), say)
    whole = load_data(replace(spec, per_class=_ALL, limit=None), tokenizer, cache_folder())
    known = {(row.prompt, row.text) for row in (*of_clients.train_rows, *of_clients.held_out_rows)}
    spare = whole.only(i for i, row in enumerate(whole.train_rows) if (row.prompt, row.text) not in known)
    counts = Counter(row.label if whole.classes else None for row in spare.train_rows)
    if min(counts[name] for name in whole.classes or (None,)) < recipe.batch_size * recipe.slices:
        return of_clients, "the training texts that a run with these data options divides among its clients"
    judged = replace(spare, held_out=of_clients.held_out, held_out_rows=of_clients.held_out_rows)
    return judged, "training texts that a run with these data options gives to no client"


def _class_groups(recipe: Recipe, data: DataSet) -> list[tuple[str, ...]]:
    """The classes of every slice: as many in each as can be, in their order."""
    count = len(data.classes)
    if count < 2 * recipe.slices:
        raise UsageError(
            f"slices={recipe.slices}: each needs two classes to tell apart, and this data has {count}; ask for at most "
            f"{count // 2}"
        )
    bounds = [count * number // recipe.slices for number in range(recipe.slices + 1)]
    return [data.classes[start:stop] for start, stop in pairwise(bounds)]


def _examples(examples: Sequence[Example], rows: Sequence[Row], classes: tuple[str, ...]) -> tuple[Example, ...]:
    """Those of a slice's classes, labelled by their place among them; all of them where there are no classes."""
    if not classes:
        return tuple(examples)
    chosen = zip(examples, rows, strict=True)
    return tuple(replace(e, label=classes.index(row.label)) for e, row in chosen if row.label in classes)


# ── … the training ─────────────────────────────────────────────────────────────────────────────────────────────────
def _make(recipe: Recipe, each: Slice, source: str, folder: Path, progress: Progress) -> None:
    """One adapter with its card, whole when it appears under its name."""
    partial = folder / f".{each.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    made = {
        "recipe": _plain(recipe),
        "classes": list(each.classes),
        "source": source,
        "texts": len(each.train),
        "held_out_texts": len(each.held_out),
        **_train(recipe, each, partial, progress),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(partial / MADE, made)
    (partial / "README.md").write_text(_card(recipe, each.name, made), encoding="utf-8")
    partial.rename(folder / each.name)


def _train(recipe: Recipe, each: Slice, folder: Path, progress: Progress) -> dict[str, float | None]:
    """Train an adapter and write it as a PEFT folder; its first and last loss and its quality on held-out texts."""
    store = ContentStore(cache_folder() / "content")
    work = Workload(recipe.task, max(2, len(each.classes)), recipe.batch_size, recipe.length)
    base = BaseModel.open(model_folder(recipe.model), store, recipe.task, work.labels)
    lora, seed = LoraShape(recipe.rank, recipe.targets), recipe.seed + each.number
    initial = lora_tensors(base.shape, lora, seed)
    built = build(base.config, base.fill_in(Submodel.first(len(base.shape))), store.path, base.outside, work, seed=seed)
    mount_lora(built, lora, recipe.alpha, 0.0)
    built.fill(initial)
    losses = _steps(recipe, each, built, seed, progress)
    export_peft(folder, base, built.trainable(), lora, recipe.alpha, 0.0, work)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = {**config, "base_model_name_or_path": recipe.model}  # not where it lies on this machine
    write_json(folder / CONFIG, named)
    figures: dict[str, float | None] = {"first_loss": losses[0], "last_loss": losses[-1], "held_out_accuracy": None}
    if each.held_out:
        shard = Shard.of(each.held_out, recipe.task, work.labels)
        quality = evaluate_batches(built.model, shard, recipe.batch_size, recipe.length, built.pad_token_id)
        figures["held_out_accuracy"] = quality.accuracy
    built.close()
    return figures


def _steps(recipe: Recipe, each: Slice, built: Built, seed: int, progress: Progress) -> list[float]:
    """The losses of all steps: AdamW without decay, the learning rate falling linearly, gradients clipped at 1."""
    shard = Shard.of(each.train, recipe.task, built.work.labels)
    parameters = list(built.trainable().values())
    descent = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(recipe.steps):
        for group in descent.param_groups:
            group["lr"] = recipe.learning_rate * (1 - step / recipe.steps)
        rows = batch_indices(len(shard), recipe.batch_size, seed, 0, each.number, step)
        value = built.loss(shard.batch(rows, recipe.length, built.pad_token_id))
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        descent.step()
        descent.zero_grad(set_to_none=True)
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise TestbedError(f"{each.name}: the loss of step {step} is not a number; try a smaller --learning-rate")
        progress(each.name, step + 1, losses[-1])
    return losses


# ── … the cards ────────────────────────────────────────────────────────────────────────────────────────────────────
def command_line(recipe: Recipe, folder: str) -> str:
    """The command that makes a pool: options that are the default are left out."""
    default = Recipe()
    words = ["testbed make-adapters"]
    for name in ("model", "task", "slices", "rank", "steps", "length", "learning_rate", "seed"):
        value = getattr(recipe, name)
        words += [f"--{name.replace('_', '-')} {value}"] if value != getattr(default, name) else []
    words += [f"--targets {','.join(recipe.targets)}"] if recipe.targets != default.targets else []
    data = {k: v for k, v in recipe.data.items() if k not in {"name", "columns"}} | dict(recipe.data.get("columns", {}))
    words += [f"--data {recipe.data['name']}"] if recipe.data.get("name", DOCSTRINGS) != DOCSTRINGS else []
    words += [f"--data-set {name}={value}" for name, value in data.items() if (name, value) != _HELD_OUT]
    return " ".join([*words, f"--output {folder}"])


def _card(recipe: Recipe, name: str, made: Mapping[str, Any]) -> str:
    task = f"tells {', '.join(made['classes'])} apart" if made["classes"] else "predicts the next token"
    about = (
        f"A LoRA adapter that {task}: rank {recipe.rank}, alpha {recipe.alpha:g}, on {', '.join(recipe.targets)} of "
        f"the model `{recipe.model}`, with a new head."
    )
    training = (
        f"Trained on {made['texts']} texts: {made['source']}. {recipe.steps} steps of {recipe.batch_size} texts of at "
        f"most {recipe.length} tokens, AdamW, learning rate {recipe.learning_rate:g} falling linearly, seed "
        f"{recipe.seed}. Loss {made['first_loss']:.3f} at the first step, {made['last_loss']:.3f} at the last. "
        f"Accuracy on {made['held_out_texts']} held-out texts: {_accuracy(made)}."
    )
    return _page(name, about, training)


def _pool_card(recipe: Recipe, folder: Path, names: Sequence[str]) -> str:
    made = {name: json.loads((folder / name / MADE).read_text(encoding="utf-8")) for name in names}
    first = made[names[0]]
    about = (
        f"Made by `{command_line(recipe, 'DIR')}`, one adapter for each slice of the data: rank {recipe.rank}, alpha "
        f"{recipe.alpha:g}, on {', '.join(recipe.targets)} of the model `{recipe.model}`."
    )
    heading = (
        "| adapter | classes | texts | first loss | last loss | accuracy on held-out texts |\n|---|---|---|---|---|---|"
    )
    rows = [f"| {name} | {_row_of(of)} |" for name, of in made.items()]
    origin = (
        f"The texts are {first['source']}; the base model's pretraining may have seen them. The same command gives the "
        f"same adapters on the same machine with as many threads ({first['threads']}) and the same packages (torch "
        f"{first['torch']}); elsewhere they differ by rounding."
    )
    return _page("A pool of LoRA adapters", about, "\n".join([heading, *rows]), origin)


def _row_of(made: Mapping[str, Any]) -> str:
    classes = ", ".join(made["classes"]) or "–"
    return " | ".join(
        [classes, str(made["texts"]), f"{made['first_loss']:.3f}", f"{made['last_loss']:.3f}", _accuracy(made)]
    )


def _accuracy(made: Mapping[str, Any]) -> str:
    return "not measured" if made["held_out_accuracy"] is None else f"{made['held_out_accuracy']:.3f}"


def _page(title: str, *paragraphs: str) -> str:
    """Markdown of lines that are not too long; tables as they are."""
    wrapped = [text if text.startswith("|") else fill(text, 120, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([f"# {title}", *wrapped]) + "\n"
