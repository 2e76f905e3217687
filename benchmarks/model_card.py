"""What the quickstart base model is worth: the figures of its card.

    python benchmarks/model_card.py [--model DIR] [--epochs 3] [--write]

Held-out loss beside an untrained model's; centralised LoRA from the pretrained weights beside the same LoRA from random
weights, and beside a bag of words (TF-IDF and logistic regression on the same training texts).  The classes, the
training texts (up to 1,000 a class) and the held-out texts (100 a class, from modules that pretraining never saw) are
those of the default data set.  `--write` puts the table into the model's README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from testbed.baselines import bag_of_words, majority_class
from testbed.cache import cache_folder
from testbed.data import DataSet, DataSpec, load_data
from testbed.data_sources import Row
from testbed.environment import describe_machine
from testbed.evaluate import evaluate_snapshot
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Submodel, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.submodel import build
from testbed.plugins import make_method
from testbed.prepare import QUICKSTART, model_folder, tokenizer_of
from testbed.task import Example, Quality, batch_indices
from testbed.task import loss as task_loss

MARKS = ("<!-- figures -->", "<!-- /figures -->")


@dataclass(frozen=True)
class Recipe:
    """Centralised LoRA: all linear maps and the new head, AdamW, learning rate warmed up and falling linearly."""

    epochs: float = 1.0
    batch_size: int = 16
    length: int = 128
    rank: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.05
    seed: int = 0
    dtype: str = "float32"
    steps: int | None = None  # of the epochs, only so many (to try a change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=QUICKSTART)
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--length", type=int, default=Recipe.length)
    parser.add_argument("--dtype", default=Recipe.dtype, choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, help="stop after so many steps (to try a change)")
    parser.add_argument("--only", choices=["pretrained", "random"], help="one of the two fine-tunings")
    parser.add_argument("--write", action="store_true", help="put the table into the model's README.md")
    args = parser.parse_args()
    folder = model_folder(args.model)
    recipe = Recipe(
        epochs=args.epochs, learning_rate=args.learning_rate, length=args.length, dtype=args.dtype, steps=args.steps
    )
    table = measure(folder, recipe, args.only)
    print(table)
    if args.write:
        _write(folder / "README.md", table)


def measure(folder: Path, recipe: Recipe, only: str | None = None) -> str:
    """The card's table, in Markdown."""
    tokenizer = tokenizer_of(folder)
    data = load_data(DataSpec(length=recipe.length), tokenizer, cache_folder(), print)
    text = load_data(
        DataSpec(task=CAUSAL_LM, limit=1, length=128, held_out_limit=1000), tokenizer, cache_folder(), print
    )
    random_folder = _random_copy(folder)
    rows = []
    for name, source in (("pretrained", folder), ("random", random_folder)):
        if only in (None, name):
            loss = _language_loss(source, text)
            accuracy = _kept(source, data, recipe)
            rows.append((name, loss, accuracy))
    bag, majority = bag_of_words(data, recipe.seed), majority_class(data)
    same_tokens = bag_of_words(_cut(data, tokenizer), recipe.seed)
    lines = [
        "| from | held-out loss, nats per token | LoRA accuracy on held-out texts |",
        "|---|---|---|",
        *(f"| {name} weights | {loss:.3f} | {accuracy:.3f} |" for name, loss, accuracy in rows),
        f"| bag of words (TF-IDF, logistic regression), whole texts | – | {bag:.3f} |",
        f"| bag of words on the tokens that the model sees | – | {same_tokens:.3f} |",
        f"| majority class | – | {majority:.3f} |",
        "",
        _conditions(data, recipe),
    ]
    return "\n".join(lines)


def _cut(data: DataSet, tokenizer: Any) -> DataSet:
    """The same texts, cut to what the model sees of them."""

    def cut(rows: Sequence[Row], examples: Sequence[Example]) -> tuple[Row, ...]:
        return tuple(
            replace(row, text=tokenizer.decode(example.ids, skip_special_tokens=True))
            for row, example in zip(rows, examples, strict=True)
        )

    return replace(
        data, train_rows=cut(data.train_rows, data.train), held_out_rows=cut(data.held_out_rows, data.held_out)
    )


def _conditions(data: DataSet, recipe: Recipe) -> str:
    machine = describe_machine()
    return (
        f"{len(data.train)} training texts, {len(data.held_out)} held-out texts of {len(data.classes)} classes. LoRA: "
        f"rank {recipe.rank} on all linear maps and a new head, {recipe.epochs:g} epochs, batch {recipe.batch_size}, "
        f"length {recipe.length}, AdamW, learning rate {recipe.learning_rate:g} falling linearly, dropout "
        f"{recipe.dropout}, seed {recipe.seed}. Measured with torch "
        f"{torch.__version__} on {machine['cpu']}, {machine['cores']} cores ({platform.system()} "
        f"{machine['architecture']})."
    )


def _random_copy(folder: Path) -> Path:
    """A model of the same configuration with fresh weights."""
    target = cache_folder() / "model-card-random"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(target)
    return target


def _language_loss(folder: Path, text: DataSet) -> float:
    base = BaseModel.open(folder, ContentStore(cache_folder() / "content"), CAUSAL_LM, 2)
    work = Workload(CAUSAL_LM, 2, length=128)
    quality = evaluate_snapshot(None, base, Submodel.first(len(base.shape)), {}, work, text.held_out_shard())
    return quality.loss


def _kept(folder: Path, data: DataSet, recipe: Recipe) -> float:
    """The accuracy of one fine-tuning, from the cache where the same weights, data and recipe were measured before."""
    base = BaseModel.open(folder, ContentStore(cache_folder() / "content"), SEQUENCE_CLASSIFICATION, len(data.classes))
    what = json.dumps([base.blocks, base.outside, data.sha256, asdict(recipe)])
    kept = cache_folder() / f"model-card-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_lora(base, data, recipe)), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8")))


def _lora(base: BaseModel, data: DataSet, recipe: Recipe) -> float:
    """Held-out accuracy after centralised LoRA."""
    work = Workload(SEQUENCE_CLASSIFICATION, len(data.classes), recipe.batch_size, recipe.length, recipe.dtype)
    method = make_method("lora", {"rank": str(recipe.rank), "dropout": str(recipe.dropout)})
    state = method.start(base, work, [], recipe.seed, 1)
    built = build(
        base.config,
        base.fill_in(Submodel.first(len(base.shape))),
        base.store.path,
        base.outside,
        work,
        seed=recipe.seed,
    )
    method.mount(built, state.tensors)
    parameters = list(built.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    shard = data.shard(range(len(data.train)))
    steps = int(recipe.epochs * len(shard) / recipe.batch_size)
    began = time.monotonic()
    for step in range(min(steps, recipe.steps or steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        torch.manual_seed(step)
        rows = batch_indices(len(shard), recipe.batch_size, recipe.seed, 0, 0, step)
        loss = task_loss(built.model, shard.batch(rows, recipe.length, built.pad_token_id), work.task)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 in {steps, recipe.steps}:
            quality = _quality(method, base, built.trainable(), work, data)
            figures = {"step": step + 1, "of": steps, "loss": loss.item(), "held_out": quality.accuracy}
            print(json.dumps(figures), f"{time.monotonic() - began:.0f} s", flush=True)
    return quality.accuracy


def _quality(method, base, tensors, work, data: DataSet) -> Quality:  # type: ignore[no-untyped-def]  # noqa: ANN001
    values = {name: tensor.detach() for name, tensor in tensors.items()}
    return evaluate_snapshot(method, base, Submodel.first(len(base.shape)), values, work, data.held_out_shard())


def _write(readme: Path, table: str) -> None:
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0], 1)
    _, after = rest.split(MARKS[1], 1)
    readme.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
