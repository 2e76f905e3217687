"""What a lab of virtual machines consists of, as its folder remembers it, and where in that folder things are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from testbed.device_images.debian import DebianImage
from testbed.errors import LabError
from testbed.lab.folder import HOSTS, LAB_FILE
from testbed.lab.link import LinkShape

#: In the lab's file: what tells it from one of namespaces.
MADE_OF = "virtual machines"
#: That file while the rest is being made.
MARK = json.dumps({"made_of": MADE_OF}) + "\n"
#: Where a machine sees this one: QEMU's user network.
CONTROLLER = "10.0.2.2"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class MachineSpec:
    """One machine."""

    name: str
    number: int  # from 1, in the lab
    address: str  # "127.0.0.1:PORT": its SSH server, as this machine reaches it
    memory_bytes: int
    profile: str
    kind: str = "generic"  # of the device in the inventory
    persona: str | None = None

    @property
    def ssh_port(self) -> int:
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class MachineLabSpec:
    """A lab: what all of its machines share, and the machines."""

    hosts: tuple[MachineSpec, ...]
    architecture: str  # Debian's name
    image: str  # the folder of the Debian image that their disks are changes to
    cores: int
    accelerated: bool  # by KVM; else every instruction is emulated
    time_port: int  # of the lab's time server
    shape: LinkShape = field(default_factory=LinkShape)
    environment: bool = False  # there is a disk of Python packages

    @property
    def debian_image(self) -> DebianImage:
        return DebianImage(Path(self.image), self.architecture)

    def save(self, folder: Path) -> None:
        text = json.dumps({"made_of": MADE_OF, **asdict(self)}, indent=1)
        (folder / LAB_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> MachineLabSpec | None:
        """None where there is no lab of virtual machines; raises LabError for one that cannot be read."""
        record = _record(folder)
        if record is None:
            return None
        try:
            return cls._from_json(record)
        except (KeyError, TypeError) as error:
            problem = f"{folder / LAB_FILE} is not a lab's, or not yet ({error})"
            raise LabError(f"{problem}; `testbed lab down` removes the lab") from None

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> MachineLabSpec:
        hosts = tuple(MachineSpec(**host) for host in record.pop("hosts"))
        return cls(hosts=hosts, shape=LinkShape(**record.pop("shape")), **record)


def made_of_machines(folder: Path) -> bool:
    """Whether there is a lab of virtual machines, be it readable or not."""
    return _record(folder) is not None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / LAB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    of_machines = isinstance(record, dict) and record.pop("made_of", None) == MADE_OF
    return record if of_machines else None


@dataclass(frozen=True)
class MachineFolder:
    """Where the things of one machine are."""

    lab: Path
    name: str

    @property
    def path(self) -> Path:
        return self.lab / HOSTS / self.name

    @property
    def rendered(self) -> Path:
        """As `testbed image render` writes it."""
        return self.path / "image"

    @property
    def disk(self) -> Path:
        """Its own changes to the image."""
        return self.path / "disk.qcow2"

    @property
    def seed(self) -> Path:
        """What cloud-init reads at the first boot."""
        return self.path / "seed.img"

    @property
    def environment(self) -> Path:
        """Its own changes to the disk of Python packages."""
        return self.path / "environment.qcow2"

    @property
    def console(self) -> Path:
        return self.path / "console.log"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def pid(self) -> Path:
        return self.path / "qemu.pid"
