"""The lab in a folder, whatever its hosts are made of."""

from __future__ import annotations

from pathlib import Path

from testbed.lab import lab as namespaces
from testbed.lab.host import NamespaceHost
from testbed.lab.lab import Lab
from testbed.lab.machines import lab as machines
from testbed.lab.machines.host import VirtualMachineHost
from testbed.lab.machines.lab import MachineLab
from testbed.lab.machines.spec import MachineLabSpec, made_of_machines

AnyLab = Lab | MachineLab
AnyHost = NamespaceHost | VirtualMachineHost


def open_lab(folder: Path) -> AnyLab:
    """Raises LabError when there is none."""
    folder = folder.absolute()
    spec = MachineLabSpec.load(folder)
    return Lab.open(folder) if spec is None else MachineLab(folder, spec)


def take_down(folder: Path) -> None:
    """Remove all of a lab that is left; raises LabError when there was nothing."""
    of_machines = made_of_machines(folder) or machines.machines_of(folder)
    (machines if of_machines else namespaces).take_down(folder)
