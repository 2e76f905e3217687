"""What devices do around the rounds: cool down, and rest while their power is measured.

Before the first round and after the last every device rests for a while; what it draws then is what its net energy is
counted from.  Where the run asks for it no device begins hotter than it says.  A rest is a job like any other, only
that no trainer has a part in it: its result is stored, and one that is stored is not asked for again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.job import REST, Job
from testbed.method import Submodel
from testbed.run import IDLE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from testbed.engine import Engine
    from testbed.inventory import Device
    from testbed.rounds import Run

BEFORE, AFTER = "before", "after"


def rest(run: Run, engine: Engine, devices: Iterable[Device], when: str) -> None:
    """Have every device rest that has to, all at the same time."""
    known = {result.job for result in run.folder.rests()}
    jobs = [
        (device.name, _job(run, device, when, wishes), None)
        for device in devices
        if (wishes := _wishes(run, device, when)) and _id(run, device, when) not in known
    ]
    for received, _ in engine.run(jobs, all_at_once=True):
        result = run.complete(received)
        run.folder.record_result(result)
        if not result.finished:
            run.watcher.job_ended(result)


def _wishes(run: Run, device: Device, when: str) -> dict[str, Any]:
    """What a device is asked for; {} where nothing is."""
    config = run.config
    stated = config.idle_seconds
    seconds = (IDLE_SECONDS if stated is None else stated) if device.meters else 0.0
    cool = {"below_celsius": config.start_below_celsius, "cool_seconds": config.cool_seconds}
    gate = cool if when == BEFORE and config.start_below_celsius is not None else {}
    return {**gate, "seconds": seconds} if gate or seconds else {}


def _id(run: Run, device: Device, when: str) -> str:
    return f"{run.folder.run_id}-{REST}-{when}-{device.name}"


def _job(run: Run, device: Device, when: str, wishes: dict[str, Any]) -> Job:
    client = next(client.index for client in run.plan.clients if client.device == device.name)
    return Job(
        id=_id(run, device, when),
        run=run.folder.run_id,
        round=-1 if when == BEFORE else run.config.rounds,
        client=client,
        kind=REST,
        method=run.config.method,
        settings={},
        config="",
        outside="",
        submodel=Submodel(()),
        shard="",
        work=run.work,
        steps=0,
        learning_rate=0.0,
        seed=run.config.seed,
        scalars=wishes,
    )
