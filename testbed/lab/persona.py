"""A persona: the face of a board that a lab host wears, so that what provisioning does to a board really happens.

A persona is a folder:

persona.yaml   title, kind, hardware profile, memory, …  (class `PersonaFile`)
root/          files of the host's root: /etc/nv_tegra_release, and programs such as nvpmodel, with their modes
proc/          files that lie over those of /proc: cmdline, swaps, …
sys/           the tree that is to be seen under /sys: device tree, cpufreq, sensors
boot           a script that root runs in the host at every boot, before anything else (optional)
SOURCES        where every value comes from, one pattern of paths per line

What several boards share lies in a folder whose name starts with "_", named by `extends`.  A host gets a copy of its
own (`unfold`), because its programs change it: `nvpmodel` its state, root the governor, the boot script /proc/cmdline.

    face = load_persona("raspberry_pi_5_8gb").unfold(host_folder / "persona")
    face.put_on(host_root)          # root/ over the host's root
    # mount face.sys over /sys, bind every file of face.proc over the one in /proc, run face.boot
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import Field

from testbed.config import Bytes, load_profile
from testbed.errors import ConfigError, UsageError
from testbed.package_data import data_folder
from testbed.spelling import did_you_mean
from testbed.yaml_file import FileModel, complaint, read_file

PERSONAS = Path(__file__).parent / "personas"
#: The parts of a persona that a host sees.
TREES = ("root", "proc", "sys")

MemoryCgroup = Literal["always", "needs_cmdline"]


class PersonaFile(FileModel):
    """persona.yaml."""

    title: str = Field(title="the board's name and system for people")
    kind: Literal["jetson", "raspberry_pi", "generic"] = Field(title='"jetson", "raspberry_pi" or "generic"')
    profile: str = Field(title="the name of a hardware profile such as raspberry_pi_5_8gb")
    memory: Bytes = Field(title='bytes such as "7620 MiB"', description="MemTotal, as Linux on the board sees it.")
    memory_cgroup: MemoryCgroup = Field(
        title='"always" or "needs_cmdline"',
        description="Whether memory can be capped at once, or only with cgroup_enable=memory on the kernel's line.",
    )
    extends: list[str] = Field(
        default=[], title="a list of folders beside this one", description="What lies below this persona's own files."
    )
    links: dict[str, str] = Field(
        default={},
        title="a mapping from a path such as sys/class/hwmon/hwmon1 to what the link holds",
        description="Symbolic links, which no wheel can carry.",
    )
    expected: dict[str, str] = Field(
        default={},
        title="a mapping from a fact's name to its text",
        description="What the board itself would say, where the host cannot lie: glibc, Python, cgroup version.",
    )


class LayerFile(FileModel):
    """layer.yaml of a folder that personas extend."""

    links: dict[str, str] = Field(default={}, title="a mapping from a path to what the link holds")


@dataclass(frozen=True)
class Face:
    """A persona's files as one host wears them: a copy of the host's own, writable."""

    root: Path
    proc: Path
    sys: Path
    boot: Path | None

    def put_on(self, target: Path) -> None:
        """Copy root/ over the root of a host.  A link that stands there is replaced, never written through."""
        for source in _files(self.root):
            _place(source, target / source.relative_to(self.root))


@dataclass(frozen=True)
class Persona:
    """The face of a board; `memory_bytes` is the MemTotal that Linux on the board sees."""

    name: str
    title: str
    kind: str
    profile: str
    memory_bytes: int
    memory_cgroup: MemoryCgroup
    layers: tuple[Path, ...]  # folders, the lowest first; a later one's file hides an earlier one's
    links: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)

    def unfold(self, folder: Path) -> Face:
        """A copy for one host: the layers laid over each other in `folder`, which is made anew."""
        shutil.rmtree(folder, ignore_errors=True)
        for tree in TREES:
            (folder / tree).mkdir(parents=True)
        for path, source in self.files().items():
            _place(source, folder / path)
        for path, target in self.links.items():
            _link(folder / path, target)
        boot = folder / "boot"
        return Face(folder / "root", folder / "proc", folder / "sys", boot if boot.exists() else None)

    def files(self) -> dict[str, Path]:
        """Every file of the face by its path in it ("root/etc/os-release"), and where it comes from."""
        found: dict[str, Path] = {}
        for layer in self.layers:
            for tree in TREES:
                found |= {str(source.relative_to(layer)): source for source in _files(layer / tree)}
            if (layer / "boot").exists():
                found["boot"] = layer / "boot"
        return found

    def without_source(self) -> list[str]:
        """The files that no line of their layer's SOURCES covers."""
        patterns = {layer: tuple(read_sources(layer)) for layer in self.layers}
        return [
            str(source)
            for layer in self.layers
            for source in _all_files(layer)
            if not any(fnmatchcase(str(source.relative_to(layer)), pattern) for pattern in patterns[layer])
        ]


def personas() -> list[str]:
    """The names of the personas that come with the package."""
    return sorted(path.parent.name for path in PERSONAS.glob("*/persona.yaml"))


def load_persona(name: str | Path) -> Persona:
    """Read and check a persona: one that comes with the package, by name, or a folder, by its path.

    Raises UsageError when there is none, ConfigError when something in it is wrong.
    """
    folder = _folder(name)
    file = read_file(folder / "persona.yaml", PersonaFile, "a persona")
    _check_profile(folder, file.profile)
    layers = (*(_layer(folder, extended) for extended in file.extends), folder)
    for layer in layers:
        read_sources(layer)
    links = {path: target for layer in layers[:-1] for path, target in _layer_links(layer).items()} | file.links
    _check_links(folder, links)
    return Persona(
        name=folder.name,
        title=file.title,
        kind=file.kind,
        profile=file.profile,
        memory_bytes=file.memory,
        memory_cgroup=file.memory_cgroup,
        layers=layers,
        links=links,
        expected=file.expected,
    )


def read_sources(layer: Path) -> dict[str, str]:
    """The SOURCES of a folder: from a pattern of paths to where those files' values come from; raises ConfigError."""
    path = layer / "SOURCES"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ConfigError(f"{path}: expected the file that says where a persona's values come from, got none") from None
    found: dict[str, str] = {}
    pattern = ""
    for line in lines:
        if line.startswith((" ", "\t")) and pattern:
            found[pattern] += f" {line.strip()}"
        elif line.strip() and not line.startswith("#"):
            pattern, _, text = line.partition(": ")
            found[pattern] = text.strip()
    return found


def _folder(name: str | Path) -> Path:
    for folder in (PERSONAS / name, Path(name).absolute()):
        if (folder / "persona.yaml").is_file():
            return folder
    raise UsageError(
        f'there is no persona "{name}": neither one of the package nor a folder with a persona.yaml; '
        f"{did_you_mean(str(name), personas())}"
    )


def _layer(folder: Path, name: str) -> Path:
    for layer in (folder.parent / name, PERSONAS / name):
        if layer.is_dir():
            return layer
    raise ConfigError(complaint(folder / "persona.yaml", ["extends"], "a folder beside this persona's", name))


def _layer_links(layer: Path) -> dict[str, str]:
    path = layer / "layer.yaml"
    return read_file(path, LayerFile, "a persona's layer").links if path.exists() else {}


def _check_profile(folder: Path, name: str) -> None:
    known = [path.stem for path in (data_folder("inventory") / "profiles").glob("*.yaml")]
    if name not in known:
        expected = f"the name of a hardware profile; {did_you_mean(name, known)}"
        raise ConfigError(complaint(folder / "persona.yaml", ["profile"], expected, name))
    load_profile(data_folder("inventory") / "profiles" / f"{name}.yaml")


def _check_links(folder: Path, links: dict[str, str]) -> None:
    for path in links:
        parts = Path(path).parts
        if not parts or parts[0] not in TREES or ".." in parts:
            expected = f"paths that start with {', '.join(TREES)}"
            raise ConfigError(complaint(folder / "persona.yaml", ["links"], expected, path))


def _all_files(layer: Path) -> Iterator[Path]:
    for tree in TREES:
        yield from _files(layer / tree)
    if (layer / "boot").exists():
        yield layer / "boot"


def _files(folder: Path) -> list[Path]:
    """The files and links below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _place(source: Path, target: Path) -> None:
    """Copy a file or a link.  A program can be run, even where an installer of the package has dropped its mode."""
    _clear(target)
    shutil.copy2(source, target, follow_symlinks=False)
    if not target.is_symlink() and _is_program(target):
        target.chmod(0o755)


def _is_program(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def _link(path: Path, target: str) -> None:
    _clear(path)
    path.symlink_to(target)


def _clear(path: Path) -> None:
    """Make room for a file, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
