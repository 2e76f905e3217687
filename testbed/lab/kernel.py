"""System calls that Python 3.11 has no function for.  Each raises OSError."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

NEW_TIME = 0x80
NEW_MOUNTS = 0x20000
NEW_CGROUPS = 0x2000000
NEW_NAMES = 0x4000000
NEW_IPC = 0x8000000
NEW_PIDS = 0x20000000
NEW_NETWORK = 0x40000000

READ_ONLY = 1
NO_SUID, NO_DEVICES, NO_PROGRAMS = 2, 4, 8
REMOUNT = 32
BIND = 4096
RECURSIVE = 16384
PRIVATE = 1 << 18
DETACH = 2

#: What root of a host must not be able to do, because it would do it to the whole machine.
CAPABILITIES_TO_DROP = {
    "CAP_SYS_MODULE": 16,
    "CAP_SYS_RAWIO": 17,
    "CAP_SYS_TIME": 25,
    "CAP_MKNOD": 27,
    "CAP_MAC_OVERRIDE": 32,
    "CAP_MAC_ADMIN": 33,
}

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave these namespaces for new ones."""
    _call("unshare", ctypes.c_int(flags))


def set_namespace(descriptor: int, flag: int) -> None:
    """Enter the namespace that an open file of /proc/PID/ns stands for."""
    _call("setns", ctypes.c_int(descriptor), ctypes.c_int(flag))


def mount(source: str, target: Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = (source.encode(), str(target).encode(), kind.encode() or None)
    _call("mount", *arguments, ctypes.c_ulong(flags), options.encode() or None, about=str(target))


def bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Let a file or folder appear at another place too."""
    mount(str(source), target, flags=BIND)
    if read_only:
        mount("", target, flags=BIND | REMOUNT | READ_ONLY)


def make_root(folder: Path) -> None:
    """A mounted folder becomes the root of this mount namespace; what was there goes out of sight."""
    os.chdir(folder)
    _call("pivot_root", b".", b".", about=str(folder))
    _call("umount2", b".", ctypes.c_int(DETACH))
    os.chdir("/")


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this signal to us when the process that started us ends, however it does."""
    _call("prctl", ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal_number))


def drop_capabilities() -> None:
    """Nothing that is started from now on can have `CAPABILITIES_TO_DROP`, root or not."""
    for number in CAPABILITIES_TO_DROP.values():
        _call("prctl", ctypes.c_int(_PR_CAPBSET_DROP), ctypes.c_ulong(number))


def _call(name: str, *arguments: object, about: str | None = None) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}", about)
