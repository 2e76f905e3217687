"""Safetensors files: the header checked before use, weights read straight into place, files that hash the same.

Written here rather than with the library's loader, because that maps the file and leaves the mapping behind: a budget
must see a frozen weight as memory that nobody can take back (`resident`), unless the plan chose otherwise (`mapped`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from testbed.errors import ModelError
from testbed.method import MAPPED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from testbed.model.content import ContentStore

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}

_HEADER_LIMIT_BYTES = 100_000_000
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, shape and the byte range [start, stop) in the file."""

    name: str
    dtype: str  # safetensors' word: "F32", "BF16", …
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name; only the header is read.

    Raises ModelError naming the file when it cannot be read, is cut short or is not what its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _HEADER_LIMIT_BYTES):
                raise ValueError("the header is longer than the file")  # noqa: TRY301 -- one place makes the message
            header = json.loads(stream.read(length))
        found = [_entry(path, name, spec, 8 + length) for name, spec in header.items() if name != "__metadata__"]
        _check_layout(found, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}): download or copy it again") from error
    return {entry.name: entry for entry in found}


def _entry(path: Path, name: str, spec: Mapping[str, Any], base: int) -> Entry:
    start, stop = spec["data_offsets"]
    shape = tuple(int(size) for size in spec["shape"])
    if spec["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the type {spec['dtype']}, not one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[spec["dtype"]].itemsize
    if min(shape, default=0) < 0 or stop - start != expected:
        raise ValueError(f"{name} has {stop - start} bytes where its shape needs {expected}")
    return Entry(name, spec["dtype"], shape, path, base + start, base + stop)


def _check_layout(found: Iterable[Entry], base: int, size: int) -> None:
    at = base
    for entry in sorted(found, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            raise ValueError(f"{entry.name} does not follow the tensor before it")
        at = entry.stop
    if at != size:
        raise ValueError(f"it has {size} bytes, its header says {at}")


def read_tensors(
    path: Path,
    holding: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name (all, or `names`); bytes of others are not read.

    Floating-point tensors become `dtype` (None: as stored).  `mapped` gives copy-on-write views of the file where it
    stores that very type and `device` is the CPU; a tensor that must be converted has no place in the file, so it is
    read into private memory.  Every other holding reads into private memory (or onto the GPU), a few MiB at a time.
    """
    wanted = None if names is None else set(names)
    chosen = [entry for name, entry in entries(path).items() if wanted is None or name in wanted]
    target = torch.device(device)
    if holding == MAPPED and target.type == "cpu":
        return _mapped(path, chosen, dtype)
    with path.open("rb", buffering=0) as stream:
        return {entry.name: _read(stream.fileno(), entry, _as(entry, dtype), target) for entry in chosen}


def _as(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    return entry.torch_dtype if dtype is None or not entry.torch_dtype.is_floating_point else dtype


def _mapped(path: Path, chosen: list[Entry], dtype: torch.dtype | None) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return {
            entry.name: _view(view, entry)
            if _as(entry, dtype) == entry.torch_dtype
            else _read(stream.fileno(), entry, _as(entry, dtype), torch.device("cpu"))
            for entry in chosen
        }


def _view(view: mmap.mmap, entry: Entry) -> Tensor:
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.torch_dtype)
    return torch.frombuffer(view, dtype=entry.torch_dtype, count=count, offset=entry.start).view(entry.shape)


def _read(file: int, entry: Entry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor, through a small buffer where it is converted or goes to a GPU, else straight into place."""
    result = torch.empty(entry.shape, dtype=dtype, device=device)
    flat = result.view(-1)
    if dtype == entry.torch_dtype and device.type == "cpu":
        _fill(file, entry, flat, entry.start)
        return result
    step = _CHUNK_BYTES // entry.torch_dtype.itemsize
    for first in range(0, flat.numel(), step):
        buffer = torch.empty(min(step, flat.numel() - first), dtype=entry.torch_dtype)
        _fill(file, entry, buffer, entry.start + first * entry.torch_dtype.itemsize)
        flat[first : first + buffer.numel()].copy_(buffer)
    return result


def _fill(file: int, entry: Entry, flat: Tensor, offset: int) -> None:
    rest = _bytes_of(flat)
    while rest:
        count = os.preadv(file, [rest], offset)
        if not count:
            raise ModelError(f"{entry.path} ends within {entry.name}: download or copy it again")
        rest, offset = rest[count:], offset + count


def put_entries(store: ContentStore, renamed: Mapping[str, Entry]) -> str:
    """Copy tensors of one or more files into one new content file, a few MiB at a time; its hash."""
    layout = [(name, entry.dtype, entry.shape) for name, entry in renamed.items()]
    with store.writing() as draft:
        draft.write(_header(layout))
        for name in _order(layout):
            for piece in _pieces(renamed[name]):
                draft.write(piece)
    return draft.content


def put_tensors(store: ContentStore, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors into one content file; the same names and values always give the same hash."""
    layout = [(name, WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with store.writing() as draft:
        draft.write(_header(layout))
        for name in _order(layout):
            draft.write(raw_bytes(tensors[name]))
    return draft.content


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values in row-major order."""
    return _bytes_of(tensor.detach().cpu().contiguous().view(-1))


def _bytes_of(flat: Tensor) -> memoryview:
    values: Any = flat.view(torch.uint8).numpy()
    return memoryview(values)


def _pieces(entry: Entry) -> Iterator[bytes]:
    with entry.path.open("rb") as stream:
        stream.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            piece = stream.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise ModelError(f"{entry.path} ends within {entry.name}: download or copy it again")
            left -= len(piece)
            yield piece


_Layout = list[tuple[str, str, tuple[int, ...]]]


def _order(layout: _Layout) -> list[str]:
    """Widest types first, as safetensors does, so that every tensor is aligned; then by name."""
    return [name for name, dtype, _ in sorted(layout, key=lambda item: (-DTYPES[item[1]].itemsize, item[0]))]


def _header(layout: _Layout) -> bytes:
    specs = {name: (dtype, shape) for name, dtype, shape in layout}
    header: dict[str, Any] = {}
    at = 0
    for name in _order(layout):
        dtype, shape = specs[name]
        stop = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
