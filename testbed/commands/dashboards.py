"""`testbed dashboards`: the Prometheus and the Grafana of this machine, with our configuration and dashboards."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from testbed.commands._options import json_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.dashboards import Standing

_FAILED = 1
_PORT = click.IntRange(0, 65535)


@click.group("dashboards")
def command() -> None:
    """Watch runs and devices in Prometheus and Grafana: start what is installed here, with everything set up.

    What a run measured is in its folder (`testbed report`); nothing is computed from Prometheus.
    """


@command.command("up")
@click.option("--port", type=_PORT, default=9090, show_default=True, help="Prometheus' port; 0: a free one.")
@click.option("--grafana-port", type=_PORT, default=3000, show_default=True, help="Grafana's port; 0: a free one.")
@click.option(
    "--listen", metavar="HOST", default="127.0.0.1", show_default=True,
    help="Address to listen on.  Prometheus has no password: whoever reaches it can read everything in it.",
)  # fmt: skip
@click.option("--retention", metavar="TIME", default="90d", show_default=True, help="How long Prometheus remembers.")
@json_option
def up(port: int, grafana_port: int, listen: str, retention: str, as_json: bool) -> None:
    """Start Prometheus and, where it is installed, Grafana; they run until `testbed dashboards down`."""
    from testbed.dashboards import up as start

    _tell(start(port=port, grafana_port=grafana_port, listen=listen, retention=retention), as_json=as_json)
    if not as_json:
        click.echo("a run is seen with:     testbed run-method METHOD --metrics 0")
        click.echo("runs and devices with:  testbed exporter")


@command.command("down")
def down() -> None:
    """End what `testbed dashboards up` started; what was recorded stays."""
    from testbed.dashboards import down as end

    ended = end()
    click.echo(f"ended: {', '.join(ended)}" if ended else "neither Prometheus nor Grafana was running")


@command.command("status")
@json_option
def status(as_json: bool) -> int:
    """Show where the two are.  Exit code 1 when Prometheus does not run or does not answer."""
    from testbed.dashboards import READY
    from testbed.dashboards import status as look

    found = look()
    _tell(found, as_json=as_json)
    return 0 if found[0].state == READY else _FAILED


def _tell(found: Sequence[Standing], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    for each in found:
        words = [each.state, *([each.url] if each.url else []), *([f"process {each.pid}"] if each.pid else [])]
        click.echo(f"{each.name:<11}{', '.join(words)}" + (f" ({each.note})" if each.note else ""))
