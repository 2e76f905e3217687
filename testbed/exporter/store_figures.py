"""What the store holds of every run, as series: for comparing methods side by side, from the report's own figures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.exporter.figures import Figures
from testbed.report import RunSummary, summarise
from testbed.store import RunFolder, run_folders

if TYPE_CHECKING:
    from testbed.report import DeviceSummary

logger = logging.getLogger(__name__)
UNREADABLE = "unreadable"
#: Names in a run's folder whose change means that a figure may have changed.
_TELLTALES = ("status.json", "rounds.jsonl", "reference.json", "plan.json", "results")


class Store:
    """The runs of a folder.  Each is summarised again only when its folder has changed."""

    def __init__(self, runs_dir: Path) -> None:
        self._runs_dir = runs_dir
        self._known: dict[str, tuple[tuple[int, ...], RunSummary | None]] = {}

    def look(self) -> Figures:
        """Every run as it stands now; one that cannot be read is counted, and told once in the log."""
        folders = run_folders(self._runs_dir)
        self._known = {path.name: self._summary(path) for path in folders}
        summaries = [summary for _, summary in self._known.values()]
        figures = result_figures([summary for summary in summaries if summary is not None])
        if None in summaries:
            figures.set("testbed_runs", summaries.count(None), state=UNREADABLE)
        return figures

    def _summary(self, path: Path) -> tuple[tuple[int, ...], RunSummary | None]:
        stamp = tuple(_changed(path / name) for name in _TELLTALES)
        folder = RunFolder(path)
        known = self._known.get(path.name)
        if known is not None and known[0] == stamp and not _may_have_died(known[1]):
            return known
        try:
            return stamp, summarise(folder)
        except (TestbedError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: left out, its record cannot be read (%s)", path, error)
            return stamp, None


def result_figures(summaries: Iterable[RunSummary]) -> Figures:
    """The series of these runs."""
    figures, states = Figures(), Counter[str]()
    for summary in summaries:
        states[summary.state] += 1
        _run(figures, summary)
        for device in summary.devices:
            _device(figures, summary.run, device)
    for state, count in states.items():
        figures.set("testbed_runs", count, state=state)
    return figures


def _run(figures: Figures, summary: RunSummary) -> None:
    run = summary.run
    figures.set("testbed_result_info", 1, run=run, **_facts(summary))
    for name, value in _numbers(summary).items():
        figures.set(f"testbed_result_{name}", value, run=run)
    if summary.energy is not None:
        gross = summary.energy.gross
        marks = {"valid": _word(gross.valid), "replayed": _word(gross.replayed)}
        figures.set("testbed_result_energy_joules", gross.joules, run=run, **marks)
    for reference, accuracy in vars(summary.reference).items():
        figures.set("testbed_result_reference_accuracy_ratio", accuracy, run=run, reference=reference)
    for phase, seconds in summary.phase_seconds.items():
        figures.set("testbed_result_phase_seconds", seconds, run=run, phase=phase)
    for direction, count in (("up", summary.bytes_up), ("down", summary.bytes_down)):
        figures.set("testbed_result_traffic_bytes", count, run=run, direction=direction)


def _facts(summary: RunSummary) -> dict[str, str | None]:
    emulated = None if summary.emulated is None else _word(summary.emulated)
    names = ("method", "model", "data", "task", "seed", "state")
    facts = {name: None if (fact := getattr(summary, name)) is None else str(fact) for name in names}
    return {**facts, "emulated": emulated}


def _word(fact: bool) -> str:
    return str(fact).lower()


def _numbers(summary: RunSummary) -> Mapping[str, float | None]:
    return {
        "accuracy_ratio": summary.accuracy,
        "loss": summary.loss,
        "rounds": summary.rounds,
        "seconds": summary.seconds,
        "failed_jobs": len(summary.failures),
    }


def _device(figures: Figures, run: str, device: DeviceSummary) -> None:
    known = {
        "peak_bytes": device.peak_worst_bytes,
        "predicted_peak_bytes": device.predicted_bytes,
        "budget_bytes": device.budget_bytes,
    }
    for name, value in known.items():
        figures.set(f"testbed_result_{name}", value, run=run, device=device.device)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _may_have_died(summary: RunSummary | None) -> bool:
    """A controller that was killed leaves its folder as it was."""
    return summary is not None and summary.state == "running"
