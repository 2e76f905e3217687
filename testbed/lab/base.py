"""What every lab that is there can do, whatever its hosts are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from testbed.errors import UsageError
from testbed.lab.folder import INVENTORY, SSH_CONFIG
from testbed.lab.host import LabHost
from testbed.spelling import did_you_mean

Host = TypeVar("Host", bound=LabHost)


class LabBase(ABC, Generic[Host]):
    """A lab in a folder; as a context it is taken down at its end."""

    def __init__(self, folder: Path, hosts: list[Host]) -> None:
        self.folder = folder
        self.hosts = hosts

    @property
    def inventory(self) -> Path:
        return self.folder / INVENTORY

    @property
    def ssh_config(self) -> Path:
        return self.folder / SSH_CONFIG

    def host(self, name: str) -> Host:
        """Raises UsageError when there is none of that name."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise UsageError(f'the lab has no host "{name}"; {did_you_mean(name, [host.name for host in self.hosts])}')

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What else is to be known of it, for `testbed lab status --json`."""

    @abstractmethod
    def how(self) -> str:
        """How it is made, in a sentence."""

    @abstractmethod
    def down(self) -> None:
        """Remove it: processes, network, files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
