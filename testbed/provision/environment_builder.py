"""What runs on a device to build its environment; complete in itself, standard library only.

    python -I -c "the text of this file" VERB        (arguments: a JSON object on stdin)

The answer is the last line, {"answer": …} or {"error": text}.  The environment grows in FOLDER/env.partial, in stages
that are marked when they are done, so that an interrupted build goes on where it stopped; it takes its place by a
rename, when it is whole.

A builder goes on when the controller's link breaks.  It works in a process group of its own, and holds a lock that
names the group: the next builder ends it, pip included, and takes over what it has left.  (The controller holds the
device: of two builders, the earlier one has nobody any more.)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

#: In FOLDER: held by the builder at work and by all that it has started; in it, the number of their process group.
BUILDER_LOCK = "env.partial.lock"
_PARTIAL, _WANTED, _DONE = "env.partial", "testbed-wanted.json", "testbed-done"
_TAIL_LINES = 3


def begin(folder: str, wanted: dict[str, Any]) -> list[str]:
    """Make FOLDER/env.partial, a virtual environment without pip; gives the stages that are done there already."""
    partial = _partial(folder)
    if _read(partial / _WANTED) != wanted:
        shutil.rmtree(partial, ignore_errors=True)
        _run([sys.executable, "-I", "-m", "venv", "--without-pip", str(partial)])
        if wrapper := os.environ.get("TESTBED_WRAPPER"):
            _wrap(partial / "bin", Path(wrapper))
        (partial / _DONE).mkdir()
        write(str(partial / _WANTED), wanted)
    return sorted(path.name for path in (partial / _DONE).iterdir())


def install(
    folder: str, stage: str, pip: str, requirements: list[str], wheels: dict[str, str], index: str | None
) -> None:
    """Install requirements into env.partial with the pip in the wheel FOLDER/content/PIP, and mark the stage.

    wheels    file name → hash of wheels in FOLDER/content: nothing else is looked at.  {}: from the index (None: the
              one that this machine's pip knows)
    """
    partial = _partial(folder)
    content = partial.parent / "content"
    scratch = partial / "scratch"  # /tmp may be a small part of a small memory
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "wheels").mkdir(parents=True)
    for name, sha256 in wheels.items():
        (scratch / "wheels" / name).symlink_to(content / sha256)
    (scratch / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    hashed = bool(requirements) and all("--hash=" in line for line in requirements)
    command = [str(partial / "bin" / "python"), "-I", str(content / pip / "pip"), "install", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--no-warn-script-location"]
    command += ["--ignore-installed"]  # what an interrupted installation has left cannot be uninstalled
    command += ["--require-hashes"] if hashed else []
    command += ["--no-index", "--find-links", str(scratch / "wheels")] if wheels else []
    command += ["--index-url", index] if index and not wheels else []
    variables = dict(os.environ, TMPDIR=str(scratch), PIP_ROOT_USER_ACTION="ignore")
    if wheels:
        variables = {name: value for name, value in variables.items() if not name.startswith("PIP_")}
        variables["PIP_CONFIG_FILE"] = os.devnull
    _run([*command, "--requirement", str(scratch / "requirements.txt")], variables)
    shutil.rmtree(scratch)
    (partial / _DONE / stage).touch()


def preload(folder: str, libraries: list[str]) -> None:
    """Have every Python of env.partial load these libraries (globs below site-packages) before anything else.

    For wheels that link libraries of other wheels without saying where they are.
    """
    (site,) = _partial(folder).glob("lib/python3*/site-packages")
    lines = [f"import ctypes, glob, os\nfolder = os.path.dirname(__file__)\nfor name in {libraries!r}:"]
    lines += ["    for path in glob.glob(os.path.join(folder, name)):"]
    lines += ["        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)\n"]
    (site / "_testbed_libraries.py").write_text("\n".join(lines), encoding="utf-8")
    (site / "testbed-libraries.pth").write_text("import _testbed_libraries\n", encoding="utf-8")


def finish(folder: str, record: dict[str, Any]) -> None:
    """Put env.partial in its place, with the record of what it is."""
    partial = _partial(folder)
    for script in (partial / "bin").iterdir():
        if not script.name.startswith("python"):  # they name a folder that will not be there
            script.unlink()
    shutil.rmtree(partial / _DONE)
    (partial / _WANTED).unlink()
    write(str(partial / "testbed.json"), record)
    place, old = partial.with_name("env"), partial.with_name("env.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def write(path: str, record: dict[str, Any]) -> None:
    """A record, as one line of JSON; whole or not at all."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    draft.write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
    draft.replace(target)


def _partial(folder: str) -> Path:
    return Path(folder).expanduser() / _PARTIAL


def _wrap(scripts: Path, wrapper: Path) -> None:
    """Have the environment's interpreter entered as ours was: it exists inside a root file system only."""
    (scripts / "python.inner").symlink_to(sys.executable)
    for name in ("python", "python3"):
        (scripts / name).unlink()
        shutil.copy2(wrapper, scripts / name)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _run(command: list[str], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(  # the builder's lock is for it to hold, too
        command, capture_output=True, text=True, env=variables, check=False, close_fds=False
    )
    if done.returncode:
        raise RuntimeError(_in_words(done.stderr or done.stdout) or f"{command[0]}: exit code {done.returncode}")


def _in_words(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return "the disk is full"
    if re.search(r"Retrying \(|Could not fetch URL|connection error", said):
        return "the package index cannot be reached from there; provision with `--air-gapped`"
    if found := re.search(r"No matching distribution found for (\S+)", said):
        return f"there is no wheel of {found[1]} for this Python and machine in the index"
    if "DO NOT MATCH THE HASHES" in said:
        return "a wheel is not the one that the lock names by its hash"
    errors = [line for line in lines if line.startswith("ERROR")]
    return " / ".join(errors[-_TAIL_LINES:] or lines[-1:])


def _be_alone(folder: Path) -> None:
    """Be the only builder there, from now on; one that is at work has lost its controller, and is ended."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / BUILDER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ProcessLookupError, ValueError):  # it has just ended, or just begun
            os.killpg(int(os.read(lock, 32)), signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpgrp()).encode(), 0)


def _look_after(worker: int) -> int:
    """Wait for the worker; who ends us (the time-out of the controller's command) ends its whole group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.killpg(worker, signal.SIGKILL))
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    return code if code >= 0 else 128 - code


def main(verb: str) -> int:
    """Do one verb, in a process group of its own."""
    worker = os.fork()
    os.setpgid(worker, 0)  # in both, because nobody knows who is first
    return _look_after(worker) if worker else _work(verb)


def _work(verb: str) -> int:
    try:
        verbs = {"begin": begin, "install": install, "preload": preload, "finish": finish, "write": write}
        arguments = json.load(sys.stdin)
        if verb != "write":  # which touches no environment that grows
            _be_alone(_partial(arguments["folder"]).parent)
        said: dict[str, Any] = {"answer": verbs[verb](**arguments)}  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 -- the top of a process: whatever happens is one line
        said = {"error": str(error) or type(error).__name__}
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
