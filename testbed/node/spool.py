"""The agent's folder on the node: what must outlive agent, trainer and connection.

agent.json              the agent's settings, written by the controller
agent.sock              where the agent listens
agent.lock              held by the agent for as long as it lives
agent.state             process id and cgroup directories of the living agent, for whoever must clean up after it
agent.log               what the agent wrote to stderr
ready.lock              held by whoever starts an agent here, or clears up after one
trainer.log             what the trainer wrote to stdout and stderr
jobs/ID/                payload.safetensors as it came; update.safetensors of the trainer; outcome.json: the whole
                        result, where the controller has not stored it at once
state/                  the clients' private state, the trainer's own
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

SETTINGS_FILE = "agent.json"
PAYLOAD_FILE = "payload.safetensors"
UPDATE_FILE = "update.safetensors"
OUTCOME_FILE = "outcome.json"
STATE_FILE = "agent.state"
SOCKET_FILE = "agent.sock"
LOG_FILE = "trainer.log"
#: Names, in the trainer's environment, the socket that it inherits from its agent.
FD_VARIABLE = "TESTBED_AGENT_FD"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def is_job_id(value: Any) -> bool:
    """Whether a job's id can be the name of a folder."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


class FileSink:
    """Takes a payload into a file; a full disk is remembered, and the rest of the payload is let pass."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self.error = error

    def write(self, data: memoryview) -> None:
        try:
            while data and self.error is None:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self.error = error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Spool:
    """The jobs and results that lie on a node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spare: list[Path] = []  # emptied folders: the next job takes one, because removing is what costs

    def job_folder(self, job: str) -> Path:
        return self.folder / "jobs" / job

    def make_folder(self, job: str) -> Path:
        """An empty folder for a job; where the disk does not give one, whoever writes into it will tell."""
        folder = self.job_folder(job)
        with contextlib.suppress(OSError):
            if folder in self.spare:
                self.spare.remove(folder)
            elif self.spare:
                self.spare.pop().rename(folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
        return folder

    def retire(self, job: str) -> None:
        """Remove what lies in a job's folder, and keep the folder for the next."""
        folder = self.job_folder(job)
        try:
            for file in folder.iterdir():
                file.unlink()
        except OSError:  # a folder of somebody else's making inside, or none at all
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self.spare.append(folder)

    def clear(self) -> None:
        """Remove the spare folders."""
        while self.spare:
            shutil.rmtree(self.spare.pop(), ignore_errors=True)

    def read_waiting(self) -> dict[str, dict[str, Any]]:
        """Job id → result, of everything that waits to be stored; what was cut off in the middle is left out."""
        found = {}
        for path in sorted((self.folder / "jobs").glob(f"*/{OUTCOME_FILE}")):
            with contextlib.suppress(OSError, ValueError):
                found[path.parent.name] = json.loads(path.read_text())
        return found

    def remove_all_but(self, waiting: Container[str]) -> None:
        """Remove jobs that an agent before us did not bring to an end; they will be delivered again."""
        for folder in (self.folder / "jobs").glob("*"):
            if folder.name not in waiting:
                shutil.rmtree(folder, ignore_errors=True)

    def keep_outcome(self, job: str, outcome: dict[str, Any]) -> None:
        """Put a result where it outlives us (one that was cut off is not read); raises OSError on a full disk."""
        folder = self.job_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOME_FILE).write_text(json.dumps(outcome))

    def free(self, job: str, *names: str) -> None:
        """Give back the space of files that nobody needs any more."""
        for name in names:
            (self.job_folder(job) / name).unlink(missing_ok=True)

    def remove(self, job: str) -> None:
        shutil.rmtree(self.job_folder(job), ignore_errors=True)
