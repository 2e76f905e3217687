"""`testbed calibrate DEVICE --against METER`: what one of its meters says, set against another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import one_device

if TYPE_CHECKING:
    from testbed.inventory import Device, MeterChoice
    from testbed.measurement import Calibration


@click.command("calibrate")
@click.argument("device")
@click.option("--inventory", metavar="FILE", type=click.Path(path_type=Path), help="The inventory that has the device.")
@click.option("--meter", "name", metavar="METER", help="Which of its meters  [default: the first that is not METER].")
@click.option("--against", metavar="METER", help="Another meter of the device, or NAME:KEY=VALUE,KEY=VALUE.")
@click.option("--seconds", type=click.FloatRange(min=1), default=120.0, show_default=True, help="For how long.")
@click.option("--show", is_flag=True, help="Print what is stored, and measure nothing.")
@click.option("--forget", is_flag=True, help="Remove what is stored, and measure nothing.")
def command(
    device: str,
    inventory: Path | None,
    name: str | None,
    against: str | None,
    seconds: float,
    show: bool,
    forget: bool,
) -> int:
    """Read a meter of DEVICE and another one at once, fit other = gain × watts + offset, and keep that for later runs.

    From then on energies of that meter stand for the point where the other one measures, with what the fit left open
    as part of their interval.  Let the board do things of different power meanwhile, each for half a minute: at rest,
    one core busy, all of them.
    """
    from testbed import calibrations
    from testbed.errors import UsageError
    from testbed.metering import watched_together

    found = one_device(inventory, device)
    if show or forget:
        return _stored(found, name, forget=forget)
    if against is None:
        raise UsageError(f"device {device}: against which meter? --against METER, or --show what is stored")
    reference, meter = _chosen(found, name, against)
    ours, theirs = watched_together(found, (meter, reference), seconds, _told_left)
    pairs = calibrations.pairs_of(ours.totals, theirs.totals)
    known = theirs.meter
    calibration = calibrations.fitted(pairs, calibrations.Reference(known.name, known.point, known.total_accuracy))
    calibrations.store(found, meter.name, calibration)
    click.echo(_told(meter.name, calibration))
    if calibrations.is_narrow(pairs):
        click.echo(
            "the power hardly moved, so only an offset was fitted: it holds for this power.  For a gain, calibrate "
            "again while the board does things of different power",
            err=True,
        )
    return 0


def _told_left(seconds: float) -> None:
    click.echo(f"{seconds:.0f} s left", err=True)


def _chosen(device: Device, name: str | None, against: str) -> tuple[MeterChoice, MeterChoice]:
    """The reference, and the meter that is set against it."""
    from testbed.errors import UsageError
    from testbed.metering import choice_from

    reference = choice_from(against, device)
    able = [choice for choice in device.meters if choice != reference]
    chosen = [choice for choice in able if name in {None, choice.name}]
    if not chosen:
        if not able:
            raise UsageError(
                f"device {device.name} has no meter beside {reference.name}: there is nothing to set against it; a "
                "calibration needs two meters (meter: in the inventory)"
            )
        there = ", ".join(choice.name for choice in able)
        raise UsageError(f"device {device.name} has no meter {name} beside the reference; it has {there}")
    return reference, chosen[0]


def _stored(device: Device, name: str | None, *, forget: bool) -> int:
    """Print, or remove, what is stored of a meter or of all of the device's."""
    from testbed import calibrations

    for choice in device.meters:
        if name not in {None, choice.name}:
            continue
        if forget:
            gone = calibrations.forget(device, choice.name)
            click.echo(f"{choice.name}: {'forgotten' if gone else 'there was no calibration'}")
            continue
        known = calibrations.calibration_of(device, choice.name)
        click.echo(_told(choice.name, known) if known is not None else f"{choice.name}: no calibration of this board")
    return 0


def _told(name: str, known: Calibration) -> str:
    line = f"{known.reference} = {known.gain:.4f} × {name} {known.offset_watts:+.3f} W"
    seen = f"from {known.lowest_watts:.2f} to {known.highest_watts:.2f} W in {known.samples} seconds"
    return (
        f"{name}: {line}, ± {known.residual_watts:.3f} W at 95 %\n"
        f"  seen {seen}; stands for {known.point}, known to ± {100 * known.reference_gain:.1f} %; made {known.made}"
    )
