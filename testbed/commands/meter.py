"""`testbed meter DEVICE`: what its meters say now."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import json_option, one_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from testbed.metering import Tally, Watch


@click.command("meter")
@click.argument("device")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory that has the device.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="For how long  [default: until Ctrl-C].")
@json_option
def command(device: str, inventory: Path | None, seconds: float | None, as_json: bool) -> int:
    """Show the watts of every meter and rail of DEVICE as they are read, and at the end their mean, least and most.

    A board's own meter is read on the board, over SSH, by our code, which is sent there if it is not there yet.  With
    --json the figures at the end are printed, and nothing before.  Exit code 1 when a meter cannot be read.
    """
    from testbed.metering import Tally, Watch

    if seconds is not None and not math.isfinite(seconds):
        raise click.UsageError(f"--seconds {seconds}: expected a number")
    with Watch(one_device(inventory, device)) as watch:
        tallies = [Tally(meter) for meter in watch.meters]
        begun = time.monotonic()
        try:
            _follow(watch, tallies, seconds, quiet=as_json)
        except KeyboardInterrupt:  # how one stops looking
            click.echo(err=True)
        elapsed = time.monotonic() - begun
    if as_json:
        click.echo(json.dumps(_as_json(device, elapsed, tallies), indent=2))
    else:
        _print_end(tallies)
    return int(any(not tally.samples for tally in tallies))


def _follow(watch: Watch, tallies: Sequence[Tally], seconds: float | None, *, quiet: bool) -> None:
    """Count the samples; on a terminal in a table that is redrawn once a second, else in lines."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    begun = time.monotonic()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        for sample in watch.samples(seconds):
            if sample is not None:
                tallies[sample.meter].add(sample)
            elif not quiet:
                click.echo(f"{time.monotonic() - begun:6.1f} s  {_line(tallies)}")
        return
    with Live(_table(tallies), console=console, auto_refresh=False, transient=True) as live:
        for sample in watch.samples(seconds):
            if sample is not None:
                tallies[sample.meter].add(sample)
            else:
                live.update(_table(tallies), refresh=True)


def _line(tallies: Sequence[Tally]) -> str:
    return "; ".join(f"{tally.meter.name}: {_now(tally)}" for tally in tallies if tally.meter.error is None)


def _now(tally: Tally) -> str:
    if tally.error is not None or tally.last is None:
        return tally.error or "nothing yet"
    return ", ".join(f"{name} {watts:.3f} W" for name, watts in zip(tally.names, tally.values(tally.last), strict=True))


def _table(tallies: Sequence[Tally]) -> Table:
    from testbed.commands._table import table
    from testbed.quantities import number_text

    rows = []
    for tally in tallies:
        now = tally.values(tally.last) if tally.last is not None and tally.error is None else None
        for index, rail in enumerate(tally.names):
            told = (tally.means[index], tally.lowest[index], tally.highest[index]) if tally.samples else (None,) * 3
            figures = (now[index] if now is not None else None, *told)
            rows.append((tally.meter.name, rail, _where(tally), *map(number_text, figures)))
    headings = ("meter", "rail", "measured at", "watts", "mean", "least", "most")
    return table(headings, rows, numbers={"watts", "mean", "least", "most"})


def _where(tally: Tally) -> str:
    return f"{tally.meter.point} (replayed)" if tally.meter.replayed else tally.meter.point


def _print_end(tallies: Sequence[Tally]) -> None:
    from testbed.commands._table import show, table
    from testbed.quantities import number_text, seconds_text

    rows = []
    for tally in tallies:
        for index, rail in enumerate(tally.names if tally.samples else ()):
            figures = map(number_text, (tally.means[index], tally.lowest[index], tally.highest[index]))
            gap = seconds_text(tally.longest_gap_seconds)
            rows.append((tally.meter.name, rail, _where(tally), *figures, str(tally.samples), gap))
    if rows:
        headings = ("meter", "rail", "measured at", "mean W", "least W", "most W", "samples", "longest gap")
        show(table(headings, rows, numbers={"mean W", "least W", "most W", "samples", "longest gap"}))
    for tally in tallies:
        if tally.meter.error is not None:
            click.echo(tally.meter.error, err=True)
        elif tally.failures:
            last = f", the last one: {tally.error}" if tally.error else ""
            click.echo(f"{tally.meter.name}: {tally.failures} readings failed{last}", err=True)


def _as_json(device: str, elapsed: float, tallies: Sequence[Tally]) -> dict[str, Any]:
    return {"device": device, "seconds": elapsed, "meters": [_meter_as_json(tally) for tally in tallies]}


def _meter_as_json(tally: Tally) -> dict[str, Any]:
    meter = tally.meter
    figures = zip(tally.names, tally.means, tally.lowest, tally.highest, strict=True) if tally.samples else ()
    return {
        "meter": meter.name,
        "point": meter.point or None,
        "replayed": meter.replayed,
        "total_rails": list(meter.total_rails),
        "rails": [
            {"rail": rail, "mean_watts": mean, "lowest_watts": least, "highest_watts": most}
            for rail, mean, least, most in figures
        ],
        "samples": tally.samples,
        "longest_gap_seconds": tally.longest_gap_seconds,
        "failures": tally.failures,
        "error": meter.error or tally.error,
    }
