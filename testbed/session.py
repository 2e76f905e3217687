"""One `run-method` from the settings to the last line: prepare, show or store the plan, run, tell how it ended."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rich.console import Console

from testbed import code_wheel, disturbances, stopping
from testbed.cache import cache_folder
from testbed.config import default_inventory, load_inventory
from testbed.controller_meters import ControllerMeters, try_meters_here
from testbed.data import check_same
from testbed.devices import NodeSettings
from testbed.engine import Engine
from testbed.errors import TestbedError, UsageError
from testbed.inventory import inventory_from_json
from testbed.live import Guarded, make_watcher
from testbed.manifest import SEALED, seal, unseal
from testbed.node.runtime import fix_mmap_threshold
from testbed.options import data_settings, pairs, partition_settings, until_settings
from testbed.plan_table import plan_as_json, plan_table
from testbed.plugins import make_method
from testbed.prepare import Prepared, prepare
from testbed.rests import AFTER, BEFORE, rest
from testbed.rounds import Run, federate
from testbed.run import Plan, RunConfig
from testbed.run_record import FAILED, FINISHED, INTERRUPTED, RUNNING, RUNNING_SECONDS
from testbed.store import RunFolder, new_run_id
from testbed.switching import power_switch

if TYPE_CHECKING:
    from types import FrameType

    from testbed.exporter.run_metrics import RunMetrics
    from testbed.inventory import Device
    from testbed.live import Watcher
    from testbed.method import State

#: Between words of how a device stands; a scrape every few seconds sees each of them.
_TELEMETRY_SECONDS = 2.0
#: For which a Prometheus that has been scraping is waited for at the end, so that it sees how a run ended.
_LAST_SCRAPE_SECONDS = 15.0
_CONFIG = {field.name for field in dataclasses.fields(RunConfig)}


def start(
    methods: Sequence[str],
    *,
    dry_run: bool,
    as_json: bool,
    runs_dir: Path,
    repeats: int,
    metrics: str | None,
    **options: Any,
) -> None:
    """Run methods from the command line's options, or with `dry_run` print their plans.

    Several runs are done in blocks: each block has every method once, in an order drawn by the seed, so that what
    drifts meanwhile (warmth, a fan, other work) falls on all of them alike.
    """
    if as_json and not dry_run:
        raise UsageError("--json goes with --dry-run; for the results use `testbed report RUN --json`")
    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: expected at least 1")
    console = Console()
    with _serving(None if dry_run else metrics, console) as served:  # before anything takes its time
        prepared = [settled(method, **options) for method in methods]
        if as_json:
            plans = [plan_as_json(each) for each in prepared]
            print(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
            return
        for each in prepared:
            console.print(plan_table(each))
        if not dry_run:
            _run_blocks(prepared, repeats, runs_dir, console, served)


def _run_blocks(
    prepared: Sequence[Prepared], repeats: int, runs_dir: Path, console: Console, served: RunMetrics | None
) -> None:
    done: list[str] = []
    for block in range(repeats):
        for each in Random(f"{prepared[0].config.seed}/block/{block}").sample(prepared, len(prepared)):
            marks = {"block": block} if repeats > 1 else {}
            folder = new_folder(each, runs_dir, **marks)
            with _told_how_to_go_on(folder, console):
                run(each, folder, console, served)
            done.append(folder.run_id)
    if len(done) > 1:
        console.print(f"compare them with: testbed report {' '.join(done)}", soft_wrap=True)


def settled(
    method: str,
    *,
    inventory: Path | None,
    only: Sequence[str],
    settings: Sequence[str],
    data_name: str,
    data_options: Sequence[str],
    partition: str,
    no_cap: bool,
    **options: Any,
) -> Prepared:
    """What a run with these options of the command line would be; starts nothing."""
    notes = Console(stderr=True)
    config = RunConfig(
        method=method,
        settings=dataclasses.asdict(make_method(method, pairs("--set", settings))),
        data=data_settings(data_name, data_options),
        partition=partition_settings(partition),
        capped=not no_cap,
        until=until_settings(options.pop("until", ())),
        disturbances=disturbances.parse_options(options.pop("disturb", ())).to_json(),
        **{name: value for name, value in options.items() if name in _CONFIG},
    )
    devices = load_inventory(inventory or default_inventory()).select(only)
    if config.power_cycle and not any(power_switch(device) for device in devices):
        raise UsageError("--power-cycle: no device of the inventory has a meter that is a switch (docs/meters.md)")
    try_meters_here(devices)
    return prepare(config, devices, lambda text: notes.print(text, style="dim"))


def new_folder(prepared: Prepared, runs_dir: Path, **marks: Any) -> RunFolder:
    """The folder of a new run; `marks` stand in its configuration beside what decides the run."""
    record = prepared.record()
    record = replace(record, config={**record.config, **marks})
    return RunFolder.create(runs_dir, new_run_id(prepared.config.method), record)


def resume(runs_dir: Path, run_name: str, metrics: str | None = None) -> None:
    """Go on with a run from its last checkpoint; what a killed controller left on the devices is collected."""
    console = Console()
    folder = RunFolder.open(runs_dir, run_name)
    prepared = restored(folder)
    with _told_how_to_go_on(folder, console), _serving(metrics, console) as served:
        run(prepared, folder, console, served)


@contextmanager
def _serving(address: str | None, console: Console) -> Iterator[RunMetrics | None]:
    """Metrics of the runs within at that address, where one is given; raises UsageError when it cannot be had."""
    if address is None:
        yield None
        return
    from testbed.exporter.run_metrics import RunMetrics
    from testbed.exporter.serving import serve

    metrics = RunMetrics()
    with serve(metrics.registry(), address, linger_seconds=_LAST_SCRAPE_SECONDS) as url:
        console.print(f"metrics: {url}", highlight=False)
        yield metrics


def restored(folder: RunFolder) -> Prepared:
    """A run that was begun, as its folder settled it; raises UsageError for one that is finished or at work."""
    notes = Console(stderr=True)
    if folder.status.state == FINISHED:
        raise UsageError(f"run {folder.run_id} is finished; show it with: testbed report {folder.run_id}")
    if folder.status.alive:
        raise UsageError(f"run {folder.run_id} is running (process {folder.status.pid}): wait for it, or stop it first")
    config = RunConfig.from_json(folder.config)
    inventory = inventory_from_json(folder.record.inventory)
    facts = folder.record.inventory.get("facts") or {}
    prepared = prepare(config, inventory, lambda text: notes.print(text, style="dim"), facts)
    check_same(prepared.data, folder.config["data_hash"])
    return replace(prepared, plan=Plan.from_json(folder.plan["clients"]))


@contextmanager
def _told_how_to_go_on(folder: RunFolder, console: Console) -> Iterator[None]:
    try:
        yield
    except BaseException:
        console.print(f"go on with: testbed run-method --resume {folder.run_id}")
        raise


def run(prepared: Prepared, folder: RunFolder, console: Console, served: RunMetrics | None = None) -> None:
    """All that is left of a run, from its last checkpoint; raises what ended it, when its folder says so too."""
    if folder.status.state == FAILED and folder.forget_empty_rounds():
        console.print("the rounds in which nobody finished are done again", style="dim")
    watcher = _watcher(folder, console, served)
    folder.set_status(RUNNING, **{SEALED: None})
    began, before = time.monotonic(), folder.status.facts.get(RUNNING_SECONDS, 0.0)
    ended, error = FAILED, "the controller ended with an error of its own"
    try:
        unseal(folder)
        with _terminated_as_interrupt():
            state = _federate(prepared, folder, watcher, console)
            prepared.method.export(state, prepared.base, prepared.work, folder.path / "export")
            folder.record_final_state(state)
        ended, error = FINISHED, ""
    except KeyboardInterrupt:
        ended, error = INTERRUPTED, "interrupted by the user"
        raise
    except TestbedError as failure:
        error = str(failure)
        raise
    finally:
        watcher.run_ended(ended)  # first of all: it gives the terminal back
        folder.set_status(ended, error or None, **{RUNNING_SECONDS: before + time.monotonic() - began})
        seal(folder)
    if stopped := folder.status.facts.get(stopping.FACT):
        console.print(stopping.stop_text(stopped), highlight=False, soft_wrap=True)
    console.print(f"run {folder.run_id} is in {folder.path}; show it again with: testbed report {folder.run_id}")


def _watcher(folder: RunFolder, console: Console, served: RunMetrics | None) -> Watcher:
    """The terminal, and where they are served the metrics beside it."""
    terminal = make_watcher(console)
    if served is None:
        return terminal
    from testbed.exporter.run_metrics import Tee

    served.about(folder.config)
    return Tee(terminal, Guarded(served, console))


def _federate(prepared: Prepared, folder: RunFolder, watcher: Watcher, console: Console) -> State:
    """All rounds, with an agent on every device that takes part; nothing but spools is left when this returns."""
    fix_mmap_threshold()
    config, devices = prepared.config, devices_of(prepared)
    meters = ControllerMeters(devices, folder.path / "meters")
    engine = Engine(
        devices,
        folder.path,
        folder.run_id,
        update_path=folder.update_path,
        content_path=prepared.store.path,
        settings=node_settings(prepared, folder.run_id, folder.path / "nodes"),
        on_event=watcher.event,
        on_telemetry=lambda device, figures: watcher.telemetry(device, meters.told(device, figures)),
        job_timeout_seconds=config.job_timeout_seconds,
    )
    try:
        with meters, engine:
            watcher.run_started(folder.run_id, folder.plan, config.rounds)
            for name, error in engine.hold().items():
                console.print(f"{name} takes no part for now: {error}", style="yellow", markup=False)
            run = Run(
                folder=folder,
                config=config,
                plan=prepared.plan,
                method=prepared.method,
                base=prepared.base,
                store=prepared.store,
                work=prepared.work,
                shards=prepared.shards,
                held_out=prepared.held_out,
                baselines=prepared.baselines,
                engine=engine,
                watcher=watcher,
                accelerators={device.name: device.accelerator for device in prepared.inventory},
                complete=meters.complete,
                weather=prepared.weather,
            )
            rest(run, engine, devices, BEFORE)
            state = federate(run)
            rest(run, engine, devices, AFTER)
            meters.complete_later(folder)
            return state
    finally:
        for problem in engine.problems:
            console.print(f"left behind: {problem}", style="yellow", markup=False)


def devices_of(prepared: Prepared) -> list[Device]:
    """The devices that take part, in the order of the inventory."""
    taking_part = {client.device for client in prepared.plan.taking_part}
    return [device for device in prepared.inventory if device.name in taking_part]


def node_settings(prepared: Prepared, run: str, folder: Path) -> NodeSettings:
    """What the agents of a run are told; `folder` holds what belongs to devices that are emulated here."""
    taking_part = devices_of(prepared)
    remote = any(device.access is not None for device in taking_part)
    return NodeSettings(
        run,
        folder,
        capped=prepared.config.capped,
        reconnect_seconds=prepared.config.reconnect_seconds,
        power_cycle=prepared.config.power_cycle,
        telemetry_seconds=_TELEMETRY_SECONDS,
        wheel=code_wheel.build(cache_folder() / "wheels") if remote else None,
        facts=prepared.facts,
        private=frozenset(prepared.shards),
        slowed=prepared.weather.slowed,
        others=tuple(device for device in prepared.inventory if device not in taking_part),
    )


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end a run as Ctrl-C does: agents stopped, groups removed, the record complete."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
