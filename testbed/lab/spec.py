"""What a lab consists of, as its folder remembers it, and where in that folder things are."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.errors import LabError
from testbed.lab.folder import HOSTS, LAB_FILE, has_lab
from testbed.lab.link import LinkShape

#: Every interface and cgroup of a lab has a name that starts so; the lab's own id follows.
INTERFACE_PREFIX = "tb"
GROUP_PREFIX = "testbed-lab-"


@dataclass(frozen=True)
class HostSpec:
    """One host."""

    name: str
    number: int  # from 1, in the lab
    address: str
    memory_bytes: int
    kind: str = "generic"  # of the device in the inventory
    profile: str = "virtual_board"
    persona: str | None = None
    needs_cmdline: bool = False  # its memory cgroup is off until the kernel's command line enables it


@dataclass(frozen=True)
class LabSpec:
    """A lab: what all of its hosts share, and the hosts."""

    id: str
    subnet: str
    hosts: tuple[HostSpec, ...]
    shape: LinkShape
    delay_by: str  # "netem" (the kernel's) or "relay" (ours)
    boot_delay_seconds: float
    sshd: str  # the server's program
    exposed: tuple[str, ...] = ()  # folders that would be hidden, and that the controller's interpreter needs

    @property
    def bridge(self) -> str:
        return f"{INTERFACE_PREFIX}{self.id}"

    @property
    def group(self) -> str:
        return f"{GROUP_PREFIX}{self.id}"

    @property
    def controller(self) -> str:
        """The address of this machine in the lab's network."""
        return str(next(ipaddress.ip_network(self.subnet).hosts()))

    @property
    def prefix_length(self) -> int:
        return ipaddress.ip_network(self.subnet).prefixlen

    def host(self, name: str) -> HostSpec:
        return next(host for host in self.hosts if host.name == name)

    def save(self, folder: Path) -> None:
        (folder / LAB_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LabSpec:
        """Raises LabError when there is no lab in the folder."""
        try:
            if not has_lab(folder):
                raise LabError(f"there is no lab in {folder}; `testbed lab up` makes one")
            return cls._from_json(json.loads((folder / LAB_FILE).read_text(encoding="utf-8")))
        except PermissionError:
            raise LabError(f"the lab in {folder} cannot be read: it belongs to another user") from None
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{folder / LAB_FILE} is not a lab's, or not yet ({error})"
            raise LabError(f"{problem}; `testbed lab down` removes the lab") from None

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> LabSpec:
        hosts = tuple(HostSpec(**host) for host in record.pop("hosts"))
        shape = LinkShape(**record.pop("shape"))
        return cls(hosts=hosts, shape=shape, **{**record, "exposed": tuple(record["exposed"])})


def lab_id(folder: Path) -> str:
    """Six hexadecimal digits: two labs are told apart by their folders."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:6]


@dataclass(frozen=True)
class HostFolder:
    """What a lab's folder holds of one host."""

    lab: Path
    name: str

    @property
    def path(self) -> Path:
        return self.lab / HOSTS / self.name

    @property
    def disk(self) -> Path:
        """For root only: it may hold what has root's rights in the host."""
        return self.path / "disk"

    @property
    def upper(self) -> Path:
        """What of the root differs from this machine's."""
        return self.disk / "upper"

    @property
    def work(self) -> Path:
        """The overlay's own."""
        return self.disk / "work"

    @property
    def root(self) -> Path:
        """Where the host's root is mounted, in the host's own mount namespace only."""
        return self.disk / "root"

    @property
    def persona(self) -> Path:
        """The persona's files as they are before a boot."""
        return self.path / "persona"

    @property
    def boot(self) -> Path:
        """What is made new at every boot: /tmp, and the files over /proc and /sys."""
        return self.path / "boot"

    @property
    def console(self) -> Path:
        """What the keeper, init, the persona's boot script and the SSH server say."""
        return self.path / "console.log"

    @property
    def socket(self) -> str:
        return "keeper.sock"

    @property
    def state(self) -> Path:
        return self.path / "state.json"
