"""The real service of jetson-stats, on a board of files: in a mount namespace of its own, which ends with the test.

    with jtop_host(tmp_path) as host:        # a Jetson Orin Nano: VDD_IN, VDD_CPU_GPU_CV, VDD_SOC
        host.start()                         # the service; `host.stop()` kills it with everything it has started
        make("jtop", {"python": host.python})

What the service sees there: /sys with one INA3221 (reconstructed from the names that the kernel's driver has), the
group jtop, and an empty /run.  It needs root, and jetson-stats in this environment.

    python tests/meters/jtop_server.py hold FOLDER         # makes that view, and keeps it until its stdin ends
    python tests/meters/jtop_server.py serve FOLDER [VERSION]
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Volts and amperes of a board at work, in the kernel's millivolts and milliamperes.
ORIN_NANO = {"VDD_IN": (5024, 1200), "VDD_CPU_GPU_CV": (5024, 450), "VDD_SOC": (5016, 300)}
#: The two power monitors of an AGX Orin: no rail is the total.
AGX_ORIN = {"VDD_GPU_SOC": (19800, 320), "VDD_CPU_CV": (19800, 80), "VIN_SYS_5V0": (5000, 800)}
_SCRIPT = Path(__file__)


@functools.cache
def why_no_jtop() -> str | None:
    """None where the service can be run, else what it lacks."""
    if importlib.util.find_spec("jtop") is None:
        return "jetson-stats is not installed in this environment"
    trial = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/run"]
    done = subprocess.run(trial, check=False, capture_output=True, text=True)
    return f"no mount namespace can be made here: {done.stderr.strip()}" if done.returncode else None


class JtopHost:
    """A board for the service; `python` runs whatever it is given among the board's files."""

    def __init__(self, folder: Path, rails: dict[str, tuple[int, int]]) -> None:
        self.folder = folder
        self._service: subprocess.Popen[str] | None = None
        self._monitor = folder / "sys/bus/i2c/devices/1-0040"
        self._log = folder / "service.log"
        _make_board(folder, self._monitor, rails)
        apart = ["unshare", "--mount", "--propagation", "private"]
        self._holder = _started([*apart, *_self("hold", folder)], self._log)
        self._inside = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--"]
        self.python = str(folder / "python")
        Path(self.python).write_text(f'#!/bin/sh\nexec {" ".join(self._inside)} {sys.executable} "$@"\n')
        Path(self.python).chmod(0o755)

    def start(self, version: str | None = None) -> None:
        """Start the service and wait until it listens; `version` is what it says that it is."""
        # The manager's processes outlive the service: they end with the process namespace.
        alone = ["unshare", "--pid", "--fork", "--kill-child"]
        words = [version] if version else []
        self._service = _started([*self._inside, *alone, *_self("serve", self.folder, *words)], self._log)

    def stop(self) -> None:
        """Kill the service and everything it has started, as a crash would; its socket stays."""
        if self._service is not None:
            _end(self._service)
            self._service = None

    def signal_service(self, number: int) -> None:
        """Send a signal to every process of the service."""
        for process in self._processes():
            os.kill(process, number)

    def set(self, rail: str, millivolts: int, milliamperes: int) -> None:
        """What the board draws from now on."""
        _draw(self._monitor, rail, millivolts, milliamperes)

    def lose(self, rail: str) -> None:
        """The sensor of a rail does not answer any more."""
        channel = _channel(self._monitor, rail)
        (self._monitor / f"hwmon/hwmon3/curr{channel}_input").unlink()

    def close(self) -> None:
        self.stop()
        _end(self._holder)

    def _processes(self) -> list[int]:
        """Everything below `unshare`, whose child is the first of the process namespace."""
        assert self._service is not None
        found, waiting = [], [self._service.pid]
        while waiting:
            children = Path(f"/proc/{waiting[0]}/task/{waiting[0]}/children").read_text().split()
            waiting = waiting[1:] + [int(child) for child in children]
            found += [int(child) for child in children]
        return found


@contextmanager
def jtop_host(folder: Path, rails: dict[str, tuple[int, int]] = ORIN_NANO) -> Iterator[JtopHost]:
    """A board with these rails, without the service."""
    host = JtopHost(folder, rails)
    try:
        yield host
    finally:
        host.close()


def _started(command: list[str], log: Path) -> subprocess.Popen[str]:
    """A process that has said that it is ready."""
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _end(process)
        raise RuntimeError(f"{' '.join(command)} did not get ready: {log.read_text()}")
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def _self(*words: object) -> list[str]:
    return [sys.executable, str(_SCRIPT), *map(str, words)]


def _make_board(folder: Path, monitor: Path, rails: dict[str, tuple[int, int]]) -> None:
    hwmon = monitor / "hwmon/hwmon3"
    hwmon.mkdir(parents=True)
    (monitor / "name").write_text("ina3221\n")
    for channel, rail in enumerate(rails, 1):
        (hwmon / f"in{channel}_label").write_text(f"{rail}\n")
        _draw(monitor, rail, *rails[rail])
    (hwmon / "in7_label").write_text("sum of shunt voltages\n")
    processors = [f"devices/system/cpu/cpu{number}" for number in range(os.cpu_count() or 1)]
    firmware = "devices/virtual/dmi/id"  # where it looks for its hardware on an x86 machine
    for part in ("class/hwmon", "class/power_supply", "class/devfreq", firmware, *processors):
        (folder / "sys" / part).mkdir(parents=True)
    (folder / "group").write_text(f"{Path('/etc/group').read_text()}jtop:x:64123:\n")
    (folder / "scratch").mkdir()


def _channel(monitor: Path, rail: str) -> int:
    labels = (monitor / "hwmon/hwmon3").glob("in?_label")
    return next(int(label.name[2]) for label in labels if label.read_text().strip() == rail)


def _draw(monitor: Path, rail: str, millivolts: int, milliamperes: int) -> None:
    channel = _channel(monitor, rail)
    (monitor / f"hwmon/hwmon3/in{channel}_input").write_text(f"{millivolts}\n")
    (monitor / f"hwmon/hwmon3/curr{channel}_input").write_text(f"{milliamperes}\n")


# ── in the mount namespace ───────────────────────────────────────────────────────────────────────────────────────────
def hold(folder: Path) -> None:
    """Lay the board's files over the machine's, and wait."""
    _mount("--bind", folder / "group", "/etc/group")
    _mount("-t", "tmpfs", "none", "/run")
    _mount("--bind", folder / "sys", "/sys")
    print("ready", flush=True)
    sys.stdin.read()


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def serve(folder: Path, version: str | None = None) -> None:
    """Run the service in this process until it is killed."""
    sys.base_prefix = str(folder / "scratch")  # below which it keeps its settings
    if version is not None:
        sys.path.insert(0, str(_copy_that_calls_itself(version, folder / f"jtop-{version}")))
    from jtop.service import JtopServer

    server = JtopServer(force=True)
    server.start()
    print("ready", flush=True)
    server.join()


def _copy_that_calls_itself(version: str, folder: Path) -> Path:
    found = importlib.util.find_spec("jtop")
    assert found is not None
    assert found.origin is not None
    shutil.copytree(Path(found.origin).parent, folder / "jtop", ignore=shutil.ignore_patterns("__pycache__"))
    init = folder / "jtop/__init__.py"
    old = importlib.import_module("importlib.metadata").version("jetson-stats")
    init.write_text(init.read_text().replace(f'__version__ = "{old}"', f'__version__ = "{version}"'))
    return folder


if __name__ == "__main__":
    verb, place, *more = sys.argv[1:]
    {"hold": hold, "serve": serve}[verb](Path(place), *more)
