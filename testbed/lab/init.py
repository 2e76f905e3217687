"""The first process of a host: brings the host up in namespaces of its own, then starts its SSH server and reaps.

It is a fork of the host's keeper.  Whatever it says goes to the console; how it went, it reports through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from testbed.lab import kernel
from testbed.lab.kernel_line import memory_cgroup_on
from testbed.lab.network import close_all_but
from testbed.lab.view import assemble, mount_memory_cgroup

if TYPE_CHECKING:
    from testbed.lab.groups import HostGroups
    from testbed.lab.spec import HostFolder, HostSpec, LabSpec

#: Its exit codes, for the keeper; anything else is a crash.
REBOOT, POWER_OFF, FAILED = 3, 4, 1
#: What it says to the keeper, a line each; an error is "error: …".
APART, UP = "apart", "up"
_APART = kernel.NEW_MOUNTS | kernel.NEW_NETWORK | kernel.NEW_NAMES | kernel.NEW_IPC | kernel.NEW_CGROUPS
_REQUESTS = {signal.SIGHUP: REBOOT, signal.SIGTERM: POWER_OFF}
_PATIENCE_SECONDS = 1.0  # of a process that is asked to end; systemd gives it 90
_SSHD_FAILED_SECONDS = 1.0
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_OOM_NEVER, _OOM_NORMAL = -1000, 0
_BOOT_SECONDS = 60.0
_BOOT_SCRIPT = Path("/run/boot")
_RC_LOCAL = "/etc/rc.local"
_CMDLINE_FILES = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")


@dataclass(frozen=True)
class Starting:
    """An init that is on its way up."""

    pid: int
    report: int  # what it says can be read here
    go: int  # one byte here, once its network is there


def start_init(lab: LabSpec, host: HostSpec, folder: HostFolder, groups: HostGroups) -> Starting:
    """Fork the first process of a new process-id namespace, whose clock starts at 0; raises OSError."""
    report, said = os.pipe()
    told, go = os.pipe()
    pid = _fork_first_process()
    if pid:
        os.close(said)
        os.close(told)
        return Starting(pid, report, go)
    try:
        kernel.die_with_parent(signal.SIGKILL)
        close_all_but(said, told)
        Init(lab, host, folder, groups, said).run(told)
    finally:
        os._exit(FAILED)


def _fork_first_process() -> int:
    """As `os.fork`, into new process-id and time namespaces; the caller stays where it is."""
    namespaces = {kernel.NEW_PIDS: "pid", kernel.NEW_TIME: "time"}
    own = {flag: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for flag, name in namespaces.items() if _has(name)}
    try:
        for flag in own:
            kernel.unshare(flag)
        if kernel.NEW_TIME in own:
            _start_clock_at_zero()
        pid = os.fork()
        if pid:
            for flag, descriptor in own.items():
                kernel.set_namespace(descriptor, flag)
        return pid
    finally:
        for descriptor in own.values():
            os.close(descriptor)


def _has(namespace: str) -> bool:
    return Path("/proc/self/ns", namespace).exists()


def _start_clock_at_zero() -> None:
    """So a host's uptime starts again at every boot, and its monotonic clock is nobody else's, as on real machines."""
    offsets = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
    lines = [f"{name} {-int(time.clock_gettime(clock))} 0\n" for name, clock in offsets.items()]
    Path("/proc/self/timens_offsets").write_text("".join(lines), encoding="ascii")


class Init:
    """The life of the first process."""

    def __init__(self, lab: LabSpec, host: HostSpec, folder: HostFolder, groups: HostGroups, report: int) -> None:
        self._lab = lab
        self._host = host
        self._folder = folder
        self._groups = groups
        self._report = report
        self._sshd = 0
        self._sshd_started = 0.0

    def run(self, go: int) -> NoReturn:
        try:
            self._come_up(go)
        except (OSError, subprocess.SubprocessError) as error:
            self._say(f"error: {error}")
            os._exit(FAILED)
        self._say(UP)
        os.close(self._report)
        self._live()

    def _come_up(self, go: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_REQUESTS})
        os.setsid()
        os.umask(0o022)
        _oom_score(_OOM_NEVER)
        self._groups.join()
        kernel.unshare(_APART)
        self._groups.leave_root()
        self._say(APART)
        if not os.read(go, 1):
            os._exit(FAILED)  # the keeper has given up
        os.close(go)
        control = self._groups.open_control()
        socket.sethostname(self._host.name)
        script = self._boot_script()
        assemble(self._folder, self._lab)
        kernel.drop_capabilities()
        self._offer_memory(control)
        self._run_boot_script(script)
        self._run_rc_local()
        self._start_sshd()

    def _boot_script(self) -> bytes | None:
        """The persona's, read while this machine's files are in sight."""
        script = self._folder.persona / "boot"
        return script.read_bytes() if script.exists() else None

    def _run_boot_script(self, script: bytes | None) -> None:
        if script is None:
            return
        _BOOT_SCRIPT.write_bytes(script)
        _BOOT_SCRIPT.chmod(0o700)
        code = self._start([str(_BOOT_SCRIPT)]).wait(_BOOT_SECONDS)
        _BOOT_SCRIPT.unlink()
        if code:
            raise OSError(f"the persona's boot script ended with exit code {code}")

    def _run_rc_local(self) -> None:
        """The administrator's own, run last as by every init; it may fail."""
        if os.access(_RC_LOCAL, os.X_OK):
            code = self._start([_RC_LOCAL]).wait(_BOOT_SECONDS)
            print(f"{_RC_LOCAL}: exit code {code}", flush=True)

    def _offer_memory(self, control: int | None) -> None:
        """The memory cgroup, unless the kernel needs to be told and has not been."""
        on = not self._host.needs_cmdline or memory_cgroup_on(_told_kernel())
        if control is not None:
            if on:
                os.write(control, b"+memory")
            os.close(control)
        if on or control is not None:
            mount_memory_cgroup(*self._groups.mounting())

    def _start_sshd(self) -> None:
        self._sshd = self._start([self._lab.sshd, "-D", "-e", "-f", "/etc/ssh/sshd_config"]).pid
        self._sshd_started = time.monotonic()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=_ENVIRONMENT, preexec_fn=_be_ordinary)  # noqa: PLW1509 -- there is one thread

    def _live(self) -> NoReturn:
        while True:
            number = signal.sigwait({signal.SIGCHLD, *_REQUESTS})
            if number in _REQUESTS:
                self._end(_REQUESTS[signal.Signals(number)])
            if self._sshd in _reaped():
                self._restart_sshd()

    def _restart_sshd(self) -> None:
        """As systemd does; but one that cannot even start is no host."""
        if time.monotonic() - self._sshd_started < _SSHD_FAILED_SECONDS:
            self._end(POWER_OFF)
        self._start_sshd()

    def _end(self, code: int) -> NoReturn:
        """Ask every process of the host to end, then go: the kernel kills what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with contextlib.suppress(ChildProcessError):  # nobody is left
            while (left := deadline - time.monotonic()) > 0:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    signal.sigtimedwait({signal.SIGCHLD}, left)
        os._exit(code)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._report, f"{' '.join(text.split())}\n".encode())


def _told_kernel() -> str:
    """The words that a Raspberry Pi's owner gives its kernel; the firmware's own come before them, and lose."""
    for file in _CMDLINE_FILES:
        with contextlib.suppress(FileNotFoundError):
            return Path(file).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return ""


def _reaped() -> list[int]:
    """The processes that have ended: our own children, and the orphans of all others."""
    found = []
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            found.append(pid)
    return found


def _be_ordinary() -> None:
    """What init has for itself, its children must not have: blocked signals, and being spared by the OOM killer."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _oom_score(_OOM_NORMAL)


def _oom_score(value: int) -> None:
    """Without the right to it (CAP_SYS_RESOURCE) all stay alike, and the OOM killer takes the largest."""
    with contextlib.suppress(PermissionError):
        Path("/proc/self/oom_score_adj").write_text(str(value), encoding="ascii")
