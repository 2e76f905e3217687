"""Suites of lm-evaluation-harness (MMLU, BBH, GSM8K, …) over a model that is in memory already.

Task definitions come from `--suites-folder`, else from the harness.  Data files that a definition names
(`dataset_path: json`, `data_files:`) stand relative to that folder.  Nothing is downloaded unless that is asked for:
data of the Hugging Face hub must be in its cache.  Seeds are the harness' defaults, and nothing is sampled but where a
task's definition says so.
Source: EleutherAI/lm-evaluation-harness, `lm_eval.simple_evaluate` and `lm_eval.models.huggingface.HFLM` (0.4.13).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from testbed.errors import DataError, ModelError, TestbedError, UsageError
from testbed.evaluation.figures import MEAN, SHARE, Figure, Outcome, Scores, figure
from testbed.evaluation.generation import keeps_cache

DEFINITION = "as lm-evaluation-harness defines it"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_NORMAL = 1.959964  # two-sided, 95 %
#: The harness resamples medians and the like so often; a mean's standard error it computes.
_RESAMPLINGS = 1000


@dataclass(frozen=True)
class Suites:
    """Which tasks or groups of the harness, and how."""

    names: tuple[str, ...]
    folder: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    online: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("--suite: expected the names of tasks, such as --suite mmlu,bbh")
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(f"--suites-folder {self.folder}: there is no such folder")


def examine(model: Any, tokenizer: Any, suites: Suites, most: int, batch_size: int) -> Outcome:
    """The harness' figures, one for each task and metric; raises DataError for tasks that it cannot find or load."""
    with _prepared(suites):
        lm_eval = _harness()
        manager = _manager(suites)
        try:
            found = lm_eval.simple_evaluate(
                model=_wrapped(model, tokenizer, most, batch_size),
                tasks=list(suites.names),
                task_manager=manager,
                num_fewshot=suites.few_shot,
                limit=suites.limit,
                batch_size=batch_size,
                bootstrap_iters=_RESAMPLINGS,
                log_samples=True,
            )
        except TestbedError:
            raise
        except Exception as error:  # task definitions are other people's code and data: anything may come
            raise DataError(_in_words(suites, error)) from error
    scores = {name: each for task in found["samples"] for name, each in _scores(found, task)}
    figures = {name: each for task in found["results"] for name, each in _figures(found, task, scores)}
    return Outcome(figures, scores, contents={"tasks": {task: _content(found, task) for task in found["samples"]}})


def versions_of(suites: Suites) -> dict[str, Any]:
    """What must be the same for two results of a suite to be comparable."""
    from importlib.metadata import version

    return {
        "suites": list(suites.names),
        "suites_folder": None if suites.folder is None else str(suites.folder),
        "few_shot": suites.few_shot,
        "limit": suites.limit,
        "lm_eval": version("lm_eval"),
    }


def require() -> None:
    """Raise UsageError where the harness is not installed."""
    with _prepared(None):
        _harness()


# ── what surrounds the harness ─────────────────────────────────────────────────────────────────────────────────────
def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError as error:
        raise UsageError(
            f"--suite needs lm-evaluation-harness, which is not installed ({error}): "
            "pip install 'edge-testbed[lm-eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells what it does in hundreds of lines
    return lm_eval


@contextlib.contextmanager
def _prepared(suites: Suites | None) -> Iterator[None]:
    """Offline, in the suites' folder, and with whatever the harness prints on standard error."""
    folder = suites.folder if suites and suites.folder else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if suites is None or not suites.online:
            stack.enter_context(_offline())
        if folder is not None:
            stack.enter_context(contextlib.chdir(folder))
        yield


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The libraries read the environment once, when they are loaded: those that are loaded are told too."""
    import huggingface_hub.constants as hub

    before, was = {name: os.environ.get(name) for name in _OFFLINE}, hub.HF_HUB_OFFLINE
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    _tell(offline=True)
    try:
        yield
    finally:
        _tell(offline=was)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _tell(*, offline: bool) -> None:
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = offline


def _manager(suites: Suites) -> Any:
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path="." if suites.folder else None, include_defaults=False)
    if all(name in own.all_tasks for name in suites.names):
        return own  # the harness' own 14,000 definitions take seconds to list
    manager = TaskManager(include_path="." if suites.folder else None)
    for name in suites.names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            question = f"did you mean {' or '.join(near)}? " if near else ""
            where = (
                f"neither {suites.folder} nor the harness has it" if suites.folder else "the harness does not have it"
            )
            raise DataError(f"--suite {name}: {where}; {question}`lm-eval ls tasks` lists the harness' own")
    return manager


def _wrapped(model: Any, tokenizer: Any, most: int, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    probe = list(range(min(4, model.config.get_text_config().vocab_size)))
    if not keeps_cache(model, probe):
        model.generate = _refuse  # the harness generates with a cache only, and would get another model's answers
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=most, batch_size=batch_size)


def _refuse(*_: Any, **__: Any) -> Any:
    raise ModelError(
        "the harness generates with a cache of keys and values, which this model (one with a soft prompt, for "
        "instance) cannot keep: leave tasks that generate out, or use --as exact_match, which can do without"
    )


def _in_words(suites: Suites, error: Exception) -> str:
    said = " ".join(str(error).split())[:400]
    offline = type(error).__name__ in {"OfflineModeIsEnabled", "LocalEntryNotFoundError"} or "offline" in said.lower()
    way = (
        "its data is not in the cache of the Hugging Face hub; allow a download with --online, or name data files of "
        "your own in a definition in --suites-folder"
        if offline or isinstance(error, ConnectionError)
        else "check the definition, and that its data files are where it says"
    )
    return f"--suite {','.join(suites.names)}: {type(error).__name__}: {said}; {way}"


# ── from its results ───────────────────────────────────────────────────────────────────────────────────────────────
def _scores(found: Mapping[str, Any], task: str) -> Iterator[tuple[str, Scores]]:
    """The items behind those figures of a task that are a mean of numbers."""
    for key, value in found["results"][task].items():
        metric, _, filtered = key.partition(",")
        numbers = [row.get(metric) for row in found["samples"][task] if row.get("filter") == filtered]
        if not filtered or not numbers or not all(isinstance(each, int | float) for each in numbers):
            continue
        totals = [float(each) for each in numbers]
        if math.isclose(sum(totals) / len(totals), value, abs_tol=1e-9):
            kind = SHARE if set(totals) <= {0.0, 1.0} else MEAN
            yield _name(task, metric, filtered), Scores(totals, kind=kind)


def _figures(found: Mapping[str, Any], task: str, scores: Mapping[str, Scores]) -> Iterator[tuple[str, Figure]]:
    results = found["results"][task]
    count = _count(found, task)
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name, error = _name(task, metric, filtered), results.get(f"{metric}_stderr,{filtered}")
        if name in scores:
            yield name, figure(scores[name])
        elif isinstance(error, int | float):
            yield name, Figure(value, error, value - _NORMAL * error, value + _NORMAL * error, count)
        else:
            yield name, Figure(value, None, None, None, count)


def _content(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What was asked, by content: documents, prompts and answers, by the harness' own hashes."""
    parts = ("doc_hash", "prompt_hash", "target_hash")
    asked = sorted({tuple(str(row[part]) for part in parts) for row in found["samples"][task]})
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return {"sha256": digest, "items": _count(found, task), "version": found["versions"].get(task)}


def _count(found: Mapping[str, Any], task: str) -> int:
    """Items of a task, or of all tasks of a group."""
    counts = found["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_count(found, each) for each in found["group_subtasks"].get(task, ()))


def _name(task: str, metric: str, filtered: str) -> str:
    """As "arc_easy acc", or "gsm8k exact_match (strict-match)"."""
    return f"{task} {metric}" if filtered == "none" else f"{task} {metric} ({filtered})"
