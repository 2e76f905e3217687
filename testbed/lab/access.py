"""The files that others reach a lab with: inventory, SSH configuration, known hosts, hardware profile."""

from __future__ import annotations

import os
import platform
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.byte_text import format_bytes
from testbed.lab.folder import INVENTORY, KEY, KNOWN_HOSTS, PROFILES, SSH_CONFIG
from testbed.lab.furnish import ADMIN, TESTER
from testbed.lab.groups import memory_version
from testbed.lab.spec import HostFolder, HostSpec, LabSpec

VIRTUAL_BOARD = "virtual_board"
#: What a run may use of a host; the rest is the system's.
_BUDGET_SHARE = 0.75
_MIB = 1 << 20


def write_access_files(folder: Path, lab: LabSpec) -> None:
    """The lab's key is there already, and so is the host key of every host."""
    (folder / INVENTORY).write_text(_inventory(lab), encoding="utf-8")
    (folder / SSH_CONFIG).write_text(_ssh_config(folder, lab.hosts), encoding="utf-8")
    (folder / KNOWN_HOSTS).write_text("".join(_known_host(folder, host) for host in lab.hosts), encoding="utf-8")
    plain = [host for host in lab.hosts if host.profile == VIRTUAL_BOARD]
    if plain:
        (folder / PROFILES).mkdir()
        text = _profile(max(host.memory_bytes for host in plain))
        (folder / PROFILES / f"{VIRTUAL_BOARD}.yaml").write_text(text, encoding="utf-8")


def _inventory(lab: LabSpec) -> str:
    return f"""\
# The hosts of a virtual lab, written by `testbed lab up`; `testbed lab down` removes it.
# {ADMIN} may use sudo without a password; {TESTER} may not use it at all, and has the same key.
# python is this machine's interpreter, which the hosts see; without the line, the environment of `testbed provision`.
defaults:
  user: {ADMIN}
  ssh_config: {SSH_CONFIG}
  python: {_quoted(sys.executable)}
devices:
{"".join(_device(host) for host in lab.hosts)}"""


def _device(host: HostSpec) -> str:
    budget = int(_BUDGET_SHARE * host.memory_bytes) // _MIB
    return f"""\
  {host.name}:
    kind: {host.kind}
    profile: {host.profile}
    budget: {{memory: "{budget} MiB"}}
    tags: [virtual, {host.kind.replace("_", "-")}]
"""


def _ssh_config(folder: Path, hosts: Sequence[HostSpec]) -> str:
    addresses = "".join(f"Host {host.name}\n  HostName {host.address}\n" for host in hosts)
    return f"""\
# The hosts of a virtual lab: ssh -F {_quoted(str(folder / SSH_CONFIG))} {hosts[0].name}
{addresses}
Host {" ".join(host.name for host in hosts)}
  User {ADMIN}
  IdentityFile {_quoted(str(folder / KEY))}
  IdentitiesOnly yes
  UserKnownHostsFile {_quoted(str(folder / KNOWN_HOSTS))}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""


def _known_host(folder: Path, host: HostSpec) -> str:
    public = HostFolder(folder, host.name).upper / "etc/ssh/ssh_host_ed25519_key.pub"
    kind, key, *_ = public.read_text(encoding="ascii").split()
    return f"{host.name},{host.address} {kind} {key}\n"


def _profile(memory_bytes: int) -> str:
    version = memory_version() or "off"
    peak = {"v1": "cgroup1_max_usage", "v2": "cgroup2_peak"}.get(version, "sampled")
    return f"""\
# A plain virtual host: this machine's processor, the memory that the lab gives it.
title: "Virtual host"
memory: "{format_exactly(memory_bytes)}"
usable_memory: "{format_exactly(memory_bytes)}"
cores: {os.cpu_count() or 1}
architecture: {platform.machine()}
cgroup_default: "{version}"
peak_source: {peak}
swap_default: none
python: "{sys.version_info.major}.{sys.version_info.minor}"
torch_source: "https://download.pytorch.org/whl/cpu"
"""


def format_exactly(size: int) -> str:
    """`format_bytes` where that loses nothing, else a number of bytes."""
    text = format_bytes(size)
    return text if size % (1 << 30) == 0 else f"{size} B"


def give_to_user(folder: Path) -> None:
    """Under sudo, what a run needs belongs to who called sudo, so that runs need none."""
    user = _sudo_user()
    if user is None:
        return
    names = ("", INVENTORY, SSH_CONFIG, KNOWN_HOSTS, KEY, f"{KEY}.pub", PROFILES, f"{PROFILES}/{VIRTUAL_BOARD}.yaml")
    for path in (folder / name for name in names):
        if path.exists():
            os.chown(path, user.pw_uid, user.pw_gid)


def home_of_user() -> Path | None:
    """The home of who called sudo; None when nobody did."""
    user = _sudo_user()
    return None if user is None else Path(user.pw_dir)


def _sudo_user() -> pwd.struct_passwd | None:
    number = os.environ.get("SUDO_UID", "")
    if os.geteuid() != 0 or not number.isdigit() or int(number) == 0:
        return None
    try:
        return pwd.getpwuid(int(number))
    except KeyError:
        return None


def _quoted(text: str) -> str:
    return f'"{text}"'
