"""The survey's baselines side by side: what the runs of an experiment came to, by family, as Markdown.

    testbed experiment experiments/baselines.yaml      (the runs: an hour or two on two cores; Ctrl-C, and go on later)
    python benchmarks/baselines.py [EXPERIMENT] [--runs DIR] [--docs docs/methods]

By column: *seeds* that were run; *clients* that the plan let take part; *accuracy* and *loss* on the held-out set after
the last round, mean and standard deviation over seeds (of methods with personal models: the mean over their clients');
*peak* is the largest measured estimate of any job, the empty trainer's own memory included; *off* is how far the
prediction was from it; *up* and *down* are what one client sent, and its job carried to it, in a round; *deployed* is
what devices lacked and were sent beside jobs, in the whole run.  With --docs the tables are written into these pages,
between their marks.  What was not run yet is told on standard error.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.experiments.cells import DONE, standings
from testbed.experiments.experiment import load_experiment
from testbed.method import EVALUATE, FAMILIES
from testbed.plugins import find_method
from testbed.quantities import bytes_text
from testbed.report import summarise

if TYPE_CHECKING:
    from testbed.experiments.cells import Standing
    from testbed.report import RunSummary
    from testbed.store import RunFolder

#: Where rows go whose label is not the method's name: the same method with another server.
VARIED = "server"
_MARKS = re.compile(r"<!-- measured: (.+?) -->\n.*?<!-- /measured -->", re.DOTALL)
HEADINGS = ("method", "seeds", "clients", "accuracy", "loss", "peak", "off", "up", "down", "deployed")


@dataclass(frozen=True)
class Outcome:
    """One run, as far as the table goes."""

    summary: RunSummary
    up_bytes: float  # of a job, evaluations left out
    down_bytes: float

    @property
    def peak_bytes(self) -> int:
        return max((device.peak_worst_bytes or 0 for device in self.summary.devices), default=0)

    @property
    def error(self) -> float | None:
        """Of the prediction, at the job with the highest peak."""
        peaks = [device for device in self.summary.devices if device.peak_worst_bytes]
        return max(peaks, key=lambda device: device.peak_worst_bytes or 0).prediction_error if peaks else None


def outcome_of(folder: RunFolder) -> Outcome:
    jobs = [result.measurement for result in folder.results() if result.kind != EVALUATE]
    up, down = (
        statistics.fmean(sizes)
        for sizes in zip(*((job.bytes_up or 0, job.bytes_down or 0) for job in jobs), strict=True)
    )
    return Outcome(summarise(folder), up, down)


def row(label: str, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    first = outcomes[0].summary
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return (
        f"`{label}`",
        str(len(outcomes)),
        f"{first.clients - sum(device.refused for device in first.devices)} of {first.clients}",
        spread([outcome.summary.accuracy for outcome in outcomes]),
        spread([outcome.summary.loss for outcome in outcomes]),
        bytes_text(max(outcome.peak_bytes for outcome in outcomes)),
        f"{100 * max(errors, key=abs):+.1f} %" if errors else "–",
        bytes_text(round(statistics.fmean(outcome.up_bytes for outcome in outcomes))),
        bytes_text(round(statistics.fmean(outcome.down_bytes for outcome in outcomes))),
        bytes_text(round(statistics.fmean(o.summary.deployed_bytes or 0 for o in outcomes))),
    )


def spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.fmean(known):.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def tables(cells: Sequence[Standing]) -> dict[str, str]:
    """A Markdown table for each family, and one ("server") of methods that are not run as they are by default."""
    found: dict[str, dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for standing in cells:
        if standing.state == DONE and standing.run is not None:
            cell = standing.cell
            varied = cell.label != cell.config.method
            family = VARIED if varied else find_method(cell.config.method).family
            found[family][cell.row].append(outcome_of(standing.run))
    return {family: table(members) for family, members in found.items()}


def table(members: Mapping[str, Sequence[Outcome]]) -> str:
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row(label, found))} |" for label, found in members.items())])


def write_into(page: Path, made: Mapping[str, str]) -> None:
    """Put the tables where the page has marks for them."""

    def measured(match: re.Match[str]) -> str:
        family = match[1]
        return f"<!-- measured: {family} -->\n{made[family]}\n<!-- /measured -->" if family in made else match[0]

    text = page.read_text(encoding="utf-8")
    page.write_text(_MARKS.sub(measured, text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent.parent / "experiments" / "baselines.yaml"
    parser.add_argument("experiment", nargs="?", type=Path, default=default)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    cells = standings(load_experiment(options.experiment).cells, options.runs)
    made = tables(cells)
    for family in [*FAMILIES, *sorted(made.keys() - set(FAMILIES))]:
        if family in made:
            print(f"\n### {family}\n\n{made[family]}")
    for page in sorted(options.docs.glob("*.md")) if options.docs else ():
        write_into(page, made)
    if missing := [standing.cell.title for standing in cells if standing.state != DONE]:
        print(f"not run yet: {'; '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
