"""The wheels that a board needs: which ones, and how the controller comes by them for a board without a network.

The lock (inventory/node-requirements.lock) is for every Python and machine that a node may have; `requirements` takes
out of it what one target needs.  torch stands apart, because each board has its own source (environment_torch).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement

from testbed.cache import cache_folder, held
from testbed.errors import DeviceError, UsageError
from testbed.package_data import data_folder

if TYPE_CHECKING:
    from testbed.provision.environment_torch import TorchBuild
    from testbed.provision.step import Say

LOCK_NAME = "node-requirements.lock"
_LOCK_FORM = "a lock has lines NAME==VERSION --hash=sha256:… (as `uv pip compile --generate-hashes` writes them)"
_DOWNLOAD_SECONDS = 3600.0
#: The oldest glibc that wheels are named after, by its minor number, and the older names for x86-64.
_OLDEST_GLIBC = 17
_OLD_X86_64 = ("manylinux2010_x86_64", "manylinux_2_12_x86_64", "manylinux1_x86_64", "manylinux_2_5_x86_64")


@dataclass(frozen=True)
class Target:
    """A machine as wheels see it."""

    python: str  # "3.11"
    machine: str  # as `uname -m` says it
    glibc: tuple[int, int] = (2, 28)

    @property
    def text(self) -> str:
        return f"Python {self.python} on {self.machine}, glibc {self.glibc[0]}.{self.glibc[1]}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """Every platform tag that fits, the newest first: pip takes each `--platform` literally."""
        numbered = [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.glibc[1], _OLDEST_GLIBC - 1, -1)]
        old = _OLD_X86_64 if self.machine == "x86_64" else ()
        return (*numbered, f"manylinux2014_{self.machine}", *old, f"linux_{self.machine}")

    @property
    def markers(self) -> dict[str, str]:
        """The environment that markers of requirements are evaluated in."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


@dataclass(frozen=True)
class Wheel:
    """A wheel on the controller."""

    path: Path
    sha256: str

    @property
    def project(self) -> str:
        return _project(self.path.name)


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def lock_file() -> Path:
    """The lock that comes with the testbed."""
    return data_folder("inventory") / LOCK_NAME


def requirements(lock: Path, target: Target, beside: Sequence[str] = ()) -> tuple[str, ...]:
    """The lock's lines (name==version --hash=… …, without markers) for a target; `beside` replaces and adds some."""
    chosen = {_name(line): line for line in _chosen(lock, target)}
    chosen.update({_name(line): line for line in beside})
    return tuple(chosen[name] for name in sorted(chosen))


def check_lock(lock: Path) -> None:
    """Raise UsageError where a file is no lock."""
    for text, hashes in _locked(lock):
        try:
            pinned = str(Requirement(text).specifier).startswith("==")
        except InvalidRequirement:
            pinned = False
        if not (pinned and hashes):
            raise UsageError(f"{lock}: {_LOCK_FORM}, found {text[:80]!r}")


def fingerprint(lines: Sequence[str]) -> str:
    """What tells one set of requirements from another."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _chosen(lock: Path, target: Target) -> Iterator[str]:
    for text, hashes in _locked(lock):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(dict(target.markers)):
            yield " ".join((f"{requirement.name}{requirement.specifier}", *hashes))


@cache
def _locked(lock: Path) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(requirement with its marker, hashes) of every line."""
    try:
        content = lock.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{lock}: {_LOCK_FORM}, and it cannot be read: {reason}") from None
    text = re.sub(r"^\s*#.*\n?", "", content, flags=re.MULTILINE).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+(?=--hash=)", line)
        found.append((requirement, tuple(part.strip() for part in hashes)))
    return tuple(found)


def _name(line: str) -> str:
    """The project that a requirement is about."""
    return _plain(re.split(r"[=\s]", line, maxsplit=1)[0])


def _project(file_name: str) -> str:
    """The project that a wheel file is of."""
    return _plain(file_name.partition("-")[0])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ── having them ──────────────────────────────────────────────────────────────────────────────────────────────────────
def gather(
    lines: Sequence[str], torch: TorchBuild | None, target: Target, wheelhouse: Path | None, say: Say = lambda _: None
) -> tuple[Wheel, ...]:
    """The wheels of these requirements, and torch, for a target: out of the wheelhouse, or downloaded.

    Kept in the cache: the next board of the same kind, and the next time, find them there.  Raises UsageError for a
    wheel that is missing, is not the one of the lock, or is a CUDA build for a board without CUDA.
    """
    wanted = (*lines, torch.requirement) if torch else tuple(lines)
    key = fingerprint((*wanted, target.text, str(wheelhouse.resolve()) if wheelhouse else ""))[:24]
    folder = cache_folder() / "wheels" / key
    with held(folder, say):
        kept = _kept(folder)
        if kept is None:
            _fetch(lines, _Source(folder / "partial", target, wheelhouse), torch, say)
            kept = _keep(folder)
    if torch:
        _refuse_cuda(kept, torch)
    return kept


def pip_wheel(lock: Path, target: Target, wheelhouse: Path | None = None, say: Say = lambda _: None) -> Wheel:
    """The wheel that a device runs pip out of, because not every Python there can install one for itself."""
    lines = [line for line in requirements(lock, target) if _name(line) == "pip"]
    if not lines:
        raise UsageError(f"{lock}: expected a line for pip, there is none; run `make lock`")
    (wheel,) = gather(lines, None, target, wheelhouse, say)
    return wheel


@dataclass(frozen=True)
class _Source:
    """Where pip downloads to, for whom, and from where."""

    folder: Path
    target: Target
    wheelhouse: Path | None

    def command(self, *what: str) -> list[str]:
        platforms = [part for platform in self.target.platforms for part in ("--platform", platform)]
        return [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", self.target.python),
            *platforms,
            *("--retries", "2", "--timeout", "20", "--dest", str(self.folder)),
            *(("--no-index", "--find-links", str(self.wheelhouse)) if self.wheelhouse else ()),
            *what,
        ]

    @property
    def variables(self) -> dict[str, str] | None:
        """A wheelhouse is all there is: nothing that the user has configured may add to it."""
        if self.wheelhouse is None:
            return None
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        return {**kept, "PIP_CONFIG_FILE": os.devnull}


def _fetch(lines: Sequence[str], source: _Source, torch: TorchBuild | None, say: Say) -> None:
    where = str(source.wheelhouse) if source.wheelhouse else "the package index"
    with tempfile.NamedTemporaryFile("w", prefix="requirements-", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        say(f"{len(lines)} wheel{'s' * (len(lines) != 1)} for {source.target.text} from {where}")
        _pip(source.command("--require-hashes", "--requirement", file.name), source, where)
    if torch:
        say(f"{torch.requirement} for {source.target.text}")
        for half in source.folder.glob("torch-*.whl"):  # without a hash, pip takes what lies there for whole
            half.unlink()
        index = () if source.wheelhouse else ("--index-url", torch.index)
        _pip(source.command(*index, torch.requirement), source, where if source.wheelhouse else torch.index)


def _pip(command: Sequence[str], source: _Source, where: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False, env=source.variables
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{where}: the download has not ended after {_DOWNLOAD_SECONDS:.0f} s; try again") from None
    if done.returncode:
        raise UsageError(_in_words(done.stderr, source, where))


def _in_words(errors: str, source: _Source, where: str) -> str:
    """What pip said, as one message."""
    way_out = "put it there" if source.wheelhouse else "get it by hand, and give it with `--wheelhouse DIR`"
    if source.wheelhouse is None and re.search(r"Retrying \(|Could not fetch URL|connection error", errors):
        return (
            f"{where} cannot be reached from here; download the wheels for {source.target.text} where there is a "
            f"network, and give them with `--wheelhouse DIR`"
        )
    if found := re.search(r"No matching distribution found for ([^\s(]+)", errors):
        beside = _near_misses(found[1], source.wheelhouse)
        return f"{where} has no wheel of {found[1]} for {source.target.text}{beside}; {way_out}"
    if "DO NOT MATCH THE HASHES" in errors:
        names = re.findall(r"^\s{4}(\S+?==\S+|\S+) (?:.*)from ", errors, flags=re.MULTILINE)
        named = ", ".join(names) or "a wheel"
        return f"{where}: {named} is not the file that {LOCK_NAME} names by its hash; replace it by the published one"
    if "No module named pip" in errors:
        return f"{sys.executable} has no pip to download wheels with; run `{sys.executable} -m ensurepip`"
    lines = [line for line in errors.strip().splitlines() if line.startswith("ERROR")] or errors.strip().splitlines()
    return f"pip cannot get the wheels for {source.target.text} from {where}: {(lines or ['it said nothing'])[-1]}"


def _near_misses(requirement: str, wheelhouse: Path | None) -> str:
    """Other wheels of the project that lie there."""
    if wheelhouse is None or not wheelhouse.is_dir():
        return ""
    name = _name(requirement)
    others = sorted(path.name for path in wheelhouse.glob("*.whl") if _project(path.name) == name)
    cuda = [other for other in others if name == "torch" and is_cuda_build(wheelhouse / other)]
    told = ", ".join(f"{other} (a CUDA build)" if other in cuda else other for other in others)
    return f" (there is {told})" if told else ""


def _refuse_cuda(wheels: Sequence[Wheel], torch: TorchBuild) -> None:
    for wheel in wheels:
        if wheel.project == "torch" and not torch.cuda and is_cuda_build(wheel.path):
            raise UsageError(
                f"{wheel.path.name} is a CUDA build, and the board has no CUDA that could use it; wanted is "
                f"{torch.text}"
            )


def is_cuda_build(wheel: Path) -> bool:
    """Whether a wheel of torch was built for CUDA: `torch/version.py` says so."""
    with zipfile.ZipFile(wheel) as archive:
        if "torch/version.py" not in archive.namelist():
            return False
        text = archive.read("torch/version.py").decode()
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, flags=re.MULTILINE) is not None


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _kept(folder: Path) -> tuple[Wheel, ...] | None:
    """What was gathered here before, whole; None otherwise."""
    try:
        listed: Mapping[str, str] = json.loads((folder / "wheels.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = tuple(Wheel(folder / name, sha256) for name, sha256 in sorted(listed.items()))
    return found if all(wheel.path.is_file() for wheel in found) else None


def _keep(folder: Path) -> tuple[Wheel, ...]:
    for path in (folder / "partial").glob("*.whl"):
        path.replace(folder / path.name)
    found = tuple(Wheel(path, file_hash(path)) for path in sorted(folder.glob("*.whl")))
    draft = folder / f"wheels.json.{os.getpid()}"
    draft.write_text(json.dumps({wheel.path.name: wheel.sha256 for wheel in found}), encoding="utf-8")
    draft.replace(folder / "wheels.json")
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
