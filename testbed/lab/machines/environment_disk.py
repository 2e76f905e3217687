"""A disk with Python packages for virtual boards, so that nothing is installed inside: emulated, pip takes very long.

Its file system has the label edge-testbed; the Debian recipe mounts it at /srv/edge-testbed.  On it is a virtual
environment of the board's own Python: the wheels that `testbed provision` would take, unpacked.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from testbed.cache import cache_folder
from testbed.device_images.debian import ARCHITECTURES
from testbed.errors import UsageError
from testbed.programs import run
from testbed.provision import wheels
from testbed.provision.environment_torch import CPU, PYPI, TorchBuild
from testbed.provision.step import Say
from testbed.provision.wheels import Target, Wheel

PYTHON = "/srv/edge-testbed/env/bin/python"
LABEL = "edge-testbed"
#: Debian 13's.
_VERSION, _GLIBC = "3.13", (2, 41)
#: The login user of a cloud-init system is the first: Python keeps compiled files beside the packages.
_FIRST_USER = 1000
_ROOM_BYTES = 512 << 20  # for them


@dataclass(frozen=True)
class _Packages:
    """What is on such a disk: the lock's wheels and a build of torch."""

    target: Target
    torch: TorchBuild
    architecture: str

    @property
    def lines(self) -> tuple[str, ...]:
        return wheels.requirements(wheels.lock_file(), self.target, self.torch.beside)

    @property
    def disk(self) -> Path:
        key = wheels.fingerprint((*self.lines, self.torch.requirement))[:16]
        return cache_folder() / "images" / f"environment-{self.architecture}-{key}.qcow2"

    def gather(self, say: Say) -> tuple[Wheel, ...]:
        return wheels.gather(self.lines, self.torch, self.target, None, say)


def environment_disk(architecture: str, say: Say) -> Path:
    """The disk, in qcow2, out of the cache if it is there; raises UsageError where wheels cannot be had.

    Torch comes from its own index; on arm64 from PyPI where that is out of reach.
    """
    machine = next(machine for machine, name in ARCHITECTURES.items() if name == architecture)
    target = Target(_VERSION, machine, _GLIBC)
    choices = [_Packages(target, build, architecture) for build in (CPU, PYPI) if machine in build.machines]
    for packages in choices:
        if packages.disk.is_file():
            return packages.disk
    packages, found = _gathered(choices, say)
    _make(found, target, packages.disk, say)
    return packages.disk


def _gathered(choices: list[_Packages], say: Say) -> tuple[_Packages, tuple[Wheel, ...]]:
    first, *others = choices
    try:
        return first, first.gather(say)
    except UsageError as error:
        if not others:
            raise UsageError(f"{error}; or make the lab with --no-environment") from None
        say(f"{error}; trying {others[0].torch.index}")
    return _gathered(others, say)


def _make(found: tuple[Wheel, ...], target: Target, disk: Path, say: Say) -> None:
    disk.parent.mkdir(parents=True, exist_ok=True)
    tree, draft = disk.with_suffix(f".{os.getpid()}.tree"), disk.with_suffix(f".{os.getpid()}.ext4")
    try:
        say(f"unpacking {len(found)} wheels")
        _unpack(found, target, tree / "env")
        say("writing the disk of Python packages")
        size = sum(path.lstat().st_size for path in tree.rglob("*")) * 5 // 4 + _ROOM_BYTES
        run(["mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-d", str(tree), str(draft), f"{size >> 10}k"])
        run(["qemu-img", "convert", "-O", "qcow2", str(draft), f"{draft}.qcow2"])
        Path(f"{draft}.qcow2").replace(disk)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        for path in (draft, Path(f"{draft}.qcow2")):
            path.unlink(missing_ok=True)


def _unpack(found: tuple[Wheel, ...], target: Target, environment: Path) -> None:
    packages = environment / "lib" / f"python{target.python}" / "site-packages"
    packages.mkdir(parents=True)
    platforms = [word for platform in target.platforms for word in ("--platform", platform)]
    run([
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-index"),
        *("--no-deps", "--no-compile", "--only-binary=:all:", "--implementation", "cp"),
        *("--python-version", target.python, *platforms, "--target", str(packages)),
        *(str(wheel.path) for wheel in found),
    ])  # fmt: skip
    (environment / "bin").mkdir()
    (environment / "bin" / "python").symlink_to("/usr/bin/python3")
    text = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n"
    (environment / "pyvenv.cfg").write_text(text, encoding="utf-8")
    if os.geteuid() == 0:
        for path in (environment, *environment.rglob("*")):
            os.lchown(path, _FIRST_USER, _FIRST_USER)
