"""Updates on the controller: spooled on disk as they arrive, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import WireError
from testbed.job import Result
from testbed.method import Part, Received

if TYPE_CHECKING:
    from torch import Tensor


class SpooledUpdate:
    """A client's update: its header in memory, its tensors on disk."""

    def __init__(self, result: Result, path: Path) -> None:
        self.client = result.client
        self.examples = result.examples
        self.scalars: Mapping[str, Any] = result.scalars
        self.names = tuple(spec.name for spec in result.tensors)
        self._ranges = {spec.name: spec.ranges for spec in result.tensors}
        self._path = path

    def read(self, name: str) -> Part:
        """One tensor with the ranges it covers.  Raises WireError when it is not there or cannot be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, "pt") as file:
                return Part(file.get_tensor(name), self._ranges[name])
        except (SafetensorError, OSError, KeyError) as error:
            raise WireError(f"client {self.client}: tensor {name!r} of its update cannot be read ({error})") from None


def check_finite(update: Received) -> None:
    """Raise WireError when a tensor of the update holds a NaN or an infinity."""
    for name in update.names:
        tensor = update.read(name).tensor
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WireError(f"client {update.client}: tensor {name!r} of its update holds values that are not finite")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write a job's tensors as its payload, in the order of their names."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_apart(tensors), path)
    return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, by name, none of them sharing memory with another (safetensors refuses those that do)."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in sorted(tensors.items()):
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return apart
