"""A recipe and a board into ready-to-copy files.

device_images/RECIPE/files/…        what is copied to a card, or run on the machine that flashes a board
device_images/RECIPE/overlay/…      files of the board itself, by their paths there
device_images/common/overlay/…      … of every board; a recipe's file of the same path stands in its place

cloud-init writes the overlay of most images (templates in files/ put it there); where NVIDIA's tools write the board
(`flash` in the catalogue), it lies below rootfs_overlay/ in the rendered folder.

A name that ends in .jinja is a template (Jinja 2: `board`, `image`, and in files `overlay`), everything else is copied.
A file that comes out empty is left out.  Filters: `yaml` (a scalar), `shell` (a word), `keyfile` (a value of
NetworkManager's), `indent`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.device_images import catalogue
from testbed.device_images.host_key import FILE as HOST_KEY_FILE
from testbed.device_images.host_key import HostKey
from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.device_images.board import Board
    from testbed.device_images.catalogue import Image

#: On the board: which image it was made from, and the files that came with it.
IDENTITY = "/etc/edge-testbed/image.json"
#: In the folder of rendered files: what they are, for `testbed image check`.
MANIFEST = "manifest.json"
KNOWN_HOSTS = "known_hosts"
#: In the folder of rendered files: those of the board itself, where a host copies them into a root file system.
ROOTFS_OVERLAY = "rootfs_overlay"
#: NetworkManager takes no connection that others may read.
PRIVATE_SUFFIX = ".nmconnection"
#: Below a recipe, for whoever bakes with that tool: nothing of it is in what is rendered.
_OTHER_TOOLS = "rpi-image-gen"
_TEMPLATE = ".jinja"


@dataclass(frozen=True)
class RenderedFile:
    """One file; `path` is relative to the folder, or for a file of the board itself absolute."""

    path: str
    text: str = field(repr=False)  # it may hold a secret
    secret: bool = False

    @property
    def mode(self) -> int:
        """On the board: readable there; a script may be run."""
        return 0o600 if self.secret else 0o755 if self.text.startswith("#!") else 0o644

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def render(board: Board) -> tuple[RenderedFile, ...]:
    """All files for a board, in the order of their paths; raises ConfigError for a recipe that is wrong."""
    image = catalogue.named(board.image)
    overlay = _overlay(board, image)
    files = dict(_templates(image, "files", {"board": board, "image": image, "overlay": overlay}))
    rendered = [RenderedFile(path, text, secret=_secret(text, board)) for path, text in files.items() if text.strip()]
    if image.flash is not None:
        rendered += [replace(file, path=f"{ROOTFS_OVERLAY}{file.path}") for file in overlay]
    rendered.append(RenderedFile(HOST_KEY_FILE, board.host_key.private, secret=True))
    rendered.append(RenderedFile(KNOWN_HOSTS, board.known_hosts))
    rendered.append(RenderedFile(MANIFEST, _manifest(board, image, rendered)))
    return tuple(sorted(rendered, key=lambda file: file.path))


def write(files: tuple[RenderedFile, ...], folder: Path) -> None:
    """Write them below a folder that is only the user's; what an earlier rendering left there goes.

    Raises UsageError for a folder that holds anything else, or another board.
    """
    refuse_foreign(folder, _device_of(files))
    try:
        _clear(folder, {file.path for file in files})
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for file in files:
            _write(file, folder / file.path)
    except OSError as error:
        raise UsageError(f"{folder}: the files cannot be written: {error.strerror}") from None


def host_key_in(folder: Path) -> HostKey:
    """The host key of an earlier rendering, so that a card that is made anew is the same board; else a new one."""
    path = folder / HOST_KEY_FILE
    return HostKey.read(path) if path.is_file() else HostKey.made()


def refuse_foreign(folder: Path, device: str) -> None:
    """Raises UsageError for a folder that is not for the files of the board of that host name."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder, and it is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} holds other files than those of an image; name a new folder")
    there = read_manifest(folder)["device"]
    if there != device:
        raise UsageError(f"{folder} holds the files of {there}; name another folder for those of {device}")


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """What was rendered into a folder: image, board, state of the recipe, digests.

    Raises UsageError for any other folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected the folder that `testbed image render` wrote, and it is a file")
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): str(digest) for name, digest in told["files"].items()}
        return {**{name: str(told[name]) for name in ("image", "recipe", "device", "architecture")}, "files": files}
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {MANIFEST}: it was not made by `testbed image render`") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{path} is not as `testbed image render` wrote it: put it back, or render the files into a new folder, "
            "where the board gets a new host key"
        ) from None


def recipe_digest(image: Image) -> str:
    """What tells one state of a recipe from another: SHA-256 over its files and the common ones, 16 digits."""
    digest = hashlib.sha256()
    for root in (catalogue.folder() / image.recipe, catalogue.folder() / "common"):
        for path in _files_below(root):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ── the board's own files ────────────────────────────────────────────────────────────────────────────────────────────
def _overlay(board: Board, image: Image) -> tuple[RenderedFile, ...]:
    texts: dict[str, str] = {}
    for recipe in ("common", image.recipe):
        texts |= dict(_templates(image, "overlay", {"board": board, "image": image}, recipe))
    files = [
        RenderedFile(f"/{path}", text, secret=_secret(text, board) or path.endswith(PRIVATE_SUFFIX))
        for path, text in sorted(texts.items())
        if text.strip()
    ]
    identity = {
        "image": board.image,
        "recipe": recipe_digest(image),
        "device": board.host_name,
        # A secret is no part of what the login user can look at there.
        "files": {file.path: file.sha256 for file in files if not file.secret},
    }
    return (*files, RenderedFile(IDENTITY, json.dumps(identity, indent=1) + "\n"))


def _templates(
    image: Image, part: str, context: Mapping[str, Any], recipe: str | None = None
) -> Iterator[tuple[str, str]]:
    """(path, text) of every file of a recipe's part."""
    root = catalogue.folder() / (recipe or image.recipe) / part
    environment = _environment(root)
    for path in _files_below(root):
        name = path.relative_to(root).as_posix()
        if name.endswith(_TEMPLATE):
            yield name.removesuffix(_TEMPLATE), environment.get_template(name).render(context)
        else:
            yield name, path.read_text(encoding="utf-8")


def _environment(root: Path) -> Any:
    import jinja2

    places = jinja2.FileSystemLoader([root, catalogue.folder() / "common" / "parts"])
    made = jinja2.Environment(
        loader=places, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,  # noqa: S701 -- nothing here is HTML; `yaml` and `shell` quote
    )  # fmt: skip
    made.filters |= {"yaml": _yaml, "shell": lambda word: shlex.quote(str(word)), "keyfile": _keyfile}
    return made


def _yaml(value: object) -> str:
    """A scalar, or a list or mapping, as YAML on one line: JSON is YAML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _keyfile(value: str) -> str:
    """A value in a file of NetworkManager's: of GLib's key files, where only the blanks at the start need a word."""
    escaped = value.replace("\\", "\\\\")
    return "\\s" * (len(escaped) - len(escaped.lstrip(" "))) + escaped.lstrip(" ")


def _files_below(root: Path) -> list[Path]:
    left_out = {"__pycache__", _OTHER_TOOLS}
    return sorted(
        path for path in root.rglob("*") if path.is_file() and left_out.isdisjoint(path.relative_to(root).parts)
    )


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
def _secret(text: str, board: Board) -> bool:
    body = "".join(board.host_key.private.splitlines()[1:2])
    password = board.wifi_password
    return body in text or (
        password is not None and any(form in text for form in (password, _yaml(password), _keyfile(password)))
    )


def _manifest(board: Board, image: Image, files: list[RenderedFile]) -> str:
    told = {
        "image": board.image,
        "recipe": recipe_digest(image),
        "device": board.host_name,
        "profile": board.profile.name,
        "architecture": board.profile.architecture,
        "files": {file.path: file.sha256 for file in files},
    }
    return json.dumps(told, indent=1) + "\n"


def _device_of(files: tuple[RenderedFile, ...]) -> str:
    manifest = next(file for file in files if file.path == MANIFEST)
    return str(json.loads(manifest.text)["device"])


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove what the manifest names and is not written again, with the folders that this empties; nothing else."""
    if not (folder / MANIFEST).is_file():
        return
    root = folder.resolve()
    for path in (folder / name for name in read_manifest(folder)["files"] if name not in kept):
        if not path.resolve().is_relative_to(root):
            continue
        path.unlink(missing_ok=True)
        parent = path.parent
        while parent.is_dir() and parent.resolve() != root and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


def _write(file: RenderedFile, path: Path) -> None:
    """One that is there as it should be is left: a full disk must not cost a board its host key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != file.text.encode():
        path.touch(mode=0o600)
        path.write_text(file.text, encoding="utf-8")
    path.chmod(file.mode)
