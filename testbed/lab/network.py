"""A lab's network: one bridge on this machine, and one link per host, shaped at both ends.

A link is a veth pair: one end is a port of the bridge, the other is eth0 of the host.  Bandwidth is limited by the
kernel's tbf at both ends.  Delay and loss come from the kernel's netem where it has that, else from two TAP devices in
the pair's place, with `testbed.lab.relay` between them.

Hosts reach each other and this machine, and nothing else: there is no route further.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import LabError
from testbed.lab import kernel
from testbed.lab.relay import open_tap, relay

if TYPE_CHECKING:
    from testbed.lab.link import LinkShape
    from testbed.lab.spec import HostSpec, LabSpec

#: A token bucket must hold what arrives between two ticks of the kernel, and one full segment.
_TICKS_PER_SECOND = 250
_SMALLEST_BURST_BYTES = 16 << 10
_QUEUE_SECONDS = 0.2
_NETEM_FRAMES = 10_000


def make_bridge(spec: LabSpec) -> None:
    """With an address of its own: else it would take that of a port, and change it with every port that comes or goes.

    Raises LabError.
    """
    _ip(
        f"link add {spec.bridge} address {_mac(spec, 0)} type bridge forward_delay 0 stp_state 0",
        f"addr add {spec.controller}/{spec.prefix_length} dev {spec.bridge}",
    )
    _without_ipv6(spec.bridge)
    _ip(f"link set {spec.bridge} up")


def remove_links(bridge: str) -> None:
    """The bridge and every link of its hosts, as far as they are there."""
    names = [name for name in os.listdir("/sys/class/net") if name == bridge or name.startswith(f"{bridge}-")]  # noqa: PTH208 -- names are what is wanted
    for name in sorted(names, reverse=True):  # ports first
        with contextlib.suppress(LabError):  # one that went by itself since
            _ip(f"link del {name}")
    left = [name for name in names if Path("/sys/class/net", name).exists()]
    if left:
        raise LabError(f"the network links {', '.join(left)} cannot be removed; remove them with `ip link del NAME`")


def overlapping(subnet: str) -> str | None:
    """The route of this machine that a subnet would take packets from, in words; None when there is none."""
    wanted = ipaddress.ip_network(subnet)
    shown = subprocess.run(["ip", "-json", "-4", "route", "show", "table", "all"], capture_output=True, check=False)
    for route in json.loads(shown.stdout or "[]"):
        if route.get("type") in {"broadcast", "multicast"} or route["dst"] == "default":
            continue
        if ipaddress.ip_network(route["dst"], strict=False).overlaps(wanted):
            return f"{route['dst']} on {route.get('dev', 'this machine')}"
    return None


class Link:
    """The link of one host.  It must be plugged in anew at every boot, because it goes with the network namespace."""

    def __init__(self, lab: LabSpec, host: HostSpec) -> None:
        self._lab = lab
        self._address = f"{host.address}/{lab.prefix_length}"
        self._seed = f"{lab.id} {host.number}"
        self._mac = _mac(lab, host.number)
        self.port = f"{lab.bridge}-{host.number}"  # the end at the bridge
        self._relay: int | None = None  # its process

    def plug(self, pid: int, shape: LinkShape, *, connected: bool) -> None:
        """Give the network namespace of a process an eth0; raises LabError."""
        self.unplug()
        by_relay = shape.needs_delay_line and self._lab.delay_by == "relay"
        if by_relay:
            self._plug_relay(pid, shape)
        else:
            _ip(f"link add {self.port} type veth peer name eth0 address {self._mac} netns {pid}")
        _without_ipv6(self.port)
        _ip(f"link set {self.port} master {self._lab.bridge} {_up(connected)}")
        _ip("link set lo up", f"addr add {self._address} dev eth0", "link set eth0 up", pid=pid)
        _tc(_disciplines(self.port, shape, by_relay=by_relay))
        _tc(_disciplines("eth0", shape, by_relay=by_relay), pid=pid)

    def connect(self, *, connected: bool) -> None:
        """Pull the cable at the bridge's end, or put it back."""
        _ip(f"link set {self.port} {_up(connected)}")

    def unplug(self) -> None:
        """Take the link away, with the relay if it has one."""
        if self._relay is not None:
            os.kill(self._relay, signal.SIGKILL)
            os.waitpid(self._relay, 0)
            self._relay = None
        if Path("/sys/class/net", self.port).exists():
            with contextlib.suppress(LabError):  # it goes by itself when the namespace at its other end does
                _ip(f"link del {self.port}")

    def _plug_relay(self, pid: int, shape: LinkShape) -> None:
        inner = f"{self.port}i"
        ends = [open_tap(self.port), open_tap(inner)]
        try:
            _ip(f"link set {inner} address {self._mac}", f"link set {inner} netns {pid} name eth0")
            self._relay = self._start_relay(ends, shape)
        finally:
            for descriptor in ends:
                os.close(descriptor)

    def _start_relay(self, ends: Sequence[int], shape: LinkShape) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            kernel.die_with_parent(signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            close_all_but(*ends)
            relay(ends[0], ends[1], shape, self._seed)
        finally:
            os._exit(1)


def close_all_but(*kept: int) -> None:
    """Close every file of this process but these and the standard ones: a fork that runs on must not hold them."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- names are what is wanted
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.close(int(name))


def _disciplines(device: str, shape: LinkShape, *, by_relay: bool) -> list[str]:
    """The queueing disciplines of one end, as lines for tc."""
    lines, parent = [], "root"
    if shape.needs_delay_line and not by_relay:
        delay, loss = f"{round(shape.delay_seconds * 1e6)}us", f"{100 * shape.loss:g}%"
        lines.append(f"qdisc add dev {device} root handle 1: netem limit {_NETEM_FRAMES} delay {delay} loss {loss}")
        parent = "parent 1:1"
    if shape.bits_per_second is not None:
        burst = max(_SMALLEST_BURST_BYTES, shape.bits_per_second // 8 // _TICKS_PER_SECOND)
        limits = f"burst {burst}b latency {round(1000 * _QUEUE_SECONDS)}ms"
        lines.append(f"qdisc add dev {device} {parent} handle 10: tbf rate {shape.bits_per_second}bit {limits}")
    return lines


def _mac(lab: LabSpec, number: int) -> str:
    """A locally administered address; the same after a reboot, as a board's is."""
    return ":".join(f"{byte:02x}" for byte in (2, *bytes.fromhex(lab.id), *number.to_bytes(2, "big")))


def _up(connected: bool) -> str:
    return "up" if connected else "down"


def _without_ipv6(device: str) -> None:
    """No chatter of neighbour discovery on links whose packets are counted and delayed."""
    with contextlib.suppress(OSError):  # a kernel without it
        Path("/proc/sys/net/ipv6/conf", device, "disable_ipv6").write_text("1")


def _ip(*lines: str, pid: int | None = None) -> None:
    _batch("ip", lines, pid)


def _tc(lines: Iterable[str], pid: int | None = None) -> None:
    if lines := list(lines):
        _batch("tc", lines, pid)


def _batch(program: str, lines: Sequence[str], pid: int | None) -> None:
    """Run lines of `ip` or `tc`, in the network namespace of a process if one is given; raises LabError."""
    inside = () if pid is None else ("nsenter", f"--net=/proc/{pid}/ns/net")
    command = [*inside, program, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        problem = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LabError(f"the lab's network cannot be made: {program} {'; '.join(lines)}: {problem}")
