"""A safetensors header is believed only when it adds up."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import WireError
from testbed.node.tensors import read_tensor_header


def write(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_names_dtypes_and_shapes_are_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry("BF16", (2, 3), (8, 20)),
        "c": entry("U8", (0,), (20, 20)),
    }
    path = write(tmp_path / "update", header, bytes(20))
    assert read_tensor_header(path) == {"a": ("F32", (2,)), "b": ("BF16", (2, 3)), "c": ("U8", (0,))}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": entry(offsets=(0, 9))},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(True, 2))},
        {"a": entry(dtype="F33")},
        {"a": entry(dtype=["F32"])},
        {"a": {}},
        {"a": None},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(8, 16))},
        {},
    ],
)
def test_what_does_not_add_up_is_refused(tmp_path, header):
    with pytest.raises(WireError, match="update"):
        read_tensor_header(write(tmp_path / "update", header, bytes(8)))


@given(noise=st.binary(max_size=100))
def test_noise_is_refused(noise, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(noise)
    with pytest.raises(WireError):
        read_tensor_header(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(WireError, match="not a readable"):
        read_tensor_header(tmp_path / "gone")
