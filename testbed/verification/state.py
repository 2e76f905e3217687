"""The model that a run ended with: its hash, and its export derived again from the newest checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import checkpoints
from testbed.errors import StoreError, TestbedError, WireError
from testbed.node.tensors import read_tensor_header
from testbed.run_record import FINISHED
from testbed.verification.checks import Check, counted, judged, unknown

if TYPE_CHECKING:
    from testbed.method import State
    from testbed.model.checkpoint import BaseModel
    from testbed.store import RunFolder

#: In a JSON file of an export: where the base model stood, and which library wrote it.
_ELSEWHERE = frozenset({"base_model_name_or_path", "_name_or_path", "transformers_version"})


@dataclass(frozen=True)
class Newest:
    """A run's newest checkpoint, or why it cannot be read."""

    state: State | None = None
    rounds: int = 0  # done when it was written
    why: str | None = None
    damaged: bool = False  # it is there, and is not what was written


def newest_checkpoint(folder: RunFolder) -> Newest:
    """The newest itself: a damaged one is not passed over for the one before it."""
    there = sorted((folder.path / "checkpoint").glob("round-*"))
    if not there:
        return Newest(why="there is no checkpoint: no round has ended")
    try:
        state, rounds, _ = checkpoints.read(there[-1])
    except (OSError, StoreError, ValueError, KeyError, TypeError) as error:
        return Newest(why=f"checkpoint/{there[-1].name}: {error}", damaged=True)
    return Newest(state, rounds)


def check_state(folder: RunFolder, newest: Newest) -> Check:
    """The final state's hash is that of the newest checkpoint, which is of the last round."""
    from testbed.model.combine import state_hash

    status = folder.status
    if newest.state is None:
        why = newest.why or ""
        return judged("state", "the newest checkpoint", [why]) if newest.damaged else unknown("state", why)
    if status.final_state is None:
        return unknown("state", f"the run is {status.state}: only a finished one has a final state")
    found = str(state_hash(newest.state.every_tensor, newest.state.scalars))
    failures = []
    if found != status.final_state:
        failures.append(f"the newest checkpoint has the hash {found}, the run ended with {status.final_state}")
    if (done := len(folder.rounds())) != newest.rounds:
        failures.append(f"the newest checkpoint is of {counted(newest.rounds, 'round')}, {done} are recorded")
    return judged("state", f"{counted(len(newest.state.tensors), 'tensor')}, hash {found[:16]}…", failures)


def check_export(folder: RunFolder, newest: Newest, base: BaseModel | str) -> Check:
    """The files of `export` are what the method makes of the newest checkpoint; without a base model, well-formed."""
    files = sorted(path for path in (folder.path / "export").rglob("*") if path.is_file())
    if folder.status.state != FINISHED:
        return unknown("export", f"the run is {folder.status.state}: only a finished one is exported")
    if not files:
        return judged("export", "the trained model", ["the folder is empty, and the run is finished"])
    failures = list(_malformed(files))
    if failures or newest.state is None or isinstance(base, str):
        why = base if isinstance(base, str) else newest.why
        found = f"{counted(len(files), 'file')}, well-formed"
        return judged("export", found, failures, [] if why is None else [f"not derived again: {why}"])
    try:
        return judged("export", f"{counted(len(files), 'file')} derived again", _derived(folder, newest.state, base))
    except (TestbedError, OSError, KeyError, TypeError, ValueError) as error:
        return unknown("export", f"well-formed, but it cannot be derived again here: {error}")


def _malformed(files: list[Path]) -> Iterator[str]:
    for path in files:
        try:
            if path.suffix == ".safetensors":
                read_tensor_header(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (WireError, OSError, ValueError) as error:  # noqa: PERF203 -- each file by itself
            yield f"export/{path.name}: {error}"


def _derived(folder: RunFolder, state: State, base: BaseModel) -> list[str]:
    """How the export differs from one that is made now."""
    from testbed.method import Workload
    from testbed.plugins import restore_method

    method = restore_method(folder.config["method"], folder.config["settings"])
    with tempfile.TemporaryDirectory(prefix="testbed-verify-") as made:
        method.export(state, base, Workload(**folder.plan["work"]), Path(made))
        return list(_different(folder.path / "export", Path(made)))


def _different(stored: Path, made: Path) -> Iterator[str]:
    names = {path.relative_to(root).as_posix() for root in (stored, made) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names):
        if not (stored / name).is_file():
            yield f"export/{name} is missing"
        elif not (made / name).is_file():
            yield f"export/{name} is none of what the method exports"
        elif (how := _difference(stored / name, made / name)) is not None:
            yield f"export/{name}: {how}"


def _difference(stored: Path, made: Path) -> str | None:
    if stored.suffix == ".safetensors":
        return _tensor_difference(stored, made)
    if stored.suffix == ".json":
        same = _plain(json.loads(stored.read_text("utf-8"))) == _plain(json.loads(made.read_text("utf-8")))
    else:
        same = stored.read_bytes() == made.read_bytes()
    return None if same else "is not what the newest checkpoint gives"


def _tensor_difference(stored: Path, made: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(stored, "pt") as ours, safe_open(made, "pt") as theirs:
        if set(ours.keys()) != set(theirs.keys()):
            odd = min(set(ours.keys()) ^ set(theirs.keys()))
            return f"it and the newest checkpoint do not both have the tensor {odd}"
        differing = [name for name in sorted(ours.keys()) if not _equal(ours.get_tensor(name), theirs.get_tensor(name))]
    if not differing:
        return None
    return f"not the newest checkpoint's in {counted(len(differing), 'tensor')}, the first is {differing[0]}"


def _equal(one: Any, other: Any) -> bool:
    """Bit for bit, so that what is no number equals itself."""
    from testbed.model.tensorfile import raw_bytes

    return bool(one.dtype == other.dtype and one.shape == other.shape and raw_bytes(one) == raw_bytes(other))


def _plain(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if key not in _ELSEWHERE}
