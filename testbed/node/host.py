"""What happens on a machine around an agent: prepare its spool, start it, reach it, wait for its end, clean up.

Called in this process for the controller's own machine.  On another one, over SSH, each is a process of its own:

    python -I -S -c BOOTSTRAP CODE VERB        (arguments: a JSON object on stdin)

whose answer is one line, as that of `testbed.node.landing`.  Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import errors
from testbed.errors import DeviceError, DiskError, TestbedError
from testbed.node import landing, limits
from testbed.node.agent import clean_up_after
from testbed.node.metering import open_meter
from testbed.node.spool import SETTINGS_FILE, SOCKET_FILE, STATE_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

START_SECONDS = 30.0
#: Starts the agent without `site`: nothing but the standard library and our code is looked at.
_AGENT = "import sys; sys.path.insert(0, {code!r}); from testbed.node.agent import main; sys.exit(main(sys.argv[1:]))"
_AGENT_LOG = "agent.log"
_READY_LOCK = "ready.lock"
#: Agents that this process has started: they are its children, and somebody must wait for them.
_started: dict[Path, subprocess.Popen[bytes]] = {}


# ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def ready(
    spool: str,
    settings: dict[str, Any],
    code: str,
    contents: list[str],
    lock: str | None = None,
    claim: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Hold the device (without a claim: see that nobody does), have an agent, and say which contents are missing.

    {"missing": [hash], "spool": path, "content": path}, or {"holder": `landing.holder`} when another run holds the
    device, and then nothing has been done.  Raises LimitError or DeviceError when no agent can be started.
    """
    if lock is not None and (other := landing.hold(lock, claim)) is not None:
        return {"holder": other}
    folder, content = _path(spool), _path(settings["content"])
    content.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not landing.agent_alive(folder):
            packages = [str(_path(each)) for each in settings["code"]]
            python = str(_path(settings["python"]))
            prepare(folder, {**settings, "content": str(content), "python": python, "code": packages})
            capped_by_itself = settings["memory_bytes"] is not None and settings["cgroup_parent"] is None
            start(folder, python, str(_path(code)), scoped=capped_by_itself)
    return {"missing": missing(str(content), contents), "spool": str(folder), "content": str(content)}


@contextlib.contextmanager
def _alone(spool: Path) -> Iterator[None]:
    """One start or clearing away at a time: one whose connection was lost may still be under way at the next."""
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / _READY_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing(content: str, contents: list[str]) -> list[str]:
    """Those of the contents that are not in the folder."""
    folder = _path(content)
    return [name for name in contents if not (folder / name).exists()]


def alive(spool: str) -> bool:
    """Whether an agent is at work on the spool."""
    return landing.agent_alive(_path(spool))


def wait_gone(spool: str, patience_seconds: float) -> bool:
    """Whether the agent has ended within that time; what it could not remove itself is removed then."""
    folder, deadline = _path(spool), time.monotonic() + patience_seconds
    while not _cleared(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)  # the lock of somebody else's process cannot be waited for with a limit
    return True


def _cleared(spool: Path) -> bool:
    """Whether no agent is at work; what an agent before left is removed, and never what the next one makes."""
    if landing.agent_alive(spool):
        return False
    if not spool.is_dir():
        return True
    with _alone(spool):
        if landing.agent_alive(spool):
            return False
        if spool in _started:
            _wait_for(_started.pop(spool))
        clean_up_after(spool)
    return True


def kill(spool: str) -> None:
    """End an agent that does not answer, and remove what it leaves; raises DeviceError when it cannot be ended."""
    _signal(_path(spool), signal.SIGKILL)
    if not wait_gone(spool, START_SECONDS):
        raise DeviceError(f"the agent in {_path(spool)} cannot be ended; kill it by hand")


def leave(spool: str, patience_seconds: float, lock: str | None = None, run: str | None = None) -> None:
    """Tell the agent to stop, end it if it does not, and let go of the device."""
    try:
        _signal(_path(spool), signal.SIGTERM)
        if not wait_gone(spool, patience_seconds):
            kill(spool)
    finally:
        if lock is not None:
            landing.release(lock, run)


def try_meters(meters: list[dict[str, Any]]) -> None:
    """Open every meter of this machine once; raises MeterError for the first that cannot be read."""
    for choice in meters:
        open_meter(choice).close()


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        ready, missing, alive, wait_gone, kill, leave, try_meters,
    )
} | landing.VERBS  # fmt: skip


# ── an agent's beginning ─────────────────────────────────────────────────────────────────────────────────────────────
def prepare(spool: Path, settings: dict[str, Any]) -> None:
    """Make the folders and write the agent's settings; cleans up after an agent that was killed."""
    for folder in (spool / "jobs", spool / "state"):
        folder.mkdir(parents=True, exist_ok=True)
    clean_up_after(spool)
    (spool / SETTINGS_FILE).write_text(json.dumps(settings, indent=1))


def start(spool: Path, python: str, code: str, *, scoped: bool) -> None:
    """Start an agent, detached, and wait until it listens; raises LimitError or DeviceError when it cannot."""
    scope = limits.scope_command() if scoped else ()
    command = [*scope, python, "-I", "-S", "-c", _AGENT.format(code=code), str(spool)]
    process = _launch(command, spool / _AGENT_LOG)
    try:
        line = _first_line(process, START_SECONDS)
    except DeviceError:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    try:
        said = json.loads(line)
    except ValueError:
        said = {"error": f"it said {line!r}; see {spool / _AGENT_LOG}"}
    if "error" in said:
        _wait_for(process)
        raise typed(said.get("kind"), f"the agent cannot start: {said['error']}")
    if spool in _started:
        _wait_for(_started[spool])  # the one before: its lock is free
    _started[spool] = process


def attach(spool: Path) -> socket.socket:
    """A channel to the living agent; raises OSError when there is none.

    Through /proc, because the path of a Unix socket may have 107 bytes only.
    """
    here = os.open(spool, os.O_RDONLY | os.O_CLOEXEC)
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.connect(f"/proc/self/fd/{here}/{SOCKET_FILE}")
    except OSError:
        channel.close()
        raise
    finally:
        os.close(here)
    return channel


def in_words(error: OSError) -> DeviceError:
    """What the system says, as an error for the user."""
    kind, text = landing.in_words(error)
    return DiskError(text) if kind == DiskError.__name__ else DeviceError(text)


def typed(kind: Any, text: str) -> TestbedError:
    """The error of that name; DeviceError for a name that is none of ours."""
    found = getattr(errors, str(kind), DeviceError)
    known = isinstance(found, type) and issubclass(found, TestbedError)
    return found(text) if known else DeviceError(text)


def _launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    try:
        with log.open("ab") as told:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=told,
                start_new_session=True,  # Ctrl-C is for the controller, which tells the others; no hang-up reaches it
            )
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started: {error.strerror}") from None


def _first_line(process: subprocess.Popen[bytes], patience_seconds: float) -> str:
    """What it says when it is ready; "" when it ended without a word."""
    line, deadline, out = b"", time.monotonic() + patience_seconds, process.stdout
    while out is not None and not line.endswith(b"\n"):
        if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise DeviceError(f"the agent (process {process.pid}) has said nothing for {patience_seconds:.0f} s")
        piece = os.read(out.fileno(), 1 << 16)
        if not piece:
            break
        line += piece
    return line.decode(errors="replace")


def _wait_for(process: subprocess.Popen[bytes]) -> None:
    """A child that has ended, or is just ending."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(START_SECONDS)


def _signal(spool: Path, number: signal.Signals) -> None:
    """To the agent, where one is at work: as long as it holds its lock, the process id is its own."""
    if landing.agent_alive(spool):
        with contextlib.suppress(OSError, ValueError, KeyError):
            os.kill(json.loads((spool / STATE_FILE).read_text())["pid"], number)


def _path(text: str) -> Path:
    return Path(text).expanduser()


# ── a process of its own ─────────────────────────────────────────────────────────────────────────────────────────────
def main(verb: str) -> int:
    """Do one verb; its arguments are on stdin."""
    try:
        arguments = json.load(sys.stdin)
        said = landing.wrong_board(arguments) or {"answer": VERBS[verb](**arguments)}
    except (TestbedError, OSError) as error:
        told = in_words(error) if isinstance(error, OSError) else error
        said = {"error": str(told), "kind": type(told).__name__}
    except Exception as error:  # noqa: BLE001 -- the top of a process: whatever happens is one line
        said = {"error": f"{type(error).__name__}: {error}", "kind": "DeviceError"}
    print(json.dumps(said), flush=True)
    return 0
