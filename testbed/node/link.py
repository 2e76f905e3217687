"""The trainer's end of its pipe to the agent: JSON lines over a socket inherited from it.

agent → trainer    {"job": id, "content": {…}, "folder": "jobs/id", "hash": sha256 of the payload or null}
                   {"unload": true}
                   {"go": true}                          the answer to a phase
trainer → agent    {"ready": true, "libraries": {…}}     loaded, waiting for jobs
                   {"phase": name}                       waits for "go": the peaks of the last phase are read
                   {"progress": {…}}                     passed on to the controller
                   {"done": id, "result": {…}, "hash": sha256 of update.safetensors, which lies in the folder}
                   {"failed": id, "error": …, "phase": …, "outcome": …}
                   {"unloaded": true}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import WireError
from testbed.node.spool import FD_VARIABLE, PAYLOAD_FILE, SETTINGS_FILE, UPDATE_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Assignment:
    """A job that has come, and the folder that holds its payload and takes its update."""

    id: str
    job: dict[str, Any]  # `testbed.job.Job` as JSON
    folder: Path
    result: dict[str, Any] | None = None

    @property
    def payload(self) -> Path | None:
        """The tensors that came with the job, or None when it came without."""
        path = self.folder / PAYLOAD_FILE
        return path if path.exists() else None

    @property
    def update(self) -> Path:
        """Where the update's tensors are to be written."""
        return self.folder / UPDATE_FILE

    def write_result(self, result: dict[str, Any]) -> None:
        """{"examples", "tokens", "scalars", "tensors": [{"name", "dtype", "shape", "ranges"}], "state"}."""
        self.result = result


class AgentLink:
    """What a trainer says to its agent, and hears from it.  The working directory is the spool."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._early: deque[dict[str, Any]] = deque()
        self._phase: str | None = None
        self._assignment: Assignment | None = None

    @classmethod
    def connect(cls) -> AgentLink:
        """The link that the agent has handed down."""
        return cls(socket.socket(fileno=int(os.environ[FD_VARIABLE])))

    @property
    def settings(self) -> dict[str, Any]:
        """The agent's settings: content folder, threads, memory limit, …"""
        return dict(json.loads(Path(SETTINGS_FILE).read_text()))

    def ready(self, libraries: dict[str, str]) -> None:
        """Everything is imported; from here on jobs come.  `libraries`: name → version."""
        self._say({"ready": True, "libraries": libraries})

    def jobs(self, unload: Callable[[], None]) -> Iterator[Assignment]:
        """The jobs as they come, until the agent hangs up; `unload` is called when memory is asked back."""
        while (message := self._next()) is not None:
            if "job" in message:
                self._phase = None
                assignment = Assignment(message["job"], message["content"], Path(message["folder"]))
                self._assignment = assignment
                if self._payload_is_whole(assignment, message.get("hash")):
                    yield assignment
            elif "unload" in message:
                unload()
                self._say({"unloaded": True})

    def phase(self, name: str, accelerator_bytes: int | None = None) -> None:
        """Begin a phase; returns when the agent has read the peaks of the one before.

        accelerator_bytes    what the one before held at most on the accelerator, by the caching allocator
        """
        self._phase = name
        self._say({"phase": name, "accelerator_bytes": accelerator_bytes})
        while (message := self._read()) is not None:
            if "go" in message:
                return
            self._early.append(message)
        raise WireError("the agent has gone")

    def progress(self, **values: Any) -> None:
        """Something to watch (loss, step, steps); nobody answers."""
        self._say({"progress": values})

    def done(self, job: str) -> None:
        """The job that is being worked on has its result written; raises WireError for any other job."""
        current = self._assignment
        if current is None or current.id != job:
            raise WireError(f"job {job} is not being worked on")
        update_hash = file_hash(current.update) if current.update.exists() else None
        self._say({"done": job, "result": current.result, "hash": update_hash})

    def failed(self, job: str, error: BaseException | str, outcome: str | None = None) -> None:
        """The job ended without a result; the trainer itself goes on.

        Without an `outcome` the error tells it: MemoryError is out_of_memory, everything else failed.
        """
        if outcome is None:
            outcome = "out_of_memory" if isinstance(error, MemoryError) else "failed"
        self._say({"failed": job, "error": failure_text(error), "phase": self._phase, "outcome": outcome})

    def _payload_is_whole(self, assignment: Assignment, expected: str | None) -> bool:
        if expected is None or assignment.payload is None or file_hash(assignment.payload) == expected:
            return True
        self.failed(assignment.id, "the job's payload is not what was sent: its hash differs")
        return False

    def _say(self, message: dict[str, Any]) -> None:
        self._sock.sendall(json.dumps(message).encode() + b"\n")

    def _next(self) -> dict[str, Any] | None:
        return self._early.popleft() if self._early else self._read()

    def _read(self) -> dict[str, Any] | None:
        line = self._lines.readline()
        return json.loads(line) if line.endswith(b"\n") else None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def failure_text(error: BaseException | str) -> str:
    """One message for a failed job; a full disk is named as what it is."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left in {Path.cwd()}"
    if isinstance(error, str):
        return error
    return str(error) or type(error).__name__
