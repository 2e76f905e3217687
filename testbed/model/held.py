"""Base weights that stay in memory from job to job, by content: what the next submodel needs is not read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.method import RESIDENT
from testbed.model.tensorfile import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch
    from torch import Tensor


class HeldWeights:
    """Frozen weights in private memory, keyed by the file's name (its content hash), type and device."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], dict[str, Tensor]] = {}

    def read(
        self,
        path: Path,
        holding: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        *,
        names: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """As `read_tensors`, but what is held is given again instead of read (mapped weights cost nothing to map)."""
        if holding != RESIDENT or names is None:
            return read_tensors(path, holding, dtype, device, names=names)
        held = self._held.setdefault((path.name, f"{dtype} {device}"), {})
        wanted = list(names)
        missing = [name for name in wanted if name not in held]
        if missing:
            held |= read_tensors(path, holding, dtype, device, names=missing)
        return {name: held[name] for name in wanted}

    def keep_only(self, contents: Iterable[str | None]) -> None:
        """Let go of everything else, before the next submodel is read."""
        kept = set(contents)
        self._held = {key: tensors for key, tensors in self._held.items() if key[0] in kept}

    def clear(self) -> None:
        """Let go of everything."""
        self._held = {}
