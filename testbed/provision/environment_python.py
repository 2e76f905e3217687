"""A Python that the user gives, for boards whose own is too old: pushed by hash, unpacked under FOLDER/python.

A *standalone CPython* (JetPack 5: Ubuntu 20.04 has 3.8) is an archive with `python/bin/python3` in it.  A *root file
system* (JetPack 4: glibc 2.27) is a Debian arm64 one with Python; programs enter it by `chroot` in a user namespace of
their own, so that a run needs no root.  The root file system: tried on nothing yet.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.devices import _board
from testbed.errors import DeviceError, UsageError
from testbed.provision.environment_build import put_contents
from testbed.provision.environment_torch import MINIMUM_GLIBC
from testbed.provision.step import Change
from testbed.provision.wheels import Wheel, file_hash

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import Device
    from testbed.provision.environment import EnvironmentOptions
    from testbed.provision.step import Facts, Say

_UNPACK_SECONDS = 900.0
_STANDALONE = re.compile(r"(?:\./)?python/bin/python(3\.\d+)")
_ROOTFS = re.compile(r"(?:\./)?usr/bin/python(3\.\d+)")
#: The machine in an ELF header, at byte 18: see elf(5).
_ELF_MACHINES = {0xB7: "aarch64", 0x3E: "x86_64", 0x28: "armv7l", 0x03: "i686"}
#: $1: FOLDER, $2: the archive's hash.
_UNPACK = """\
set -e
trap 'rm -rf "$1/python.partial"' EXIT
rm -rf "$1/python.partial"; mkdir -p "$1/python.partial"
tar -xf "$1/content/$2" -C "$1/python.partial"
"$1/python.partial/python/bin/python3" -I -S -c 0
rm -rf "$1/python"; mv "$1/python.partial/python" "$1/python"
"""
#: The same; the wrapper is on stdin.  Owners do not matter: in a namespace of our own, all is root's.
_UNPACK_ROOTFS = """\
set -e
trap 'rm -rf "$1/rootfs.partial"' EXIT
rm -rf "$1/rootfs.partial"; mkdir -p "$1/rootfs.partial"
tar -xf "$1/content/$2" --no-same-owner --exclude='./dev/*' --exclude='dev/*' -C "$1/rootfs.partial"
for folder in "$1" "$HOME" /proc /sys /dev /tmp; do mkdir -p "$1/rootfs.partial$folder"; done
rm -rf "$1/rootfs"; mv "$1/rootfs.partial" "$1/rootfs"
mkdir -p "$1/python/bin"; cat > "$1/python/bin/python3"; chmod 755 "$1/python/bin/python3"
"$1/python/bin/python3" -I -S -c 0
"""
#: Stands for an interpreter, two folders below the one that `rootfs` is in, and runs it inside the root file system,
#: where home and kernel folders are at the same paths.  An environment's own interpreter is beside it, `python.inner`.
_WRAPPER = """\
#!/bin/sh
bin=${0%/*}; folder=${bin%/*/*}
inner=/usr/bin/python3; test -L "$bin/python.inner" && inner=$bin/python.inner
test -n "$TESTBED_WRAPPER" && exec "$inner" "$@"
TESTBED_WRAPPER=$bin/python3; export TESTBED_WRAPPER
exec unshare --user --map-root-user --mount /bin/sh -c '
root=$1/rootfs; home=$HOME
for place in "$1" "$home" /proc /sys /dev /tmp; do mount --rbind "$place" "$root$place" || exit 126; done
work=$PWD; shift
exec chroot "$root" /bin/sh -c "cd \\"\\$0\\" 2>/dev/null || cd /; exec \\"\\$@\\"" "$work" "$@"' \\
  sh "$folder" "$inner" "$@"
"""


def archive_version(archive: Path, machine: str) -> str:
    """The version ("3.12") of the Python in an archive of either sort.

    Raises UsageError for an archive that has none, or one for another machine.
    """
    version, built_for = _look_into(archive)
    if built_for != machine:
        raise UsageError(
            f"{archive} holds a Python for {built_for}, and the board is {machine}; give one for {machine}"
        )
    return version


def archive_change(step: str, facts: Facts, device: Device, options: EnvironmentOptions) -> Change | None:
    """Push and unpack the archive that the user gives for a board like this; None where there is none."""
    environment = facts.get("environment") or {}
    old = tuple(map(int, str(environment.get("glibc") or "9.9").split(".")[:2])) < MINIMUM_GLIBC
    archive = options.rootfs_archive if old else options.python_archive
    if archive is None:
        return None
    there = [candidate["version"] for candidate in (facts.get("python") or {}).get("candidates") or ()]
    script, data = (_UNPACK_ROOTFS, _WRAPPER.encode()) if old else (_UNPACK, b"")

    def act(connection: Connection, say: Say) -> None:
        folder = _board.folder(device)
        sha256 = file_hash(archive)
        put_contents(connection, folder, [Wheel(archive, sha256)], say)
        say(f"unpacking {archive.name}")
        ran = connection.attempt(["/bin/sh", "-c", script, "sh", folder, sha256], _UNPACK_SECONDS, data=data)
        if ran.exit_code:
            said = (ran.errors.strip().splitlines() or [f"exit code {ran.exit_code}"])[0]
            raise DeviceError(f"{connection.name}: {archive} cannot be unpacked there: {said}; is the file whole?")

    return Change(step, f"Python {', '.join(there) or 'none'}", f"the Python of {archive.name}", action=act)


@cache
def _look_into(archive: Path) -> tuple[str, str]:
    """(version, machine) of the interpreter in an archive."""
    try:
        with tarfile.open(archive) as tar:
            for member, version in _interpreters(tar):
                file = tar.extractfile(member)
                header = file.read(20) if file else b""
                if header[:4] == b"\x7fELF":
                    return version, _ELF_MACHINES.get(int.from_bytes(header[18:20], "little"), "another machine")
    except (OSError, tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{archive}: expected an archive (.tar.gz, .tar.xz) with a Python, got {error}") from None
    raise UsageError(
        f"{archive}: expected python/bin/python3.x in it (a standalone CPython, `install_only`) or usr/bin/python3.x "
        f"(a root file system), found neither"
    )


def _interpreters(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    for member in tar:
        found = _STANDALONE.fullmatch(member.name) or _ROOTFS.fullmatch(member.name)
        if found and member.isfile():
            yield member, found[1]
