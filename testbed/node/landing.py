"""What is done on a device before our code is there: hold it for a run, let go of it, take a code wheel apart.

    python -I -S -c "the text of this file" VERB        (arguments: a JSON object on stdin)

Complete in itself for that reason: standard library only, and nothing of this package.  The answer is one line,
{"answer": …}, {"error": text, "kind": the name of an error}, or {"board": its name} where it is not the expected one.
`testbed.node.host` has the verbs of a device that has our code.

A lock is a file that says which run holds the device.  How long ago that was is counted on the clock that nobody sets;
after a restart, from the restart on.  It is stale when the run has no agent there, and took the device longer ago than
an agent would have waited for it.  A controller that a device was taken from by hand cannot hold it again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AGENT_LOCK = "agent.lock"
#: Controllers that are remembered as barred from a device: older ones have noticed by now.
_MOST_BARRED = 8


def boot() -> str:
    """Differs after every restart of the machine, or of the container that we are in."""
    identity = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{identity}/{_first_process_started()}"


def board_model() -> str | None:
    """What the firmware calls this board; None where it says nothing."""
    for tree in ("/proc/device-tree", "/sys/firmware/devicetree/base"):
        with contextlib.suppress(OSError):
            return Path(tree, "model").read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    return None


def wrong_board(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Take out of a verb's arguments the `board` that is expected; {"board": what it says} where this is another one.

    Asked before every verb, because another machine may stand behind an address at the next connection.
    """
    expected = arguments.pop("board", None)
    if expected is None or (found := board_model()) == expected:
        return None
    return {"board": found}


def agent_alive(spool: Path) -> bool:
    """Whether an agent is at work on a spool: it holds a lock for as long as it lives."""
    try:
        fd = os.open(spool / AGENT_LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def hold(lock: str, claim: dict[str, Any] | None) -> dict[str, Any] | None:
    """Hold the device for claim's run; None, or `holder` of another run that holds it.

    claim: run, device, owner (user@host:pid), since (epoch seconds, for people), spool, orphan_seconds.  Without one
    it is only looked who holds it.
    A run that holds it already goes on holding it; of two that come at once, one has it.  {"barred": run} for a
    controller that the device was taken from.
    """
    if claim is None:
        return holder(lock)
    path = Path(lock).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    draft.write_text(json.dumps({**claim, "boot": boot(), "at": _clock()}), encoding="utf-8")
    try:
        with _alone(path) as barred:
            return {"barred": claim["run"]} if _controller(claim) in barred else _take(path, draft, claim)
    finally:
        draft.unlink(missing_ok=True)


def holder(lock: str) -> dict[str, Any] | None:
    """Who holds the device: the claim, with age_seconds, agent_alive and stale; None when it is free."""
    try:
        found = json.loads(Path(lock).expanduser().read_text(encoding="utf-8"))
        same_boot = found["boot"] == boot()
        age = _clock() - found["at"] if same_boot else _seconds_since_boot()
        alive = agent_alive(Path(found["spool"]).expanduser())
        stale = not alive and age > found["orphan_seconds"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # the disk was full, or somebody else wrote it
        return {"run": None, "device": None, "owner": None, "age_seconds": None, "agent_alive": False, "stale": True}
    return {**found, "age_seconds": age, "agent_alive": alive, "stale": stale}


def release(lock: str, run: str | None = None) -> bool:
    """Let go of the device where this run holds it (None: whoever does); whether there was something to let go of."""
    path = Path(lock).expanduser()
    if not path.exists():
        return False
    with _alone(path):
        found = holder(lock)
        if found is None or (run is not None and found["run"] != run):
            return False
        path.unlink(missing_ok=True)
    return True


def bar(lock: str) -> None:
    """Let the controller that holds the device not hold it again; the same run, resumed, is another controller."""
    path = Path(lock).expanduser()
    if not path.exists():
        return
    with _alone(path) as barred:
        found = holder(lock)
        if found is not None and found["run"] is not None:
            _barred_file(path).write_text(json.dumps([*barred, _controller(found)][-_MOST_BARRED:]), encoding="utf-8")


def _controller(claim: dict[str, Any]) -> list[str]:
    return [claim["run"], claim["owner"]]


def _barred_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.stem}.barred")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[list[list[str]]]:
    """One change of a lock at a time; the controllers that are barred from it."""
    with _barred_file(lock).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            barred = json.load(file)
        except ValueError:  # nobody yet, or a full disk
            barred = []
        yield barred


def _take(path: Path, draft: Path, claim: dict[str, Any]) -> dict[str, Any] | None:
    try:
        os.link(draft, path)  # whole or not at all, and only one can
    except FileExistsError:
        found = holder(str(path))
        if found is None:  # it was let go of just now
            return _take(path, draft, claim)
        if (found["run"], found["device"]) != (claim["run"], claim["device"]):
            return found
        draft.replace(path)
    return None


# ── the code ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def unpack(wheel: str, sha256: str, target: str) -> bool:
    """Make `target` hold the files of a wheel whose hash is `sha256`; False when it is there already.

    Raises ValueError when the wheel is another one.
    """
    import shutil
    import zipfile

    source, folder = Path(wheel).expanduser(), Path(target).expanduser()
    if folder.is_dir():
        return False
    found = _hash(source)
    if found != sha256:
        raise ValueError(f"{source} holds {found}, not what its name says: remove it and deploy again")
    draft = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(source) as archive:
            archive.extractall(draft)
        _sync_tree(draft)  # what a power cut leaves half must not stand under its name
        with contextlib.suppress(OSError):  # somebody else was faster: the same hash is the same content
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _hash(path: Path) -> str:
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


# ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────────
def survey(folder: str) -> dict[str, Any]:
    """What stands in the testbed's folder of a device.

    {"holder": `holder`, "runs": [`_run_there`], "content_bytes", "code_bytes", "environment": whether there is one,
    "free_bytes": of its file system, or None without the folder}.
    """
    import shutil

    root = Path(folder).expanduser()
    return {
        "holder": holder(str(root / "lock.json")),
        "runs": [_run_there(spool) for spool in _spools(root)],
        "content_bytes": _size(root / "content"),
        "code_bytes": _size(root / "code"),
        "environment": (root / "env" / "bin" / "python").exists(),
        "free_bytes": shutil.disk_usage(root).free if root.is_dir() else None,
    }


def read_log(folder: str, run: str, device: str, name: str, offset: int) -> dict[str, Any]:
    """`read_spool_log` of the run's spool."""
    ours = {(run, None), (run, device)}
    found = (
        read_spool_log(spool, name, offset) for spool in _spools(Path(folder).expanduser()) if _names(spool) in ours
    )
    return next((piece for piece in found if piece), {})


def read_spool_log(spool: Path, name: str, offset: int, most_bytes: int = 1 << 20) -> dict[str, Any]:
    """A piece of a log, from `offset` on (negative: from its end): {"text", "offset" to go on from}; {} without one."""
    try:
        with (spool / name).open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            start = max(0, size + offset) if offset < 0 else min(offset, size)
            log.seek(start)
            read = log.read(most_bytes)
    except FileNotFoundError:
        return {}
    return {"text": read.decode(errors="replace"), "offset": start + len(read)}


def end_agents(folder: str, run: str, patience_seconds: float = 20.0) -> list[str]:
    """End the run's agents, as its controller would, and let go of the device; the spools they worked on."""
    root, ended = Path(folder).expanduser(), []
    for spool in (spool for spool in _spools(root) if _names(spool)[0] == run and agent_alive(spool)):
        _end(spool, patience_seconds)
        ended.append(str(spool))
    release(str(root / "lock.json"), run)
    return ended


def tidy(folder: str, runs: list[str] | None, contents: bool) -> dict[str, Any]:
    """Remove spools of these runs (None: of all) and, where nobody is at work, the contents and our code.

    {"runs": those removed, "bytes": freed, "busy": runs that were left alone because an agent is at work on them, or
    because they hold the device: such a run may be sending what it needs}.
    """
    import shutil

    root = Path(folder).expanduser()
    found = [(spool, _names(spool)[0]) for spool in _spools(root)]
    busy = sorted({run for spool, run in found if agent_alive(spool)} | _holding(root))
    gone = sorted({run for _, run in found if run not in busy and (runs is None or run in runs)})
    targets = [root / "runs" / run for run in gone]
    if contents and not busy:
        targets += [root / "content", root / "code"]
    freed = sum(_size(target) for target in targets)
    for target in targets:
        shutil.rmtree(target, ignore_errors=True)
    return {"runs": gone, "bytes": freed - sum(_size(target) for target in targets), "busy": busy}


def _holding(root: Path) -> set[str]:
    found = holder(str(root / "lock.json"))
    return set() if found is None or found["stale"] else {found["run"]}


def _spools(root: Path) -> list[Path]:
    """Of a board runs/RUN/spool; where devices share a machine, runs/RUN/DEVICE/spool."""
    return sorted([*root.glob("runs/*/spool"), *root.glob("runs/*/*/spool")])


def _names(spool: Path) -> tuple[str, str | None]:
    """The run of a spool, and the device where it shares its machine."""
    above = spool.parent
    return (above.name, None) if above.parent.name == "runs" else (above.parent.name, above.name)


def _run_there(spool: Path) -> dict[str, Any]:
    run, device = _names(spool)
    waiting = len(list(spool.glob("jobs/*/outcome.json")))
    return {"run": run, "device": device, "agent_alive": agent_alive(spool), "waiting": waiting, "bytes": _size(spool)}


def _end(spool: Path, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    pid = json.loads((spool / "agent.state").read_text(encoding="utf-8"))["pid"]
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    while agent_alive(spool):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the agent in {spool} (process {pid}) does not end; kill it by hand")
        time.sleep(0.01)  # the lock of somebody else's process cannot be waited for with a limit


def _size(folder: Path) -> int:
    """Bytes of the files in a folder that may be changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(place) / name).st_blocks * 512
    return total


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _clock() -> float:
    """Seconds since the kernel started, sleep included; nobody sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _first_process_started() -> int:
    """Clock ticks since the kernel started; in a container, of its own first process."""
    try:
        stat = Path("/proc/1/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # hidden from users where /proc is mounted so
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _seconds_since_boot() -> float:
    return _clock() - _first_process_started() / os.sysconf("SC_CLK_TCK")


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb for verb in (hold, holder, release, bar, unpack, survey, read_log, end_agents, tidy)
}


def in_words(error: OSError) -> tuple[str, str]:
    """What the system says, for the user: the name of an error, and its text."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "DiskError", f"no space left for {error.filename or 'what was to be written'}"
    where = f"{error.filename}: " if error.filename else ""
    return "DeviceError", f"{where}{error.strerror or error}"


def main(verb: str) -> int:
    """Do one verb; its arguments are on stdin."""
    try:
        arguments = json.load(sys.stdin)
        said = wrong_board(arguments) or {"answer": VERBS[verb](**arguments)}
    except OSError as error:
        kind, text = in_words(error)
        said = {"error": text, "kind": kind}
    except Exception as error:  # noqa: BLE001 -- the top of a process: whatever happens is one line
        said = {"error": str(error) or type(error).__name__, "kind": "DeviceError"}
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
