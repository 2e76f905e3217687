"""The model that a run trained, for whoever uses it elsewhere: its export, with a card that says what it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words
from testbed.errors import StoreError, WireError
from testbed.node.tensors import read_tensor_header
from testbed.quantities import bytes_text, number_text, seconds_text
from testbed.report import RunSummary, summarise
from testbed.run_record import FINISHED

if TYPE_CHECKING:
    from testbed.store import RunFolder

CARD = "README.md"
PEFT, WHOLE, TENSORS = "PEFT adapter", "model", "tensors"
_CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
}


def why_none(folder: RunFolder) -> str | None:
    """Why a run has no trained model to give; None where it has one."""
    if folder.status.state != FINISHED:
        return f"run {folder.run_id} is {folder.status.state}: only a finished run has a trained model"
    if not any(path.suffix == ".safetensors" for path in _files(folder)):
        return f"run {folder.run_id} has no tensors in {folder.path / 'export'}"
    return None


def export_model(folder: RunFolder, target: Path) -> list[Path]:
    """Copy a run's trained model to the folder `target`, with its card; gives its files.

    Raises StoreError for a run without one, and for a file that is not complete: nothing is left there then.
    """
    if (why := why_none(folder)) is not None:
        raise StoreError(why)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with disk_errors_in_words(target):
        try:
            shutil.copytree(folder.path / "export", partial)
            check_complete(partial)
            (partial / CARD).write_text(card(folder), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def kind_of(export: Path) -> str:
    """What others can do with an export, by its files."""
    if (export / "adapter_config.json").is_file():
        return PEFT
    return WHOLE if (export / "config.json").is_file() else TENSORS


def check_complete(export: Path) -> None:
    """Raise StoreError where a file that the export's kind needs is missing, or one is cut off."""
    needed = {
        PEFT: ("adapter_config.json", "adapter_model.safetensors"),
        WHOLE: ("config.json",),
        TENSORS: (),
    }[kind_of(export)]
    for name in needed:
        if not (export / name).is_file():
            raise StoreError(f"{export / name} is missing: the model is not complete")
    try:
        for path in export.rglob("*.safetensors"):
            read_tensor_header(path)
    except WireError as error:
        raise StoreError(f"the model is not complete: {error}") from None


def card(folder: RunFolder) -> str:
    """The model card: what it is, how it is loaded, what it was trained on, and the figures of its run."""
    summary, config = summarise(folder), folder.config
    kind = kind_of(folder.path / "export")
    sections = [
        f"# {summary.method} on {summary.model}",
        f"A {kind} that was trained by federated fine-tuning in run `{summary.run}` of the edge testbed.",
        "## Loading it",
        _loading(folder, kind),
        "## What it was trained on",
        _table(_origin(summary, config, folder.record.versions)),
        "## Settings",
        _table({name: json.dumps(value) for name, value in (config.get("settings") or {}).items()}),
        "## Figures of the run",
        _table(_figures(summary)),
        "## Licence",
        "Not known here: that of the base model and of the data apply. This card grants none.",
    ]
    return "\n\n".join(sections) + "\n"


def _loading(folder: RunFolder, kind: str) -> str:
    task = str(folder.config.get("task"))
    of = _CLASSES.get(task, "AutoModel")
    labels = len(folder.config.get("classes") or ())
    more = f", num_labels={labels}" if labels and task != "causal_lm" else ""
    if kind == PEFT:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {of}",
            "",
            f'base = {of}.from_pretrained("BASE MODEL"{more})',
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        ]
        return "\n".join(["```python", *lines, "```", "", _base(str(folder.config.get("model")))])
    if kind == WHOLE:
        lines = [f"from transformers import {of}", "", f'model = {of}.from_pretrained("THIS FOLDER")']
        return "\n".join(["```python", *lines, "```"])
    lines = ["import testbed", "", f'model = testbed.load("{folder.run_id}")  # beside the folder runs/']
    return "\n".join(
        [
            "No library knows this kind of module: the tensors are named by the module that they belong to, and the",
            "testbed builds the model from the run's folder.",
            "",
            "```python",
            *lines,
            "```",
        ]
    )


def _base(model: str) -> str:
    if "/" in model:
        return f"BASE MODEL was {model} on the machine of the run."
    return f'BASE MODEL comes with edge-testbed: `testbed.prepare.model_folder("{model}")` says where it is.'


def _origin(summary: RunSummary, config: Any, versions: Any) -> dict[str, str]:
    packages = versions.get("packages") or {}
    classes = config.get("classes") or ()
    return {
        "base model": f"{summary.model} (weights outside the blocks: SHA-256 {versions.get('model') or 'unknown'})",
        "data": f"{summary.data} (SHA-256 {config.get('data_hash') or 'unknown'})",
        "task": str(summary.task),
        **({"classes, in their order": ", ".join(classes)} if classes else {}),
        "clients": f"{summary.clients}, of which {len(summary.refusals)} refused",
        "rounds": str(summary.rounds),
        "seed": str(summary.seed),
        "software": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }


def _figures(summary: RunSummary) -> dict[str, str]:
    reference = summary.reference
    return {
        "accuracy": number_text(summary.accuracy),
        "loss": number_text(summary.loss),
        "accuracy of the majority class": number_text(reference.majority),
        "accuracy of a bag of words": number_text(reference.bag_of_words),
        "accuracy without fine-tuning": number_text(reference.no_fine_tuning),
        "seconds of all rounds": seconds_text(summary.seconds),
        "highest peak of a device": bytes_text(summary.peak_worst_bytes),
        "devices": {True: "emulated", False: "boards", None: "boards and emulated"}[summary.emulated],
    }


def _table(rows: dict[str, str]) -> str:
    if not rows:
        return "None."
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _files(folder: RunFolder) -> list[Path]:
    return [path for path in (folder.path / "export").rglob("*") if path.is_file()]
