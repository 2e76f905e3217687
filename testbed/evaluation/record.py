"""One evaluation: both models' figures beside each other, and its file in the run's folder.

`evaluations/<name>.json` of a run says what data it was (by hash), how the figures are defined, which round's model it
was (by hash), and the figures.  The name is made of what was asked, so that the same question asked again replaces its
answer, and another one does not.  The folder is written after a run has ended: it is no part of what the run vouches
for.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words, read_json, write_json
from testbed.evaluation.figures import Figure, Outcome, difference

if TYPE_CHECKING:
    from testbed.evaluation.subject import Subject
    from testbed.store import RunFolder

FORMAT = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class Question:
    """What is asked of a model: the kind, the data's record, the definition with its settings, what stands beside."""

    kind: str
    data: Mapping[str, Any]
    definition: Mapping[str, Any]
    examine: Callable[[Any], Outcome]
    reference: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What came out.  `base` and `difference` are None where there is no untuned model to compare with."""

    name: str
    made: str  # UTC
    kind: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    definition: Mapping[str, Any]
    figures: Mapping[str, Figure]
    base: Mapping[str, Figure] | None
    difference: Mapping[str, Figure] | None
    reference: Mapping[str, float]
    notes: Mapping[str, int]
    base_notes: Mapping[str, int]
    versions: Mapping[str, str]
    format: int = FORMAT

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Evaluation:
        figures = {
            key: None if stored[key] is None else {name: Figure(**each) for name, each in stored[key].items()}
            for key in ("figures", "base", "difference")
        }
        return cls(**{**stored, **figures})


def evaluate(
    subject: Subject, question: Question, *, with_base: bool = True, say: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Ask the trained model, then the untuned one, never both at once in memory."""
    say(f"evaluating {subject.name}")
    ours = question.examine(subject.tuned())
    theirs = None
    if with_base and subject.base is not None:
        say("evaluating the untuned base model on the same data")
        gc.collect()  # a mounted model and its hooks refer to each other
        theirs = question.examine(subject.base())
    return Evaluation(
        name=_name(subject, question),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        kind=question.kind,
        model=subject.about,
        data={**question.data, **ours.contents},
        definition=question.definition,
        figures=ours.figures,
        base=None if theirs is None else theirs.figures,
        difference=None if theirs is None else _differences(ours, theirs),
        reference=question.reference,
        notes=_counted(ours),
        base_notes={} if theirs is None else _counted(theirs),
        versions=_versions(),
    )


def keep(folder: RunFolder, evaluation: Evaluation) -> Path:
    """Write it into the run's folder, in place of an earlier answer to the same question."""
    path = folder.path / FOLDER / f"{evaluation.name}.json"
    with disk_errors_in_words(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_json(path, asdict(evaluation), sync=True)
    return path


def kept(folder: RunFolder) -> list[Evaluation]:
    """All evaluations of a run, oldest first."""
    found = [Evaluation.from_json(read_json(path)) for path in sorted((folder.path / FOLDER).glob("[!.]*.json"))]
    return sorted(found, key=lambda each: (each.made, each.name))


def _counted(outcome: Outcome) -> dict[str, int]:
    return {name: count for name, count in outcome.notes.items() if count}


def _differences(ours: Outcome, theirs: Outcome) -> dict[str, Figure]:
    both = ours.scores.keys() & theirs.scores.keys()
    found = {name: difference(ours.scores[name], theirs.scores[name]) for name in ours.scores if name in both}
    return {name: each for name, each in found.items() if each is not None}


def _name(subject: Subject, question: Question) -> str:
    model = {name: subject.about.get(name) for name in ("client", "state")}
    asked = {"model": model, "data": question.data, "definition": question.definition}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(str(question.data["name"])).stem).strip("_")[:40]
    return f"{question.kind}-{stem or 'data'}-{digest[:8]}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}
