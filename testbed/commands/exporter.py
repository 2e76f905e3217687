"""`testbed exporter`: the results of all runs and the state of the devices, for Prometheus."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import inventory_options, read_inventory, runs_option

if TYPE_CHECKING:
    from types import FrameType

#: Seconds between two looks.  A run's folder is read again only where it has changed.
_RUNS_EVERY, _DEVICES_EVERY = 10.0, 30.0


@click.command("exporter")
@inventory_options
@runs_option
@click.option(
    "--address", metavar="[HOST:]PORT", default="127.0.0.1:9877", show_default=True, help="Where to serve; port 0: any."
)
def command(inventory: Path | None, only: tuple[str, ...], runs_dir: Path, address: str) -> None:
    """Serve the results of all runs and the state of the devices as Prometheus metrics, until Ctrl-C.

    /metrics is for Prometheus, and /targets tells it (http_sd) who else serves metrics on this machine.  A run that is
    under way serves its own: `testbed run-method METHOD --metrics 0`.
    """
    from testbed.exporter.background import Refreshed
    from testbed.exporter.figures import registry_of
    from testbed.exporter.fleet_figures import look_at
    from testbed.exporter.serving import serve
    from testbed.exporter.store_figures import Store

    devices = read_inventory(inventory, only)
    runs = Refreshed("runs", Store(runs_dir).look, _RUNS_EVERY)
    fleet = Refreshed("devices", lambda: look_at(devices), _DEVICES_EVERY)
    with serve(registry_of(runs.figures, fleet.figures), address, serves="store") as url, runs, fleet:
        click.echo(f"serving the runs in {runs_dir} and {len(devices)} devices at {url}; Ctrl-C ends it")
        _wait_for_end()


def _wait_for_end() -> None:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        pass
