"""Runs on a virtual lab: the command line at a desk of its own, and engines whose trainers do what a job tells them.

def test_a_command(study):  # three boards, made ready by `testbed provision`; shared by all tests
    study.desk.testbed("run-method", "lora", *study.words("runs"))

def test_a_drill(plain_lab, tmp_path):  # real agents, links and caps; trainers of a few lines
    devices = idle_devices(plain_lab)
    with idle_engine(tmp_path, devices, furnish_for_drills(devices), wheel=wheel) as engine:
        engine.run([("board-1", job(steps=lasting("job-1")), None)])
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed import ssh as over_ssh
from testbed.attached import LINK_LOST
from testbed.cli import main
from testbed.config import load_inventory
from testbed.engine import Engine
from testbed.inventory import Budget, Device
from testbed.job import REST
from testbed.lab.host import NamespaceHost
from testbed.lab.lab import Lab
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.runner import Provisioning, board_steps
from testbed.provision.visit import Options
from tests import drills
from tests.drills import MIB, wait_until
from tests.virtual_lab import as_new, free_subnet

#: On a host: what the idle trainers need, and what they leave for a test to see.
HOME = "/home/admin"
DRILL = f"{HOME}/drill"
#: The testbed's own folder on a host.
FOLDER = f"{HOME}/.local/share/edge-testbed"


class Desk:
    """A controller's user: the command line, with facts, cache and runs in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {
            "TESTBED_CACHE": str(folder / "cache"), "TESTBED_DATA": str(folder / "data"), "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def testbed(self, *words: object, code: int | None = 0) -> Said:
        """A command in this process, because torch is imported here; its exit code must be `code` (None: any)."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            for name, value in self.variables.items():
                patch.setenv(name, value)
            ended = main([str(word) for word in words])
        return _checked(Said(ended, out.getvalue(), err.getvalue()), code)

    def json(self, *words: object, code: int | None = 0) -> Any:
        return json.loads(self.testbed(*words, "--json", code=code).out)

    def process(self, *words: object, code: int | None = 0) -> Said:
        """A command in a process of its own, to its end."""
        with self.started(*words) as process:
            out, err = process.communicate()
        return _checked(Said(process.returncode, out, err), code)

    @contextmanager
    def started(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """A command in the background; killed, whatever happens, when the block ends."""
        with subprocess.Popen(
            [sys.executable, "-m", "testbed", *map(str, words)],
            env={**os.environ, **self.variables}, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All of it in one line, without the breaks that a narrow window made."""
        return " ".join(f"{self.out} {self.err}".split())


def advises(said: str, command: str) -> bool:
    """Whether a command is named as the way out, with the inventory that it was about or without."""
    verb, _, rest = command.partition(" ")
    return re.search(rf"testbed {verb} (--inventory \S+ )?{re.escape(rest)}", said) is not None


def _checked(said: Said, code: int | None) -> Said:
    assert "Traceback" not in said.err
    assert code in {None, said.code}, f"exit code {said.code}: {said.out}{said.err}"
    return said


# ── a study on three boards ──────────────────────────────────────────────────────────────────────────────────────────
BOARDS = ORIN, PI5, PI4 = ("jetson-orin-nano", "raspberry-pi-5", "raspberry-pi-4b")
BLOCK_BYTES = 15_736_832
ROUNDS = 2
#: Of a round: trainers start, and little else.
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Study:
    """A user with a lab of three boards, a model and data."""

    desk: Desk
    lab: Lab
    provisioned: tuple[str, str]  # what `testbed provision` said, and a second one after it
    inventory: Path  # the lab's, with a budget for two of the model's four blocks on the smallest board

    def words(self, runs: str | None, *more: object, inventory: Path | None = None) -> list[object]:
        """Of `run-method`, after the method; a round is over in seconds, and the runs are in a folder of their own."""
        folder = self.desk.folder
        where = () if runs is None else ("--runs", folder / runs)
        return [
            *where, "--inventory", inventory or self.inventory, "--model", folder / "model",
            "--data", folder / "data.jsonl", "--data-set", "text=body", "--data-set", "label=kind", "--length", "16",
            "--batch-size", "4", "--steps", "2", "--rounds", ROUNDS, "--evaluate-every", "2",
            "--learning-rate", "0.02", "--idle-seconds", "0.5", *more,
        ]  # fmt: skip

    def run(self, runs: str, *more: object, inventory: Path | None = None) -> Path:
        """A whole run of fedpruner; its folder."""
        self.desk.process("run-method", "fedpruner", *self.words(runs, *more, inventory=inventory))
        return self.only_run(runs)

    def only_run(self, runs: str) -> Path:
        [folder] = (self.desk.folder / runs).glob("fedpruner-*")
        return folder

    def attentive(self) -> Path:
        """The inventory, with an SSH configuration that notices within seconds that nobody answers."""
        settings = "  ServerAliveInterval 1\n  ServerAliveCountMax 3\n  ConnectTimeout 2\n"
        return self.variant("attentive", self.lab.ssh_config.read_text() + settings)

    def variant(self, name: str, ssh_config: str, **defaults: object) -> Path:
        """The inventory with another SSH configuration."""
        (self.lab.folder / f"{name}.ssh").write_text(ssh_config)
        content = yaml.safe_load(self.inventory.read_text())
        content["defaults"] |= {"ssh_config": f"{name}.ssh", **defaults}
        return self.write_inventory(f"{name}.yaml", content)

    def emulated(self, **more: object) -> dict[str, Any]:
        """Devices of the same names and profiles that are no boards."""
        devices = yaml.safe_load(self.lab.inventory.read_text())["devices"]
        return {name: {**device, "kind": "emulated", **more} for name, device in devices.items()}

    def fitted(self, desk: Desk, name: str, content: Mapping[str, Any]) -> Path:
        """An inventory in which the budget of the smallest device is enough for two of the model's four blocks.

        What an empty trainer takes is measured on every machine anew and differs a little each time: where states are
        compared, what fits must not depend on that.
        """
        path = self.write_inventory(name, content)
        plan = desk.json("run-method", "fedpruner", *self.words("none", inventory=path), "--dry-run")
        needed = next(client["predicted_bytes"] for client in plan["clients"] if client["device"] == PI4)
        budget = {**content["devices"][PI4]["budget"], "memory": f"{needed - int(1.5 * BLOCK_BYTES)} B"}
        devices = {**content["devices"], PI4: {**content["devices"][PI4], "budget": budget}}
        return self.write_inventory(name, {**content, "devices": devices})

    def write_inventory(self, name: str, content: Mapping[str, Any]) -> Path:
        """Beside the lab's own, which the paths in it are relative to."""
        path = self.lab.folder / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path


def open_study(folder: Path, lab_folder: Path) -> Study:
    """Lab up, provision: then the budget is settled with what was measured."""
    from tests.tiny_lab import make_lab  # and torch with it

    desk = Desk(folder)
    make_lab(folder, hidden_size=512)
    desk.testbed("lab", "up", "--folder", lab_folder, "--subnet", free_subnet(), "--boot-delay", "0.2s")
    lab = Lab.open(lab_folder)
    first = desk.testbed("provision", "--inventory", lab.inventory, "--reboot").out
    second = desk.testbed("provision", "--inventory", lab.inventory).out
    whole = Study(desk, lab, (first, second), lab.inventory)
    return replace(whole, inventory=whole.fitted(desk, "study.yaml", yaml.safe_load(lab.inventory.read_text())))


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    lab_folder = tmp_path_factory.mktemp("study") / "lab"
    try:
        yield open_study(tmp_path_factory.mktemp("desk"), lab_folder)
    finally:
        if (lab_folder / "lab.json").exists():
            Lab.open(lab_folder).down()


@pytest.fixture(scope="session")
def undisturbed(study: Study) -> Path:
    """A run on the three boards to which nothing happens: its folder."""
    return study.run("undisturbed")


@pytest.fixture(scope="session")
def on_this_machine(study: Study) -> Path:
    """The same run on emulated devices of the same names, profiles and submodels: its folder."""
    return study.run("emulated", inventory=study.fitted(study.desk, "emulated.yaml", {"devices": study.emulated()}))


@pytest.fixture
def boards_put_right(study: Study) -> Iterator[None]:
    """What a test has done to the study's boards ends with it, also where the test has failed."""
    yield
    for host in study.lab.hosts:
        as_new(host)
        for pid in agent_pids(host):
            console(host, f"kill -KILL {pid}", code=None)
        console(host, f"rm -f {FOLDER}/lock.json")


def status_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def results_of(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """(round, device) → result, as the run's folder has them; without those of the boards' rests."""
    found = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    return {(result["round"], result["device"]): result for result in found if result["kind"] != REST}


def outcomes_of(folder: Path) -> dict[tuple[int, str], str]:
    return {key: result["outcome"] for key, result in results_of(folder).items()}


def wait_for_jobs(study: Study, runs: str, process: subprocess.Popen[str], boards: Iterable[str] = BOARDS) -> Path:
    """Until the boards have their jobs, and trainers that begin to work on them; the run's folder."""

    def wait_for(look: Callable[[], object]) -> None:
        wait_until(lambda: process.poll() is not None or look(), PATIENCE_SECONDS)
        assert process.poll() is None, process.communicate()

    wait_for(lambda: list((study.desk.folder / runs).glob("fedpruner-*/status.json")))
    folder = study.only_run(runs)
    for name in boards:
        begun = f"ls {FOLDER}/runs/{folder.name}/spool/trainer.log"
        wait_for(functools.partial(console, study.lab.host(name), begun, code=None))
    return folder


def wait_for_outcomes(study: Study, run: str, boards: Iterable[str] = BOARDS) -> dict[str, Any]:
    """Until the boards have done their jobs, with nobody there to collect the results; the results as they wait."""
    found = {}
    for name in boards:
        read = functools.partial(console, study.lab.host(name), f"cat {FOLDER}/runs/{run}/spool/jobs/*/outcome.json")
        found[name] = json.loads(wait_until(lambda read=read: read(code=None), PATIENCE_SECONDS))
    return found


def phases_of(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What was measured of a job on its device, but for the sending: another time of training has other numbers."""
    phases = result["measurement"]["phases"]
    return [(phase["name"], phase["seconds"]) for phase in phases if phase["name"] != "send"]


# ── what is on a host ────────────────────────────────────────────────────────────────────────────────────────────────
def console(host: NamespaceHost, script: str, *, code: int | None = 0) -> str:
    """What a shell script says that root runs in the host; no network is needed for that."""
    done = host.console(["sh", "-c", script])
    assert code in {None, done.returncode}, f"{host.name}: exit code {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def touch(host: NamespaceHost, path: str) -> None:
    console(host, f"touch {shlex.quote(path)}")


def lines_in(host: NamespaceHost, path: str) -> int:
    """How many lines a file has; 0 where there is none."""
    return int(console(host, f"cat {shlex.quote(path)} 2>/dev/null | wc -l"))


def ours(host: NamespaceHost) -> list[str]:
    """Command lines of agents, trainers and verbs at work on the host."""
    script = 'for p in /proc/[0-9]*; do tr "\\0" " " <$p/cmdline 2>/dev/null && echo; done'
    lines = console(host, script).splitlines()
    return [line for line in lines if "testbed" in line and "testbed.lab" not in line]


def agent_pids(host: NamespaceHost) -> list[int]:
    """The agents on a host, by the state files of their spools; as the host counts processes."""
    found = console(
        host, f"cat {FOLDER}/runs/*/spool/agent.state {FOLDER}/runs/*/*/spool/agent.state 2>/dev/null", code=None
    )
    return [json.loads(piece + "}")["pid"] for piece in found.split("}") if piece.strip()]


def logins(host: NamespaceHost) -> int:
    """How often somebody was let in, by what its SSH server says."""
    return host.folder.console.read_text(errors="replace").count("Accepted publickey")


def files_of(host: NamespaceHost) -> dict[str, tuple[int, int]]:
    """Every file that the host has written to its disk, with size and time of its last change; logs left out."""
    upper = host.folder.upper
    found = {path.relative_to(upper): path.lstat() for path in upper.rglob("*")}
    return {
        str(path): (stat.st_size, stat.st_mtime_ns)
        for path, stat in found.items()
        if not str(path).startswith(("var/log/", "run/", "var/lib/sudo"))
    }


def traffic(host: NamespaceHost) -> tuple[int, int]:
    """Bytes that came in and went out over its network since it was started."""
    lines = [line.partition(":")[2].split() for line in console(host, "grep -v lo: /proc/net/dev").splitlines()]
    counts = [(int(line[0]), int(line[8])) for line in lines if len(line) > 8 and line[0].isdigit()]
    return sum(count for count, _ in counts), sum(count for _, count in counts)


# ── engines with idle trainers ───────────────────────────────────────────────────────────────────────────────────────
def furnish_for_drills(devices: Iterable[Device]) -> dict[str, Mapping[str, Any]]:
    """Put the idle trainer on every host, and make memory cgroups usable there; the devices' facts."""
    chosen = Options()
    visits = Provisioning(devices, chosen, steps=lambda device: board_steps(device, chosen), parts=FACTS_SCRIPT_PARTS)
    outcomes = visits.run()
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    for device in devices:
        assert device.access is not None
        with closing(over_ssh.connect(device.name, device.access)) as connection:
            for source in drills.TRAINERS.glob("*.py"):
                connection.put(source, Path(DRILL, source.name))
    return {outcome.device: outcome.facts for outcome in outcomes if outcome.facts is not None}


def idle_devices(lab: Lab, memory_bytes: int = 64 * MIB) -> list[Device]:
    """The devices of a lab, with budgets of an idle trainer's size."""
    return [replace(device, budget=Budget(memory_bytes)) for device in load_inventory(lab.inventory)]


def idle_engine(
    folder: Path,
    devices: Iterable[Device],
    facts: Mapping[str, Mapping[str, Any]],
    *,
    options: Any = None,
    **changes: Any,
) -> Engine:
    given = {"code": (DRILL,), "capped": True, "facts": facts, **changes}
    return drills.engine(folder, *devices, options=options, **given)


class Mishap:
    """Listens to an engine: lets something happen to a device when its job is under way, and when its link is lost."""

    def __init__(
        self, device: str, when_under_way: Callable[[], object], when_lost: Callable[[], object] = lambda: None
    ) -> None:
        self.heard: list[str] = []  # of the device: phases, "progress", "link lost"
        self._device = device
        self._actions = {"progress": when_under_way, LINK_LOST: when_lost}

    def __call__(self, name: str, client: int | None, phase: str | None, progress: Mapping[str, Any] | None) -> None:
        if name != self._device:
            return
        self.heard.append(phase or "progress")
        self._actions.pop(self.heard[-1], lambda: None)()


def counted(job: str) -> list[list[str]]:
    """Steps of a job that leaves a line for every time it is begun."""
    return [["phase", "train"], ["count", f"{DRILL}/{job}"]]


def lasting(job: str) -> list[list[str]]:
    """… and goes on until it is released."""
    return [*counted(job), ["progress"], ["wait_for", f"{DRILL}/{job}.go"]]


def release(host: NamespaceHost, job: str) -> None:
    touch(host, f"{DRILL}/{job}.go")


def times_begun(host: NamespaceHost, job: str) -> int:
    return lines_in(host, f"{DRILL}/{job}")
