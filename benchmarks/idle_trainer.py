"""A trainer that trains nothing: it answers every job with tensors of zeros, 4 KB unless the job's scalars name
`update_bytes`, after the `seconds` that they name.

For `round_overhead.py`, `controller_memory.py` and `agent_overhead.py`.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from testbed.node.link import AgentLink

UPDATE_BYTES = 4096
_PIECE_BYTES = 1 << 20


def tensor_bytes(update_bytes: int, tensors: int) -> int:
    """Of each of some equal F32 tensors that take as many bytes together, or a few less."""
    return update_bytes // 4 // tensors * 4


def header(size: int, tensors: int) -> bytes:
    """The beginning of a safetensors file with tensors t000, t001, … of `size` bytes each."""
    entries = {
        f"t{index:03d}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [index * size, (index + 1) * size]}
        for index in range(tensors)
    }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def write_update(path: Path, update_bytes: int = UPDATE_BYTES, tensors: int = 1) -> None:
    """A safetensors file of zeros."""
    size = tensor_bytes(update_bytes, tensors)
    with path.open("wb") as file:
        file.write(header(size, tensors))
        for start in range(0, size * tensors, _PIECE_BYTES):
            file.write(bytes(min(_PIECE_BYTES, size * tensors - start)))


def result(update_bytes: int, tensors: int) -> dict[str, Any]:
    """What the controller is told of it."""
    shape = [tensor_bytes(update_bytes, tensors) // 4]
    named = [{"name": f"t{index:03d}", "dtype": "F32", "shape": shape, "ranges": None} for index in range(tensors)]
    return {"examples": 1, "tokens": 1, "scalars": {}, "tensors": named, "state": None}


def main() -> None:
    link = AgentLink.connect()
    link.ready({})
    for assignment in link.jobs(unload=lambda: None):
        link.phase("train")
        scalars = assignment.job["scalars"]
        time.sleep(scalars.get("seconds", 0))
        size, tensors = int(scalars.get("update_bytes", UPDATE_BYTES)), int(scalars.get("tensors", 1))
        write_update(assignment.update, size, tensors)
        assignment.write_result(result(size, tensors))
        link.done(assignment.id)


if __name__ == "__main__":
    main()
