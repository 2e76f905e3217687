"""What a cell of an experiment will take, before it is run: seconds, bytes on the links and bytes on the disk.

Every figure says where it comes from:

measured    finished runs of the same cell with other seeds
scaled      finished runs of the same method on the same devices: time by rounds × steps × batch × length, bytes by
            rounds
modelled    what the plan says of the work, at the rate of other finished runs; or what it says is trained
            (`testbed.experiments.forecast_plan`)

What nothing is known of is None, and a total with such a part is a lower bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from testbed.costs import RoundCost, round_costs
from testbed.durable import plain
from testbed.environment import describe_machine
from testbed.errors import StoreError
from testbed.experiments.forecast_probe import pace_here, start_here
from testbed.options import HELD_OUT_LIMIT
from testbed.run import BYTES, SECONDS, RunConfig
from testbed.run_record import FINISHED, RUNNING_SECONDS, name_of
from testbed.store import RunFolder, run_folders

if TYPE_CHECKING:
    from testbed.experiments.experiment import Cell, Experiment

MEASURED, SCALED, MODELLED = "measured", "scaled", "modelled"
#: In a run's configuration: {"cell": identity, "label": …, "name": the experiment's}.
MARK = "experiment"
_EMULATED = "emulated"
BY_STEPS_HERE = (
    "weights × tokens, at the pace of training steps timed here, and the start of each trainer; rough, and several "
    "times as long where the machine has other work"
)
#: Of a training step, what its forward pass takes: the backward pass goes through the weights twice.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Guess:
    """A figure in base units with its source; None: nothing is known of it."""

    value: float | None = None
    source: str | None = None  # MEASURED, SCALED or MODELLED
    of: str = ""  # from what, in words

    @property
    def text(self) -> str:
        """The source, for people."""
        return f"{self.source}: {self.of}" if self.source else "nothing is known of it"


@dataclass(frozen=True)
class Work:
    """What the plan of a cell says that bears on time and traffic.

    weight_bytes    of the weights that a client's step goes through, a mean over the clients that take part
    trained_bytes   of what a client trains, in fp32, by the slots of its optimizer; None where there is none
    clients         that take part in a round
    devices         that they are on: each starts a trainer once
    deployed_bytes  of the base model that all devices lack at first
    """

    weight_bytes: float
    trained_bytes: float | None
    clients: int
    deployed_bytes: int
    devices: int = 1


class KnownRun:
    """A finished run, as far as it tells what others like it take."""

    def __init__(self, folder: RunFolder) -> None:
        record = folder.record
        self.folder = folder
        self.config = RunConfig.from_json(record.config)
        self.identity = str((record.config.get(MARK) or {}).get("cell"))
        self.model = name_of(record.config.get("model"))
        self.devices = tuple(_device(device) for device in record.inventory["devices"])
        self.machine = _machine(record.versions.get("machine") or {})
        self.clients: Sequence[Mapping[str, Any]] = record.plan["clients"]
        self.rounds = len(folder.rounds())
        took = folder.status.facts.get(RUNNING_SECONDS)
        self.seconds = took or sum(record.seconds for record in folder.rounds())

    @cached_property
    def bytes(self) -> float:
        """Down, up and deployed."""
        return float(self._last.bytes) if self._last else 0.0

    @cached_property
    def disk_bytes(self) -> float:
        return float(sum(path.stat().st_size for path in self.folder.path.rglob("*") if path.is_file()))

    def seconds_of(self, config: RunConfig) -> float:
        """Of such a run with that many rounds, steps and tokens."""
        return self.seconds * units(config, config.rounds) / units(self.config, self.rounds)

    def bytes_of(self, config: RunConfig) -> float:
        """Of such a run with that many rounds; the base model is deployed once."""
        deployed = self._last.deployed_bytes if self._last else 0
        return deployed + (self.bytes - deployed) * config.rounds / self.rounds

    def disk_bytes_of(self, config: RunConfig) -> float:
        """Of such a run with that many rounds: records and samples; two checkpoints and the export stay."""
        grows = float(sum(path.stat().st_size for path in self.folder.path.glob("[rs]*/*") if path.is_file()))
        return self.disk_bytes + grows * (config.rounds / self.rounds - 1)

    @cached_property
    def _last(self) -> RoundCost | None:
        costs = round_costs(self.folder)
        return costs[-1] if costs else None

    @property
    def emulated(self) -> bool:
        return all(kind == _EMULATED for _, kind, *_ in self.devices)


class Known:
    """The finished runs of a folder, asked about the cells of one experiment."""

    def __init__(
        self,
        experiment: Experiment,
        runs_dir: Path,
        pace: Callable[[], float] = pace_here,
        start: Callable[[], float] = start_here,
    ) -> None:
        self._pace, self._start = pace, start
        self._kin: dict[str, set[str]] = {}  # row → the identities of its cells
        for cell in experiment.cells:
            self._kin.setdefault(cell.row, set()).add(cell.identity)
        self._machine = _machine(describe_machine())
        self._runs: list[KnownRun] = []
        for path in run_folders(runs_dir):
            self.add(RunFolder(path))

    def add(self, folder: RunFolder) -> None:
        """Learn from one more run, where it is finished and can be read."""
        if any(run.folder.path == folder.path for run in self._runs):
            return
        try:
            if folder.status.state == FINISHED and (run := KnownRun(folder)).rounds:
                self._runs.append(run)
        except (StoreError, KeyError, TypeError):
            return  # a folder that cannot be read tells nothing; `testbed runs` says what is wrong with it

    def seconds(self, cell: Cell, work: Work | None = None) -> Guess:
        """Wall clock of the whole run, evaluation and rests included."""
        here = [run for run in self._runs if run.machine == self._machine]
        found = _measured([run.seconds for run in self._kin_of(cell, here)])
        if found:
            return found
        found = self._scaled(cell, here, KnownRun.seconds_of) or (self._modelled(cell, work, here) if work else Guess())
        return _within_budget(found, cell.config, SECONDS)

    def mean_seconds(self) -> Guess:
        """Of the experiment's own runs here, whatever they ran: better than nothing."""
        own = set().union(*self._kin.values())
        found = [run.seconds for run in self._runs if run.identity in own and run.machine == self._machine]
        return Guess(mean(found), SCALED, f"{_count(len(found))} of this experiment") if found else Guess()

    def bytes(self, cell: Cell, work: Work | None = None) -> Guess:
        """Down, up and deployed, in all rounds."""
        found = _measured([run.bytes for run in self._kin_of(cell, self._runs)])
        found = found or self._scaled(cell, self._runs, KnownRun.bytes_of)
        if found is None and work is not None and work.trained_bytes is not None:
            traffic = 2 * work.trained_bytes * work.clients * cell.config.rounds + work.deployed_bytes
            found = Guess(traffic, MODELLED, "what the plan trains, once each way, and the base model")
        return _within_budget(found or Guess(), cell.config, BYTES)

    def disk_bytes(self, cell: Cell) -> Guess:
        """What the run's folder will hold."""
        found = _measured([run.disk_bytes for run in self._kin_of(cell, self._runs)])
        return found or self._scaled(cell, self._runs, KnownRun.disk_bytes_of) or Guess()

    def _kin_of(self, cell: Cell, runs: Sequence[KnownRun]) -> list[KnownRun]:
        return [run for run in runs if run.identity in self._kin[cell.row]]

    def _scaled(
        self, cell: Cell, runs: Sequence[KnownRun], figure: Callable[[KnownRun, RunConfig], float]
    ) -> Guess | None:
        alike = [run for run in runs if _alike(cell, run)]
        same = [run for run in alike if _settings(run.config) == _settings(cell.config)]
        used = same or alike
        if not used:
            return None
        others = "" if same else ", with other settings"
        told = f"{_count(len(used))} of {cell.config.method}{others}"
        return Guess(median(figure(run, cell.config) for run in used), SCALED, told)

    def _modelled(self, cell: Cell, work: Work, runs: Sequence[KnownRun]) -> Guess:
        """By weights × tokens, at the rate of other methods: on this machine, or on the same boards.

        Without any such run steps and a trainer's start are timed here; of boards that nothing has run on, nothing is
        known.
        """
        devices = devices_of(cell)
        emulated = all(kind == _EMULATED for _, kind, *_ in devices)
        used = [
            (run, known)
            for run in runs
            if (run.devices == devices or (emulated and run.emulated)) and (known := work_of_run(run))
        ]
        rates = [run.seconds / _passed(run.config, run.rounds, known) for run, known in used]
        amount = _passed(cell.config, cell.config.rounds, work)
        if rates:
            return Guess(median(rates) * amount, MODELLED, f"weights × tokens, at the rate of {_count(len(rates))}")
        return Guess(self._timed_here(cell.config, work, amount), MODELLED, BY_STEPS_HERE) if emulated else Guess()

    def _timed_here(self, config: RunConfig, work: Work, amount: float) -> float:
        examples = config.data.get("held_out_limit") or HELD_OUT_LIMIT
        evaluated = _evaluations(config) * examples * config.length * max(work.weight_bytes, 1.0) * _FORWARD
        return self._pace() * (amount + evaluated) + self._start() * work.devices


def work_of_run(run: KnownRun) -> Work | None:
    """As the stored plan tells it; None where nobody took part."""
    return work_of(run.clients, run.config)


def work_of(clients: Sequence[Mapping[str, Any]], config: RunConfig, deployed_bytes: int = 0) -> Work | None:
    """From the clients of a plan, as plain data; None where nobody takes part."""
    parts = [client["parts"].values() for client in clients if client["outcome"] == "planned"]
    if not parts:
        return None
    weights = [max(phase.get("weights", 0) + phase.get("outside", 0) for phase in phases) for phases in parts]
    slots = [max(phase.get("optimizer", 0) for phase in phases) for phases in parts]
    asked = min(len(parts), config.participants_of(len(clients)))
    devices = len({client["device"] for client in clients if client["outcome"] == "planned"})
    trained = mean(slots) / 2 if any(slots) else None  # AdamW's two slots: as many bytes each as what is trained
    return Work(mean(weights), trained, asked, deployed_bytes, devices)


def left(guess: Guess, rounds_done: int, rounds: int) -> Guess:
    """Of a run that was begun: what its rounds that are left take of the whole."""
    if not rounds_done or guess.value is None:
        return guess
    share = max(0.0, 1 - rounds_done / rounds)
    return replace(guess, value=guess.value * share, of=f"{guess.of}; {rounds_done} of {rounds} rounds are done")


def total(guesses: Sequence[Guess]) -> tuple[float, bool]:
    """The sum of what is known, and whether that is all of it."""
    known = [guess.value for guess in guesses if guess.value is not None]
    return sum(known), len(known) == len(guesses)


def devices_of(cell: Cell) -> tuple[tuple[Any, ...], ...]:
    """What makes two inventories take as long: as `KnownRun.devices`."""
    return tuple(
        (device.name, device.kind, device.profile.name, device.budget.memory_bytes, device.clients)
        for device in cell.inventory
    )


def _device(device: Mapping[str, Any]) -> tuple[Any, ...]:
    budget = device["budget"]["memory_bytes"]
    return (device["name"], device["kind"], name_of(device["profile"]), budget, device["clients"])


def _machine(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    return (machine.get("cpu"), machine.get("cores"))


def _within_budget(guess: Guess, config: RunConfig, name: str) -> Guess:
    """A run ends after the round in which its budget is spent; what was measured has done so already."""
    budget = config.until.get(name)
    if budget is None or guess.source == MEASURED:
        return guess
    if guess.value is None:
        return Guess(budget, MODELLED, "its budget, which ends it")
    if guess.value <= budget:
        return guess
    a_round = guess.value / config.rounds
    if a_round > budget:
        return Guess(a_round, MODELLED, "one round, which spends more than its budget")
    return Guess(budget, MODELLED, "its budget, which ends it")


def _evaluations(config: RunConfig) -> int:
    """Before the first round, every so many rounds, and after the last; every round where something ends the run."""
    return 1 + (config.rounds if config.until else math.ceil(config.rounds / config.evaluate_every))


def _measured(values: Sequence[float]) -> Guess | None:
    return Guess(mean(values), MEASURED, f"{_count(len(values))} with other seeds") if values else None


def _alike(cell: Cell, run: KnownRun) -> bool:
    ours, theirs = cell.config, run.config
    return (
        ours.method == theirs.method
        and ours.model in {None, run.model}
        and ours.task in {None, theirs.task}
        and dict(ours.disturbances) == dict(theirs.disturbances)
        and run.devices == devices_of(cell)
    )


def units(config: RunConfig, rounds: int) -> float:
    """Tokens that a client goes through at most in so many rounds: what time is scaled by."""
    return rounds * config.steps * config.batch_size * config.length


def _settings(config: RunConfig) -> str:
    return json.dumps(dict(config.settings), sort_keys=True, default=plain)


def _passed(config: RunConfig, rounds: int, work: Work) -> float:
    return units(config, rounds) * work.clients * max(work.weight_bytes, 1.0)


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"
