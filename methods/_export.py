"""What methods share whose result no library reads: the tensors, and a description of where they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.method import State, Workload

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel


def export_tensors(folder: Path, stem: str, state: State, base: BaseModel, work: Workload, **about: Any) -> None:
    """Write STEM.safetensors with the state's tensors by canonical name, and STEM.json, which says what they are."""
    from safetensors.torch import save_file

    described = {"base_model_name_or_path": str(base.folder), "task": work.task, "labels": work.labels, **about}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_file(dict(state.tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
