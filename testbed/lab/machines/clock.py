"""The lab's time server, as a process that outlives the command which started it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from testbed.errors import LabError
from testbed.lab.folder import TIME_SERVER
from testbed.process_identity import ProcessIdentity


def ensure(folder: Path, port: int) -> None:
    """Start it unless it runs; raises LabError."""
    running = _identity(folder)
    if running is not None and running.alive:
        return
    command = [sys.executable, "-m", "testbed.lab.machines.time_server", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise LabError(f"the lab's time server does not start: {said[-1]}")
    record = json.dumps(asdict(ProcessIdentity.of(int(done.stdout))))
    (folder / TIME_SERVER).write_text(record + "\n", encoding="utf-8")


def end(folder: Path) -> None:
    """End it if it runs."""
    running = _identity(folder)
    if running is not None and running.alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGTERM)


def _identity(folder: Path) -> ProcessIdentity | None:
    try:
        return ProcessIdentity(**json.loads((folder / TIME_SERVER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
