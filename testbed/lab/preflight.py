"""Whether this machine can have a lab: everything is tried before anything is made, and told in one message."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from testbed.errors import LabError
from testbed.lab.groups import memory_version
from testbed.lab.link import LinkShape
from testbed.lab.network import overlapping
from testbed.programs import SEARCH_PATH, find

_PACKAGES = {
    "ip": "iproute2", "tc": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "sudo": "sudo",
    "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount",
}  # fmt: skip
#: Each line of a trial is tried in namespaces that are thrown away; "NAME ok" tells that it went well.
_TRIALS = """
mkdir u w su sw root sys
mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w root && echo overlay ok
mount -t sysfs sysfs sys && mount -t overlay overlay -o lowerdir=sys,upperdir=su,workdir=sw sys && echo sysfs ok
ip link add b0 type bridge && echo bridge ok
ip link add v0 type veth peer name v1 && echo veth ok
tc qdisc add dev v0 root tbf rate 1mbit burst 16kb latency 50ms && echo tbf ok
tc qdisc add dev lo root netem delay 1ms && echo netem ok
ip tuntap add dev t0 mode tap && echo tap ok
"""
_NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid", "--cgroup", "--fork")


def check_machine(folder: Path, shape: LinkShape, subnet: str) -> str:
    """Raises LabError with everything that is in the way; gives what would delay packets: "netem" or "relay"."""
    problems = [*_lacking_rights(), *_lacking_programs()]
    found, said = (set[str](), "") if problems else _try_out(folder)
    if not problems:
        problems += _failed_trials(found, said, folder, shape)
        problems += [*_wrong_subnet(subnet), *_wrong_folder(folder)]
    if problems:
        raise LabError("\n  - ".join(["a virtual lab cannot be made here:", *problems]))
    return "netem" if "netem" in found else "relay"


def _lacking_rights() -> Iterator[str]:
    if os.geteuid() != 0:
        yield "network namespaces, mounts and cgroups need root: run it with sudo"
    if memory_version() is None:
        yield "no memory cgroup under /sys/fs/cgroup: the kernel's command line must not have cgroup_disable=memory"


def _lacking_programs() -> Iterator[str]:
    for name, package in _PACKAGES.items():
        if find(name) is None:
            yield f"there is no `{name}`: install the package {package} (Debian, Ubuntu: apt-get install {package})"
    sudo = find("sudo")
    if sudo is not None and os.statvfs(sudo).f_flag & os.ST_NOSUID:
        yield f"{sudo} lies on a file system mounted with nosuid, where it cannot give anybody root"


def _try_out(folder: Path) -> tuple[set[str], str]:
    """The names of the trials that went well, and what the others said."""
    where = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        made = tempfile.TemporaryDirectory(prefix=".testbed-trial-", dir=where)
    except OSError as error:
        raise LabError(f"{where} cannot be written ({error.strerror}): choose another folder with --folder") from None
    with made as scratch:
        done = subprocess.run(
            ["unshare", *_NAMESPACES, "sh", "-c", _TRIALS],
            cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
            env={**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C"},
        )  # fmt: skip
    return {line.split()[0] for line in done.stdout.splitlines()}, " ".join(done.stderr.split())


def _failed_trials(found: set[str], said: str, folder: Path, shape: LinkShape) -> Iterator[str]:
    if not found:
        yield f"the kernel gives no namespaces of our own ({said}); inside of a container it must be a privileged one"
        return
    if "overlay" not in found:
        yield (
            f"no overlay file system can be laid over / from {folder} ({said}); choose a folder on a disk of its own "
            "with --folder, or on a tmpfs such as /dev/shm"
        )
    elif "sysfs" not in found:
        yield f"no overlay can be laid over /sys ({said})"
    for kind in ("bridge", "veth"):
        if kind not in found:
            yield f"the kernel has no {kind} links ({said})"
    if shape.bits_per_second is not None and "tbf" not in found:
        yield f"the kernel has no tbf, which --bandwidth needs ({said})"
    if shape.needs_delay_line and not found & {"netem", "tap"}:
        yield f"the kernel has neither netem nor TAP devices, of which --delay and --loss need one ({said})"


def _wrong_subnet(subnet: str) -> Iterator[str]:
    if (route := overlapping(subnet)) is not None:
        yield f"{subnet} overlaps with {route}, which this machine uses: choose another with --subnet"


def _wrong_folder(folder: Path) -> Iterator[str]:
    if set(str(folder)) & set(',:\\"\n'):
        yield f"the path {folder} has a character that overlay or ssh would misread: choose another with --folder"
