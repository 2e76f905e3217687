"""Our code, and every package that offers methods, as one wheel that is known by its hash.

A device gets the wheel once and unpacks it into a folder of that name, which a node process puts before everything
else on its path.  The hash depends on nothing but the content: names are sorted, times are fixed, nothing is
compressed (what a compressor writes differs between its versions).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path

from testbed.errors import ConfigError
from testbed.plugins import METHODS_GROUP

DISTRIBUTION = "edge-testbed"
#: Of the package `testbed`, what only the controller runs: a change there is no reason to send the code again.
_CONTROLLER_ONLY = frozenset(
    {"__main__.py", "cli.py", "commands", "lab", "package_data", "provision", "py.typed", "quickstart"}
)
_WHEEL_FILE = b"Wheel-Version: 1.0\nGenerator: edge-testbed\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_COMPILED = (".so", ".pyd", ".dylib")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_FILE_MODE = 0o100644


@dataclass(frozen=True)
class CodeWheel:
    """A wheel file, the hash of its content and the names in it."""

    path: Path
    sha256: str
    files: tuple[str, ...]


def build(folder: Path) -> CodeWheel:
    """Write the wheel into `folder` as <sha256>.whl, unless it is there.

    Raises ConfigError for a package that cannot be sent: not installed, no package, or compiled for this machine.
    """
    files = _files()
    content = _zipped(files)
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / f"{sha256}.whl"
    if not path.exists():
        _write(path, content)
    return CodeWheel(path, sha256, tuple(files))


def _files() -> dict[str, bytes]:
    """Content by name in the wheel, sorted."""
    found: dict[str, bytes] = {}
    for distribution in _distributions():
        own = dict(_files_of(distribution))
        info = f"{distribution.name.replace('-', '_')}-{distribution.version}.dist-info"
        own.update(_information(distribution, info))
        own[f"{info}/RECORD"] = _record(own, info)
        found.update(own)
    return dict(sorted(found.items()))


def _distributions() -> list[metadata.Distribution]:
    """Ours, and every other that offers methods."""
    try:
        found = {DISTRIBUTION: metadata.distribution(DISTRIBUTION)}
    except metadata.PackageNotFoundError:
        raise ConfigError(f"{DISTRIBUTION} is not installed in this Python; install it (pip install -e .)") from None
    for entry in metadata.entry_points(group=METHODS_GROUP):
        if entry.dist is not None:
            found.setdefault(entry.dist.name, entry.dist)
    return [found[name] for name in sorted(found)]


def _files_of(distribution: metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    for package in sorted(_top_level(distribution)):
        skipped = _CONTROLLER_ONLY if package == "testbed" else frozenset()
        for path, name in _sources(distribution, package, skipped):
            if name.endswith(_COMPILED):
                raise ConfigError(
                    f"{path}: a package that offers methods is sent to devices of other machine types, and this file "
                    f"is compiled for this one; {distribution.name} must be Python only"
                )
            yield name, path.read_bytes()


def _top_level(distribution: metadata.Distribution) -> set[str]:
    """Names of the packages (and single modules) of a distribution.

    One that is installed as editable lists no files: there, what its entry points name and `top_level.txt` must do.
    """
    names = {entry.value.partition(".")[0] for entry in distribution.entry_points if entry.group == METHODS_GROUP}
    names.update((distribution.read_text("top_level.txt") or "").split())
    for file in distribution.files or ():
        first = file.parts[0]
        names.add(first if len(file.parts) > 1 else first.removesuffix(".py"))
    if distribution.name == DISTRIBUTION:
        names.add("testbed")
    return {name for name in names if name.isidentifier() and not name.startswith("__")}


def _sources(distribution: metadata.Distribution, package: str, skipped: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """(file, its name in the wheel) of a package or single module."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ConfigError(f"{distribution.name}: its package {package!r} cannot be found; install it again")
    if not spec.submodule_search_locations:
        yield Path(str(spec.origin)), f"{package}.py"
        return
    for place in spec.submodule_search_locations:
        for path in _walk(Path(place), skipped):
            yield path, f"{package}/{path.relative_to(place).as_posix()}"


def _walk(folder: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in skipped or path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path, frozenset())
        elif path.suffix not in {".pyc", ".pyo"}:
            yield path


def _information(distribution: metadata.Distribution, info: str) -> Iterator[tuple[str, bytes]]:
    headers, _, _description = (distribution.read_text("METADATA") or "").partition("\n\n")
    yield f"{info}/METADATA", f"{headers}\n".encode()
    yield f"{info}/entry_points.txt", (distribution.read_text("entry_points.txt") or "").encode()
    yield f"{info}/WHEEL", _WHEEL_FILE


def _record(files: dict[str, bytes], info: str) -> bytes:
    """The list of a wheel's files; see "The .dist-info directory" in the binary distribution format."""
    lines = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in sorted(files.items())]
    return "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _zipped(files: dict[str, bytes]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _ZIP_TIME)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = _FILE_MODE << 16
            archive.writestr(entry, content)
    return out.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.partial")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
