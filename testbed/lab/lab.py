"""Bring a lab up, find it again, take it down.

    with Lab.up(folder, LabWish(devices=3)) as lab:
        lab.inventory             # works at once with --inventory
        lab.host("board-1").cut()

A lab is known by its folder: its bridge and its cgroups have names that follow from it, so that all of it can be found
and removed even when half of it, the folder included, is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from testbed.cache import VARIABLE, cache_folder
from testbed.errors import LabError
from testbed.lab.access import give_to_user, home_of_user
from testbed.lab.access import write_access_files as write_access
from testbed.lab.base import LabBase
from testbed.lab.folder import KEY, claim, expect_free, has_lab, remove_files
from testbed.lab.furnish import furnish, interpreter_folders, make_key
from testbed.lab.groups import hierarchies, remove_tree
from testbed.lab.host import NamespaceHost, keepers_of, launch
from testbed.lab.network import make_bridge, remove_links
from testbed.lab.persona import Face, load_persona
from testbed.lab.preflight import check_machine
from testbed.lab.spec import GROUP_PREFIX, INTERFACE_PREFIX, HostFolder, HostSpec, LabSpec, lab_id
from testbed.lab.wish import LabWish, choose_hosts
from testbed.programs import find

_END_SECONDS = 10.0


class Lab(LabBase[NamespaceHost]):
    """A lab that is there."""

    def __init__(self, folder: Path, spec: LabSpec) -> None:
        super().__init__(folder, [NamespaceHost(folder, spec, host) for host in spec.hosts])
        self.spec = spec

    @classmethod
    def up(cls, folder: Path, wish: LabWish | None = None) -> Lab:
        """Make a lab and wait until every host answers; raises LabError, and then nothing is left of it.

        All that this machine cannot do is told in one message, before anything is made.
        """
        folder = folder.absolute()
        expect_free(folder)
        wish = wish or LabWish()
        hosts = choose_hosts(wish)
        delay_by = check_machine(folder, wish.shape, wish.subnet)
        spec = LabSpec(
            id=lab_id(folder),
            subnet=wish.subnet,
            hosts=hosts,
            shape=wish.shape,
            delay_by=delay_by,
            boot_delay_seconds=wish.boot_delay_seconds,
            sshd=find("sshd") or "sshd",
            exposed=interpreter_folders(folder),
        )
        lab = cls(folder, spec)
        with _passable():
            claim(folder, "")
        try:
            lab._build()
        except BaseException:
            with contextlib.suppress(LabError):  # what failed first is what is told
                take_down(folder)
            raise
        return lab

    @classmethod
    def open(cls, folder: Path) -> Lab:
        """The lab of a folder; raises LabError when there is none."""
        folder = folder.absolute()
        return cls(folder, LabSpec.load(folder))

    def facts(self) -> dict[str, str]:
        """What else is to be known of it, for `testbed lab status --json`."""
        spec = self.spec
        return {"subnet": spec.subnet, "controller": spec.controller, "delay_by": spec.delay_by}

    def how(self) -> str:
        """How its links are shaped, in a sentence."""
        delay = {"netem": "the kernel's netem", "relay": "a relay of ours on TAP devices (the kernel has no netem)"}
        return f"Bandwidth is limited by the kernel's tbf; delay and loss come from {delay[self.spec.delay_by]}."

    def down(self) -> None:
        take_down(self.folder)

    def _build(self) -> None:
        with _passable():
            self._write_files()
        make_bridge(self.spec)
        launch(self.hosts)
        for host in self.hosts:
            host.wait_up()

    def _write_files(self) -> None:
        self.spec.save(self.folder)
        make_key(self.folder / KEY, "testbed lab")
        public_key = (self.folder / f"{KEY}.pub").read_text(encoding="ascii")
        for host in self.hosts:
            self._furnish(host.folder, host.spec, public_key)
        write_access(self.folder, self.spec)
        give_to_user(self.folder)

    def _furnish(self, folder: HostFolder, host: HostSpec, public_key: str) -> None:
        folder.disk.mkdir(parents=True)
        folder.disk.chmod(0o700)
        for path in (folder.work, folder.root):
            path.mkdir()
        face = _unfold(host.persona, folder.persona)
        furnish(folder.upper, self.spec, host, folder=self.folder, public_key=public_key, face=face)


def default_folder() -> Path:
    """In the cache of who calls; under sudo, of who called sudo."""
    home = home_of_user()
    if home is not None and VARIABLE not in os.environ:
        return home / ".cache" / "edge-testbed" / "lab"
    return cache_folder() / "lab"


def take_down(folder: Path) -> None:
    """Remove all of a lab that is left: processes, cgroups, links, files.  Raises LabError when there was nothing.

    Files go only with their mark (`testbed.lab.folder`); the rest is known by the folder's name.
    """
    folder = folder.absolute()
    if not has_lab(folder) and not _lives(folder):
        raise LabError(f"there is no lab in {folder}")
    _expect_root()
    _end_processes(folder)
    remove_links(_bridge(folder))
    remove_files(folder)


@contextlib.contextmanager
def _passable() -> Iterator[None]:
    """A host's folders must be passable, whatever the caller likes for its own."""
    mask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(mask)


def _unfold(persona: str | None, folder: Path) -> Face | None:
    return None if persona is None else load_persona(persona).unfold(folder)


def _bridge(folder: Path) -> str:
    return f"{INTERFACE_PREFIX}{lab_id(folder)}"


def _groups(folder: Path) -> list[Path]:
    """Of all the lab's hosts, in every hierarchy."""
    return [hierarchy / f"{GROUP_PREFIX}{lab_id(folder)}" for hierarchy in hierarchies()]


def _lives(folder: Path) -> bool:
    """Whether anything of the lab is left outside of its folder."""
    left = [*_groups(folder), Path("/sys/class/net", _bridge(folder))]
    return any(path.exists() for path in left) or bool(keepers_of(folder))


def _expect_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab's namespaces, mounts and cgroups belong to root: run it with sudo")


def _end_processes(folder: Path) -> None:
    """The kernel ends a host with its keeper; what is frozen dies when its groups are removed."""
    deadline = time.monotonic() + _END_SECONDS
    while True:
        keepers = keepers_of(folder)
        for pid in keepers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for group in _groups(folder):
            remove_tree(group)
        if not keepers:
            return
        if time.monotonic() > deadline:
            raise LabError(f"of the lab in {folder} the processes {', '.join(map(str, keepers))} do not end")
        time.sleep(0.005)  # they are nobody's children: there is nothing to wait for
