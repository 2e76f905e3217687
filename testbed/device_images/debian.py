"""The Debian image for virtual boards: a root file system by mmdebstrap, on a disk that QEMU boots directly.

device_images/debian/base/packages.txt         what is installed
device_images/debian/base/before-packages.sh   hooks of mmdebstrap, with the root's path as their argument
device_images/debian/base/after-packages.sh

Packages are checked by the archive's signature (Debian's keyring on this machine).  Nothing of one board is in the
image: that comes by `testbed image render` and cloud-init.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.cache import cache_folder, held
from testbed.device_images import catalogue
from testbed.errors import UsageError
from testbed.programs import lacking, run

if TYPE_CHECKING:
    from testbed.provision.step import Say

SUITE = "trixie"
#: Debian's name of an architecture, by the kernel's.
ARCHITECTURES = {"aarch64": "arm64", "x86_64": "amd64"}
#: A virtual size: the file is as large as what was written into it.
_DISK_SIZE = "8G"
#: mmdebstrap mounts /proc, /sys and /dev into the root.  In a namespace of its own they are gone when it is, however it
#: ends: else, removing a root that is half done would go on through them.
_ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--")
_TOOLS = {"unshare": "util-linux", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils"}


@dataclass(frozen=True)
class DebianImage:
    """A finished image, in a folder of its own."""

    folder: Path
    architecture: str  # "arm64" or "amd64"

    @property
    def disk(self) -> Path:
        """One ext4 file system without partitions, in QEMU's qcow2."""
        return self.folder / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def whole(self) -> bool:
        return all(path.is_file() for path in (self.disk, self.kernel, self.initrd))


def native_architecture() -> str:
    """Of this machine; raises UsageError where Debian's images are not for it."""
    found = ARCHITECTURES.get(platform.machine())
    if found is None:
        raise UsageError(f"there is no image for {platform.machine()}; there are images for arm64 and amd64")
    return found


def kept(architecture: str) -> DebianImage | None:
    """The image of this recipe that was built before, if it was."""
    image = _place(architecture)
    return image if image.whole else None


def build(architecture: str, say: Say) -> DebianImage:
    """The image, out of the cache if it is there.

    Takes about a minute for this machine's own architecture, and some twenty for another one, whose programs are
    emulated.  Raises UsageError with everything that lacks.
    """
    image = _place(architecture)
    with held(image.folder, say):
        if not image.whole:
            check_machine(architecture)
            _make(image, say)
    return image


def check_machine(architecture: str) -> None:
    """Raises UsageError where the image cannot be built here."""
    missing = lacking(_TOOLS)
    problems = [f"there is no {', no '.join(missing)}"] if missing else []
    if os.geteuid() != 0:
        problems.append("a root file system has files of many users, which only root may write: use sudo")
    if architecture != ARCHITECTURES.get(platform.machine()) and not _runs(architecture):
        problems.append(
            f"{architecture} programs cannot be run here: install qemu-user-static (in a container also mount "
            "binfmt_misc and register it), or take this machine's own architecture"
        )
    if problems:
        raise UsageError(f"the Debian image for {architecture} cannot be built here: {'; '.join(problems)}")


def _runs(architecture: str) -> bool:
    machine = next(machine for machine, name in ARCHITECTURES.items() if name == architecture)
    return Path("/proc/sys/fs/binfmt_misc", f"qemu-{machine}").exists()


def _place(architecture: str) -> DebianImage:
    if architecture not in ARCHITECTURES.values():
        raise UsageError(f"there is no Debian image for {architecture!r}; there are arm64 and amd64")
    name = f"debian-{SUITE}-{architecture}-{_digest()}"
    return DebianImage(cache_folder() / "images" / name, architecture)


def _base() -> Path:
    return catalogue.folder() / "debian" / "base"


def _digest() -> str:
    digest = hashlib.sha256(_DISK_SIZE.encode())
    for path in sorted(_base().iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _make(image: DebianImage, say: Say) -> None:
    root, draft = image.folder / "root", image.folder / "disk.ext4"
    part = image.disk.with_name(f"{image.disk.name}.part")
    try:
        _install(root, image.architecture, say)
        say("writing the disk")
        for name, target in (("vmlinuz", image.kernel), ("initrd.img", image.initrd)):
            shutil.copyfile(_linked(root, name), target)
        run(["mke2fs", "-q", "-t", "ext4", "-L", "edge-root", "-d", str(root), str(draft), _DISK_SIZE])
        run(["qemu-img", "convert", "-O", "qcow2", str(draft), str(part)])
        part.replace(image.disk)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        for file in (draft, part):
            file.unlink(missing_ok=True)


def _linked(root: Path, name: str) -> Path:
    """What a link such as /vmlinuz leads to, within the root."""
    return root / str((root / name).readlink()).lstrip("/")


def _install(root: Path, architecture: str, say: Say) -> None:
    base = _base()
    lines = (line.partition("#")[0].strip() for line in (base / "packages.txt").read_text("utf-8").splitlines())
    packages = [f"linux-image-cloud-{architecture}", *filter(None, lines)]
    words = [
        *("--mode=root", "--variant=minbase", "--format=directory"),
        *(f"--architectures={architecture}", f"--include={','.join(packages)}"),
        *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"),
        *("--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io"),
        f'--essential-hook=sh {shlex.quote(str(base / "before-packages.sh"))} "$1"',
        f'--customize-hook=sh {shlex.quote(str(base / "after-packages.sh"))} "$1"',
        *(SUITE, str(root)),
    ]
    shutil.rmtree(root, ignore_errors=True)
    _mmdebstrap(words, say)


def _mmdebstrap(words: list[str], say: Say) -> None:
    """Tells its progress; raises UsageError with the last that it said."""
    process = subprocess.Popen(
        [*_ALONE, "mmdebstrap", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    last = ""
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last = line.strip() or last
                if line.startswith("I: "):
                    say(line[3:].strip())
        except BaseException:
            process.kill()  # and all that is in its namespace with it
            process.stderr.read()  # until the last of them is gone: they write into what is removed next
            raise
    if process.returncode:
        raise UsageError(f"mmdebstrap failed ({process.returncode}): {last}")
