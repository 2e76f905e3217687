"""Frames survive whatever the channel does to their pieces, and refuse whatever is none."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import WireError
from testbed.node.frames import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, PREFIX, Channel, FrameReader, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FRAMES = st.lists(st.tuples(st.dictionaries(st.text(), JSON, max_size=4), st.binary(max_size=300)), max_size=6)


class Gather:
    def __init__(self):
        self.data = bytearray()
        self.closed = False

    def write(self, data):
        assert not self.closed
        self.data += data

    def close(self):
        self.closed = True


def reader():
    frames = []
    took = FrameReader(lambda *_: Gather(), lambda header, size, sink: frames.append((header, size, sink)))
    return took, frames


@given(FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_frames_arrive_as_they_were_sent_however_they_are_cut(sent, cuts):
    stream = b"".join(encode({**header, "type": "x"}, len(payload)) + payload for header, payload in sent)
    took, frames = reader()
    position, index = 0, 0
    while position < len(stream):
        size = cuts[index % len(cuts)]
        took.feed(stream[position : position + size])
        position, index = position + size, index + 1
    assert [header for header, _, _ in frames] == [{**header, "type": "x"} for header, _ in sent]
    assert [bytes(sink.data) if sink else b"" for _, _, sink in frames] == [payload for _, payload in sent]
    assert sum(size for _, size, _ in frames) == len(stream)
    assert all(sink.closed for _, _, sink in frames if sink)


@given(st.binary(max_size=200))
def test_noise_is_refused_with_an_error_of_ours_or_waits_for_more(noise):
    took, _ = reader()
    try:
        took.feed(noise)
    except WireError as error:
        assert str(error)  # noqa: PT017 -- both outcomes are right


@pytest.mark.parametrize(
    "start",
    [
        PREFIX.pack(0, 0),
        PREFIX.pack(MAX_HEADER_BYTES + 1, 0),
        PREFIX.pack(2, MAX_PAYLOAD_BYTES + 1),
        PREFIX.pack(2, 0) + b"{}",
        PREFIX.pack(2, 0) + b"[]",
        PREFIX.pack(3, 0) + b"\xff\xfe\xfd",
        PREFIX.pack(10, 0) + b'{"type":1}',
        PREFIX.pack(100_000, 0) + b"[" * 100_000,
    ],
)
def test_what_is_no_frame_is_refused(start):
    took, frames = reader()
    with pytest.raises(WireError):
        took.feed(start)
    assert frames == []


def test_a_header_too_large_for_the_reader_is_not_sent():
    with pytest.raises(WireError, match="belong into tensors"):
        encode({"type": "job", "text": "x" * MAX_HEADER_BYTES})


def test_a_payload_goes_from_file_to_sink_through_a_socket_that_takes_little(tmp_path):
    payload = tmp_path / "payload"
    payload.write_bytes(bytes(range(256)) * 20_000)
    ours, theirs = socket.socketpair()
    sent, took, frames = [], [], []
    sender = Channel(ours, lambda *_: Gather(), lambda *_: None)
    receiver = Channel(theirs, lambda *_: Gather(), lambda *frame: frames.append(frame))
    size = sender.send({"type": "update"}, payload)
    sender.writer.then(lambda: sent.append(len(took)))
    while not frames:
        sender.flush()
        assert receiver.receive()
        took.append(1)
    (header, frame_bytes, sink), *rest = frames
    assert header == {"type": "update"}
    assert bytes(sink.data) == payload.read_bytes()
    assert frame_bytes == size
    assert rest == []
    sender.flush()
    assert sent != []
    sender.close()
    assert not receiver.receive()
    receiver.close()


def test_headers_are_plain_json():
    prefix, text = PREFIX.size, encode({"type": "ping"})
    assert json.loads(text[prefix:]) == {"type": "ping"}
