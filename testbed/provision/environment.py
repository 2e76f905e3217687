"""What a device's Python environment shall be: the steps that compare and say what to do.

1. python       an interpreter of at least 3.10: the system's, or one out of an archive that the user gives
2. code         our code and the methods, as a wheel by its hash, unpacked under FOLDER/code
3. environment  FOLDER/env with torch for the board and the locked packages, described by env/testbed.json
4. proof        that it works there, and what an empty trainer takes

Where the inventory names an interpreter (`python:`), nothing is installed: it is proved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.devices import _board
from testbed.errors import TestbedError
from testbed.node.runtime import TRAINER_ENVIRONMENT
from testbed.provision import environment_build, wheels
from testbed.provision.environment_build import Installation, Wanted
from testbed.provision.environment_facts import PROOF_RECORD
from testbed.provision.environment_python import archive_change, archive_version
from testbed.provision.environment_torch import MINIMUM_GLIBC, NoTorchError, TorchBuild, device_machine, torch_build
from testbed.provision.site import way_to
from testbed.provision.step import Change, Note, Problem
from testbed.provision.wheels import Target

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device
    from testbed.provision.step import Facts, Say, Step

_OLDEST = (3, 10)
_UNTRIED = "trainers run inside a root file system of --rootfs-archive; that is untried on any board"
_ENVIRONMENT = hashlib.sha256(json.dumps(TRAINER_ENVIRONMENT, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EnvironmentOptions:
    """What the user decides about environments.

    air_gapped      the device downloads nothing: wheels go through the controller
    wheelhouse      a folder with all wheels: the controller downloads nothing either (means air_gapped)
    python_archive  a standalone CPython (.tar.gz or .tar.xz with python/bin/python3 in it), for boards whose own is too
                    old
    rootfs_archive  a Debian arm64 root file system with Python, for boards whose glibc is too old
    lock            instead of the one that comes with the testbed
    others          devices that contents may come through (`via`): all of the inventory
    """

    air_gapped: bool = False
    wheelhouse: Path | None = None
    python_archive: Path | None = None
    rootfs_archive: Path | None = None
    lock: Path | None = None
    others: tuple[Device, ...] = ()

    @property
    def lock_file(self) -> Path:
        return self.lock or wheels.lock_file()


def steps(device: Device, options: EnvironmentOptions | None = None) -> tuple[Step, ...]:
    """The steps for a device, in their order."""
    chosen = options or EnvironmentOptions()
    if device.python is not None:
        return (GivenPython(), Code(chosen), Proof(chosen))
    return (Python(chosen), Code(chosen), Environment(chosen), Proof(chosen))


@dataclass(frozen=True)
class GivenPython:
    """The interpreter that the inventory names: is it there, and new enough?"""

    name = "python"

    def check(self, facts: Facts, device: Device) -> Change | Problem | None:
        given = _python_facts(facts).get("given") or {}
        if not given.get("version"):
            return Problem(self.name, f"python: {device.python} cannot be started there", fatal=True)
        if _numbers(given["version"])[:2] < _OLDEST:
            text = f"python: {device.python} is Python {given['version']}, and 3.10 is the oldest that will do"
            return Problem(self.name, text, fatal=True)
        return None


@dataclass(frozen=True)
class Python:
    """An interpreter to make the environment with."""

    options: EnvironmentOptions
    name = "python"

    def check(self, facts: Facts, device: Device) -> Change | Problem | Note | None:
        try:
            path, _ = _interpreter(facts, device, self.options, torch_build(device, facts))
        except (NoTorchError, _LacksPythonError, TestbedError) as error:
            return Problem(self.name, str(error), fatal=True)
        there = [candidate["path"] for candidate in _python_facts(facts).get("candidates") or ()]
        if path not in there:
            return archive_change(self.name, facts, device, self.options)
        return Note(self.name, _UNTRIED) if _glibc(facts) < MINIMUM_GLIBC else None


@dataclass(frozen=True)
class Code:
    """Our code there, by its hash."""

    options: EnvironmentOptions
    name = "code"

    def check(self, facts: Facts, device: Device) -> Change | Problem | None:
        wanted = environment_build.our_code().sha256
        there = _environment_facts(facts).get("code") or ()
        if wanted in there:
            return None
        found = f"{len(there)} other version{'s' * (len(there) != 1)}" if there else "none"

        def act(connection: Connection, say: Say) -> None:
            python = _python_now(facts, device, self.options)
            way = way_to(device, python, self.options.others)
            environment_build.put_code(connection, say, _board.folder(device), way)

        return Change(self.name, found, f"our code {wanted[:12]}", action=act)


@dataclass(frozen=True)
class Environment:
    """FOLDER/env, as the lock and the board want it."""

    options: EnvironmentOptions
    name = "environment"

    def check(self, facts: Facts, device: Device) -> Change | Problem | None:
        try:
            wanted, how = _plan(facts, device, self.options)
        except (NoTorchError, _LacksPythonError, TestbedError) as error:
            return Problem(self.name, str(error), fatal=True)
        record = _environment_facts(facts).get("record") or {}
        if record.get("wanted") == wanted.key:
            return None

        def act(connection: Connection, say: Say) -> None:
            environment_build.build(connection, say, wanted, how)

        return Change(self.name, _in_words(record.get("wanted")), _in_words(wanted.key), action=act)


@dataclass(frozen=True)
class Proof:
    """That the environment works, and what an empty trainer takes in it."""

    options: EnvironmentOptions
    name = "proof"

    def check(self, facts: Facts, device: Device) -> Change | Problem | Note | None:
        try:
            key = self._key(facts, device)
        except (NoTorchError, _LacksPythonError, TestbedError) as error:
            return Problem(self.name, str(error), fatal=True)
        proof = _environment_facts(facts).get("proof") or {}
        if proof.get("key") == key and proof.get("baseline"):
            return self._of_another_gpu(facts, device)
        found = "none" if not proof else "a proof of another environment"
        accelerator = f", {device.accelerator}" if device.accelerator != "cpu" else ""
        wanted = f"a pass of torch, and an empty trainer measured ({device.threads} threads{accelerator})"

        def act(connection: Connection, say: Say) -> None:
            folder = _board.folder(device)
            code = f"{folder}/code/{environment_build.our_code().sha256}"
            path = f"{folder}/{PROOF_RECORD.format(device.name)}"
            environment_build.prove_and_measure(connection, say, path, _board.python(device), code, key)

        return Change(self.name, found, wanted, action=act)

    def _of_another_gpu(self, facts: Facts, device: Device) -> Note | None:
        """A Jetson's GPU for which torch has no code of its own: the proof has passed, and NVIDIA promises nothing."""
        environment = _environment_facts(facts)
        own, built = environment.get("capability"), environment.get("architectures") or []
        if device.kind != "jetson" or own is None or own in built:
            return None
        text = f"torch {environment['torch']} computes there, and was built for {_list(built)}, not for {own}"
        return Note(self.name, f"{text}: NVIDIA promises for no Jetson that it runs code for another GPU")

    def _key(self, facts: Facts, device: Device) -> dict[str, Any]:
        """What a proof is valid for."""
        if device.python is not None:
            python = _python_facts(facts)
            of: Mapping[str, Any] = {
                "path": device.python,
                "python": (python.get("given") or {}).get("version"),
                "packages": python.get("packages"),
            }
        else:
            of = _plan(facts, device, self.options)[0].key
        return {
            "environment": dict(of),
            "kernel": _environment_facts(facts).get("kernel"),
            "trainer": _ENVIRONMENT,
            "threads": device.threads,
            "accelerator": device.accelerator,
        }


# ── what is chosen for a board ───────────────────────────────────────────────────────────────────────────────────────
class _LacksPythonError(ValueError):
    """There is no interpreter that will do; the text has the way out."""


def _plan(facts: Facts, device: Device, options: EnvironmentOptions) -> tuple[Wanted, Installation]:
    build = torch_build(device, facts)
    path, version = _interpreter(facts, device, options, build)
    glibc = max(_glibc(facts), MINIMUM_GLIBC)  # an older board runs it in a root file system that has a newer one
    target = Target(version, device_machine(device, facts), glibc)
    lines = wheels.requirements(options.lock_file, target, build.beside)
    wanted = Wanted(version, target.machine, build, tuple(line for line in lines if not line.startswith("pip==")))
    air_gapped = options.air_gapped or options.wheelhouse is not None
    way = way_to(device, path, options.others)
    how = Installation(_board.folder(device), path, way, target, options.lock_file, air_gapped, options.wheelhouse)
    return wanted, how


def _interpreter(facts: Facts, device: Device, options: EnvironmentOptions, build: TorchBuild) -> tuple[str, str]:
    """(path, "3.11") of the interpreter that the environment is made with.

    The first that the build has wheels for: the system's own `python3` before others.  One that is about to be unpacked
    counts as there.
    """
    machine, glibc = device_machine(device, facts), _glibc(facts)
    if glibc < MINIMUM_GLIBC and options.rootfs_archive is None:
        raise _LacksPythonError(
            f"glibc {glibc[0]}.{glibc[1]} is older than every current torch accepts (2.28); give a Debian arm64 root "
            f"file system with `--rootfs-archive FILE`: trainers then run inside it, on the CPU (untried on any board)"
        )
    for candidate in _python_facts(facts).get("candidates") or ():
        version = ".".join(candidate["version"].split(".")[:2])
        if version in build.pythons and (glibc >= MINIMUM_GLIBC or _own(candidate["path"])):
            return candidate["path"], version
    archive = options.rootfs_archive if glibc < MINIMUM_GLIBC else options.python_archive
    if archive is not None:
        version = archive_version(archive, machine)
        if version in build.pythons:
            return f"{_board.folder(device)}/python/bin/python3", version
        raise _LacksPythonError(f"{archive} holds Python {version}, and {build.text} has {_list(build.pythons)}")
    there = [candidate["version"] for candidate in _python_facts(facts).get("candidates") or ()]
    raise _LacksPythonError(
        f"{build.text} needs Python {_list(build.pythons)}, and there is {_list(there) or 'none'}; install one there, "
        f"or give a standalone CPython for {machine} with `--python-archive FILE` (an archive `install_only` of "
        f"github.com/astral-sh/python-build-standalone)"
    )


def _python_now(facts: Facts, device: Device, options: EnvironmentOptions) -> str:
    """The interpreter to run small programs with, before there is an environment."""
    if device.python is not None:
        return device.python
    return _interpreter(facts, device, options, torch_build(device, facts))[0]


def _own(path: str) -> bool:
    return path.endswith("/python/bin/python3")


def _python_facts(facts: Facts) -> Mapping[str, Any]:
    return facts.get("python") or {}


def _environment_facts(facts: Facts) -> Mapping[str, Any]:
    return facts.get("environment") or {}


def _glibc(facts: Facts) -> tuple[int, int]:
    """Of the device; where it could not be found out, the oldest that will do."""
    text = _environment_facts(facts).get("glibc") or (facts.get("board") or {}).get("glibc")
    numbers = _numbers(str(text or ""))
    return (numbers[0], numbers[1]) if len(numbers) >= 2 else MINIMUM_GLIBC


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _list(versions: tuple[str, ...] | list[str]) -> str:
    return ", ".join(versions)


def _in_words(key: Mapping[str, str] | None) -> str:
    if not key:
        return "none"
    return f"torch {key['torch']} and lock {key['lock'][:8]} on Python {key['python']}"
