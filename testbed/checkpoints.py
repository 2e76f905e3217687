"""The state of a run after a round, on the disk: whole or not there, and known to be intact when read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

from testbed.durable import disk_errors_in_words, plain, sync_all, sync_path
from testbed.errors import StoreError
from testbed.method import SERVER, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

KEPT = 2
TENSORS = "state.safetensors"
HEADER = "state.json"

logger = logging.getLogger(__name__)


def save(
    folder: Path, state: State, round_index: int, extra: Mapping[str, Any], with_files: Iterable[Path] = ()
) -> Path:
    """Write `folder`/round-NNNNN; when this returns it survives a power cut.  The newest two stay.

    with_files    other files of the run that must be on the disk before the checkpoint counts
    """
    partial = folder / f".partial-{os.getpid()}"
    target = folder / f"round-{round_index:05d}"
    with disk_errors_in_words(folder):
        for left in [*folder.glob(".partial-*"), *folder.glob(".replaced-*")]:  # of a controller that was killed
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        try:
            written = _write(partial, state, round_index, extra)
            others = [path for path in with_files if path.exists()]
            sync_all([*written, *others, *dict.fromkeys(path.parent for path in others)])
            _put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in _newest_first(folder)[KEPT:]:
            shutil.rmtree(old)
    return target


def go_back(folder: Path, state: State, round_index: int, extra: Mapping[str, Any]) -> Path:
    """`save` of an earlier round than the newest, which becomes the newest; one is there at every moment."""
    newer = [path for path in _newest_first(folder) if path.name > f"round-{round_index:05d}"]
    with disk_errors_in_words(folder):
        for path in newer[1:]:
            shutil.rmtree(path)
        target = save(folder, state, round_index, extra)
        for path in newer[:1]:
            shutil.rmtree(path)
    return target


def load(folder: Path) -> tuple[State, int, dict[str, Any]] | None:
    """The newest checkpoint that is intact; None when there is none; StoreError when none of them is."""
    found = _newest_first(folder)
    for path in found:
        try:
            return read(path)
        except (OSError, StoreError, ValueError, KeyError, TypeError) as error:  # noqa: PERF203 -- two at most
            logger.warning("%s: damaged (%s); going back to the checkpoint before it", path, error)
    if found:
        raise StoreError(f"{folder}: none of {len(found)} checkpoints can be read; start the run anew")
    return None


def _write(folder: Path, state: State, round_index: int, extra: Mapping[str, Any]) -> tuple[Path, ...]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_apart(state.every_tensor), folder / TENSORS)
    except SafetensorError as error:
        raise _disk_error(error) from error
    body = {
        "round": round_index,
        "names": list(state.tensors),  # in their order: a method that walks through them does so alike after a resume
        "scalars": state.scalars,
        "blocks": list(state.blocks),
        "server": list(state.server),
        "extra": extra,
    }
    text = json.dumps(body, default=plain)
    header = {"tensors_sha256": _sha256(folder / TENSORS), "body_sha256": _sha256_of(text), "body": text}
    (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")
    return folder / TENSORS, folder / HEADER, folder


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = partial.with_name(f".replaced-{os.getpid()}")
    if target.exists():  # a round that ran again after a resume
        target.rename(replaced)
    partial.rename(target)
    sync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read(path: Path) -> tuple[State, int, dict[str, Any]]:
    """One checkpoint's state, rounds done and extra; raises an error of many kinds when it is not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = json.loads((path / HEADER).read_text(encoding="utf-8"))
    if _sha256_of(header["body"]) != header["body_sha256"]:
        raise StoreError(f"{HEADER} does not have the content that was written")
    if _sha256(path / TENSORS) != header["tensors_sha256"]:
        raise StoreError(f"{TENSORS} does not have the content that was written")
    body = json.loads(header["body"])
    try:
        tensors = load_file(path / TENSORS, backend="pread")
    except SafetensorError as error:
        raise StoreError(f"{TENSORS}: {error}") from error
    ordered = {name: tensors[name] for name in body["names"]}
    server = {name: tensors[f"{SERVER}{name}"] for name in body.get("server", ())}
    return State(ordered, body["scalars"], tuple(body["blocks"]), server), body["round"], body["extra"]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"), reverse=True) if folder.is_dir() else []


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: safetensors writes no views and no tensor twice."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        plain_tensor = tensor.detach().cpu().contiguous()
        storage = plain_tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != plain_tensor.numel() * plain_tensor.element_size()
        apart[name] = plain_tensor.clone() if shared else plain_tensor
        seen.add(storage.data_ptr())
    return apart


def _disk_error(error: Exception) -> OSError:
    """The system's error, which safetensors tells only in its text: "… (os error 28)"."""
    number = str(error).rpartition("(os error ")[2].partition(")")[0]
    return OSError(int(number), os.strerror(int(number))) if number.isdigit() else OSError(str(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
