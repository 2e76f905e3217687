"""A trainer that trains nothing: it answers every job with 4 KB of tensors.  For `round_overhead.py`."""

from __future__ import annotations

import json
import struct

from testbed.node.link import AgentLink

ELEMENTS = 1024


def update() -> bytes:
    """A safetensors file with one tensor of 4 KB."""
    entry = {"dtype": "F32", "shape": [ELEMENTS], "data_offsets": [0, 4 * ELEMENTS]}
    header = json.dumps({"update": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * ELEMENTS)


def main() -> None:
    link = AgentLink.connect()
    link.ready({})
    tensors = [{"name": "update", "dtype": "F32", "shape": [ELEMENTS], "ranges": None}]
    for assignment in link.jobs(unload=lambda: None):
        link.phase("train")
        assignment.update.write_bytes(update())
        assignment.write_result({"examples": 1, "tokens": 1, "scalars": {}, "tensors": tensors, "state": None})
        link.done(assignment.id)


if __name__ == "__main__":
    main()
