"""What virtual machines are started with: an inventory, the files that `testbed image render` makes of it, disks."""

from __future__ import annotations

from pathlib import Path

from testbed.config import load_image_settings, load_inventory
from testbed.device_images.board import DEFAULT_USER, board_of
from testbed.device_images.debian import ARCHITECTURES
from testbed.device_images.host_key import HostKey
from testbed.device_images.render import render, write
from testbed.lab.access import format_exactly
from testbed.lab.folder import INVENTORY, KEY, KNOWN_HOSTS, PROFILES, SSH_CONFIG
from testbed.lab.furnish import make_key
from testbed.lab.machines.environment_disk import PYTHON, environment_disk
from testbed.lab.machines.spec import CONTROLLER, LOOPBACK, MachineFolder, MachineLabSpec, MachineSpec
from testbed.programs import run
from testbed.provision.step import Say

PROFILE = "virtual_board_{}"
_SEED_FILES = ("user-data", "meta-data", "network-config")
#: What a run may use of a board; the rest is the system's.
_BUDGET_SHARE = 0.75
_MIB = 1 << 20
#: A login starts the user's service manager, which takes its time where each instruction is emulated.
_CONNECT_SECONDS = 90


def prepare(folder: Path, lab: MachineLabSpec, say: Say) -> None:
    """Write everything that the machines need, except that they run; raises LabError and UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    lab.save(folder)
    make_key(folder / KEY, "testbed lab")
    (folder / PROFILES).mkdir()
    (folder / PROFILES / f"{lab.hosts[0].profile}.yaml").write_text(_profile(lab), encoding="utf-8")
    (folder / INVENTORY).write_text(_inventory(lab), encoding="utf-8")
    (folder / SSH_CONFIG).write_text(_ssh_config(folder, lab), encoding="utf-8")
    packages = environment_disk(lab.architecture, say) if lab.environment else None
    known = [
        _prepare_host(MachineFolder(folder, host.name), folder / INVENTORY, lab, host, packages) for host in lab.hosts
    ]
    (folder / KNOWN_HOSTS).write_text("".join(known), encoding="utf-8")


def _prepare_host(
    folder: MachineFolder, inventory: Path, lab: MachineLabSpec, host: MachineSpec, packages: Path | None
) -> str:
    """Its folder, as a card is made for a board; returns its line of known_hosts."""
    device = next(device for device in load_inventory(inventory) if device.name == host.name)
    key = HostKey.made()
    write(render(board_of(device, load_image_settings(inventory)[host.name], key)), folder.rendered)
    _make_seed(folder)
    _overlay(lab.debian_image.disk, folder.disk)
    if packages is not None:
        _overlay(packages, folder.environment)
    return f"{host.name},[{LOOPBACK}]:{host.ssh_port} {key.public}\n"


def _make_seed(folder: MachineFolder) -> None:
    """A FAT disk labelled CIDATA: cloud-init's NoCloud looks for that."""
    files = [str(folder.rendered / "seed" / name) for name in _SEED_FILES]
    folder.seed.touch(mode=0o600)  # it has the board's host key
    run(["mformat", "-C", "-i", str(folder.seed), "-v", "CIDATA", "-T", "2880", "::"])
    run(["mcopy", "-i", str(folder.seed), *files, "::"])


def _overlay(base: Path, disk: Path) -> None:
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(disk)])


def _profile(lab: MachineLabSpec) -> str:
    machine = next(machine for machine, name in ARCHITECTURES.items() if name == lab.architecture)
    memory = format_exactly(lab.hosts[0].memory_bytes)
    how = "KVM" if lab.accelerated else "every instruction emulated"
    return f"""\
# A board that QEMU makes of this machine ({how}): its times say nothing of any real board.
title: "Virtual board ({lab.architecture})"
memory: "{memory}"
usable_memory: "{memory}"
cores: {lab.cores}
architecture: {machine}
cgroup_default: "v2"
peak_source: cgroup2_peak
swap_default: none
python: "3.13"
torch_source: "https://download.pytorch.org/whl/cpu"
"""


def _inventory(lab: MachineLabSpec) -> str:
    python = f"  python: {PYTHON}  # on the board's second disk\n" if lab.environment else ""
    return f"""\
# The boards of a lab of virtual machines, written by `testbed lab up --vm`; `testbed lab down` removes it.
defaults:
  user: {DEFAULT_USER}
  ssh_config: {SSH_CONFIG}
{python}\
  image: {{time_servers: ["{CONTROLLER}:{lab.time_port}"]}}
devices:
{"".join(_device(host) for host in lab.hosts)}"""


def _device(host: MachineSpec) -> str:
    budget = int(_BUDGET_SHARE * host.memory_bytes) // _MIB
    return f"""\
  {host.name}:
    kind: {host.kind}
    profile: {host.profile}
    budget: {{memory: "{budget} MiB"}}
    tags: [virtual, machine]
"""


def _ssh_config(folder: Path, lab: MachineLabSpec) -> str:
    names = " ".join(host.name for host in lab.hosts)
    ports = "".join(f"Host {host.name}\n  HostName {LOOPBACK}\n  Port {host.ssh_port}\n" for host in lab.hosts)
    return f"""\
# The boards of a lab of virtual machines: ssh -F "{folder / SSH_CONFIG}" {lab.hosts[0].name}
{ports}
Host {names}
  User {DEFAULT_USER}
  IdentityFile "{folder / KEY}"
  IdentitiesOnly yes
  UserKnownHostsFile "{folder / KNOWN_HOSTS}"
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  ConnectTimeout {_CONNECT_SECONDS}
"""
