"""What is evaluated: the model of a run, or of a folder, its tokenizer, and the untuned base model beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import ModelError, StoreError, UsageError
from testbed.evaluate import mounted
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Method, Submodel, Workload
from testbed.model import blocks
from testbed.model.checkpoint import BaseModel, read_config
from testbed.model.combine import state_hash
from testbed.model.prompt import PROMPT
from testbed.plugins import restore_method
from testbed.prepare import content_store, model_folder, tokenizer_of
from testbed.spelling import did_you_mean
from testbed.store import RunFolder
from testbed.trained import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "adapter_config.json"
#: What configurations call the tokens that a model takes.
_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
_UNLIMITED = 1 << 20  # tokens: tokenizers say such numbers, or greater ones, for "no limit"


@dataclass(frozen=True)
class Subject:
    """A model that can be loaded when its turn comes: two at once would take twice the memory."""

    name: str  # a run's id, or a folder
    task: str
    tokenizer: Any
    tuned: Callable[[], PreTrainedModel]
    base: Callable[[], PreTrainedModel] | None = None  # the same model untuned, where it is known
    classes: tuple[str, ...] = ()  # of a sequence classifier
    length: int = 0  # tokens of a classified text at most
    takes: int | None = None  # tokens at once by its configuration; a soft prompt takes some of them
    folder: RunFolder | None = None  # where a run's evaluations are kept
    about: Mapping[str, Any] = field(default_factory=dict)  # for the record, as JSON

    def check_tokens(self, length: int | None, stride: int | None = None) -> None:
        """Raise UsageError for more tokens than the model takes, before data or model are read."""
        if length is not None and self.takes is not None and length > self.takes:
            raise UsageError(_too_long(length, self.takes))
        most = length or self.takes
        if stride is not None and most is not None and stride > most:
            raise UsageError(f"--stride {stride}: expected 1 to {most}, the tokens that the model takes at once")

    def need(self, task: str, what: str) -> None:
        """Raise UsageError unless the model is for `task`."""
        if self.task == task:
            return
        if self.task == SEQUENCE_CLASSIFICATION:
            raise UsageError(
                f"{self.name} is a sequence classifier of {len(self.classes)} classes, without a language model's "
                f"head: {what} needs one; evaluate a run of `--task {CAUSAL_LM}`, or this one with --as "
                "multiple_choice on a file with the columns text and label"
            )
        raise UsageError(f"{self.name} is for the task '{self.task}', {what} is for '{task}'")


def of_run(runs_dir: Path, run: str, client: int | None = None, accelerator: str = "cpu") -> Subject:
    """The model of a run's newest checkpoint.

    Raises StoreError for a run without a checkpoint, and UsageError for one on images.
    """
    _check_accelerator(accelerator)
    folder = RunFolder.open(runs_dir, run)
    if client is not None:
        _check_client(folder, client)
    last = folder.load_checkpoint()
    if last is None:
        raise StoreError(
            f"run {folder.run_id} has no checkpoint yet: no round of it has ended; let it end one with "
            f"`testbed run-method --resume {folder.run_id}`"
        )
    state, rounds_done, _ = last
    config, work = folder.config, replace(Workload(**folder.plan["work"]), accelerator=accelerator)
    if work.task == IMAGE_CLASSIFICATION:
        raise UsageError(f"run {folder.run_id} classifies images; `testbed evaluate` is for texts")
    source = model_folder(config["model"])
    about = {
        "run": folder.run_id,
        "method": config["method"],
        "client": client,
        "round": rounds_done,
        "state": str(state_hash(state.every_tensor, state.scalars)),
        "evaluated_on_devices": _on_devices(config),
        "model": config["model"],
        "dtype": work.dtype,
        "accelerator": accelerator,
    }
    return Subject(
        name=folder.run_id,
        task=work.task,
        tokenizer=tokenizer_of(source),
        tuned=lambda: load(folder.run_id, folder.path.parent, client, accelerator),
        base=lambda: _untuned(source, work),
        classes=tuple(config.get("classes", ())),
        length=work.length,
        takes=_takes(source),
        folder=folder,
        about=about,
    )


def of_folder(name: str, accelerator: str = "cpu") -> Subject:
    """The causal language model in a Hugging Face folder, or a PEFT adapter in one, with its base model.

    Raises ModelError for a folder that holds neither.
    """
    _check_accelerator(accelerator)
    path = Path(name).expanduser()
    if (path / _ADAPTER).is_file():
        return _adapter(path, accelerator)
    folder = model_folder(name)
    _check_causal(folder)
    about = {"model": str(folder), "dtype": "float32", "accelerator": accelerator}
    return Subject(
        name, CAUSAL_LM, tokenizer_of(folder), lambda: _read(folder, accelerator), takes=_takes(folder), about=about
    )


def context_of(model: PreTrainedModel, tokenizer: Any, length: int | None = None) -> int:
    """Tokens that the model takes at once: its configuration's, else its tokenizer's, less a soft prompt's own.

    `length`: fewer, on request; UsageError when they are more.
    """
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in _POSITIONS]
    most = next((number for number in stated if number), None) or min(tokenizer.model_max_length, _UNLIMITED)
    prompt: Any = getattr(model, PROMPT, None)
    if prompt is not None:
        most -= prompt.places.stop - prompt.places.start
    if length is not None and not 2 <= length <= most:
        raise UsageError(_too_long(length, most))
    return length or int(most)


def _too_long(length: int, most: int) -> str:
    return f"--length {length}: this model takes from 2 to {most} tokens"


def _takes(folder: Path) -> int | None:
    """Positions by config.json, where it says so."""
    config = read_config(folder)
    inner = config.get("text_config") or config
    return next((int(inner[name]) for name in _POSITIONS if inner.get(name)), None)


def _check_client(folder: RunFolder, client: int) -> None:
    """Raise StoreError for a client that the run does not have, before its model is read."""
    known = sorted(each["index"] for each in folder.plan["clients"])
    if client not in known:
        clients = ", ".join(map(str, known))
        raise StoreError(f"run {folder.run_id} has no model of client {client}; its clients are {clients}")


def _untuned(source: Path, work: Workload) -> PreTrainedModel:
    base = BaseModel.open(source, content_store(), work.task, work.labels)
    return mounted(None, base, Submodel.first(len(base.shape)), {}, work).model.eval()


def _on_devices(config: Mapping[str, Any]) -> bool:
    """Whether what the run evaluated was put together on its devices, of parts that only they have."""
    method = restore_method(config["method"], config["settings"])
    return type(method).evaluations is not Method.evaluations


# ── folders ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _check_causal(folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    named = (read_config(folder).get("architectures") or ["none"])[0]
    if named not in KNOWN.values():
        raise ModelError(
            f"{folder}: its architecture is {named}, which has no language model's head; evaluate the run itself "
            "instead of what it exported: it knows its classes"
        )
    if blocks.bidirectional(blocks.skeleton(read_config(folder), CAUSAL_LM, 2, "float32")):
        raise ModelError(f"{folder}: {named} sees the tokens that it should predict")


def _read(folder: Path, accelerator: str) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model cannot be read ({' '.join(str(error).split())[:300]})") from None
    return model.to(accelerator).eval()


def _adapter(folder: Path, accelerator: str) -> Subject:
    try:
        config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / _ADAPTER}: not valid JSON ({error})") from None
    task = config.get("task_type")
    if task != "CAUSAL_LM":
        raise ModelError(
            f"{folder}: the adapter's task_type is {task}, `--model` takes CAUSAL_LM; evaluate the run itself instead "
            "of what it exported: it knows its classes"
        )
    base = model_folder(str(config.get("base_model_name_or_path")))
    _check_causal(base)

    def tuned() -> PreTrainedModel:
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(_read(base, accelerator), folder)
        return model.eval()

    about = {"model": str(folder), "base": str(base), "dtype": "float32", "accelerator": accelerator}
    return Subject(
        name=str(folder),
        task=CAUSAL_LM,
        tokenizer=tokenizer_of(base),
        tuned=tuned,
        base=lambda: _read(base, accelerator),
        takes=_takes(base),
        about=about,
    )


def _check_accelerator(name: str) -> None:
    import torch

    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name not in known:
        raise UsageError(f"--accelerator {name}: {did_you_mean(name, known)} on this machine")
