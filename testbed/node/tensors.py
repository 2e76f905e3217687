"""What a safetensors file says it holds, checked without reading a tensor.  Standard library only."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from testbed.errors import WireError

if TYPE_CHECKING:
    from pathlib import Path

#: Bits per element, by safetensors' word for a dtype.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100 << 20


def read_tensor_header(path: Path, name: str | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor; raises WireError when sizes, offsets and the file do not agree.

    `name` is what messages call the file.
    """
    name = name or path.name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise WireError(f"{name}: not a complete safetensors file ({size} bytes)")
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError, RecursionError) as error:
        raise WireError(f"{name}: not a readable safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise WireError(f"{name}: its safetensors header is not an object")
    header.pop("__metadata__", None)
    _check_layout(name, header, size - 8 - header_bytes)
    return {tensor: (entry["dtype"], tuple(entry["shape"])) for tensor, entry in header.items()}


def _check_layout(file: str, header: dict[str, Any], data_bytes: int) -> None:
    """The tensors must fill the data without gap or overlap, each with the bytes of its dtype and shape."""
    spans = sorted(_span(file, name, entry) for name, entry in header.items())
    end = 0
    for start, stop in spans:
        if start != end:
            raise WireError(f"{file}: its tensors do not lie side by side (byte {end} against {start})")
        end = stop
    if end != data_bytes:
        raise WireError(f"{file}: its header describes {end} bytes of tensors, and {data_bytes} are there")


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        elements = math.prod(shape)
        plain = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        known_bits = DTYPE_BITS.get(dtype)
    except (TypeError, KeyError, ValueError):
        plain, known_bits = False, None
    if not plain or known_bits is None or stop - start != elements * known_bits // 8:
        raise WireError(f"{file}: the entry of tensor {name!r} does not add up: {str(entry)[:200]}")
    return start, stop
