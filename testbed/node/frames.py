"""The wire between controller and agent: length-prefixed frames, a JSON header and raw payload bytes.  Never pickle.

    ┌──────────────┬───────────────┬──────────────────────┬──────────────────────┐
    │ header bytes │ payload bytes │ header               │ payload              │
    │ 4, big-endian│ 8, big-endian │ UTF-8, a JSON object │ as it is (safetensors│
    └──────────────┴───────────────┴──────────────────────┴──────────────────────┘

Every header names its "type".  A payload is never held in memory: it goes piece by piece to a *sink* and comes from a
file.  Nothing here blocks: a reader is fed with whatever bytes have come, a writer sends what the channel takes.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from testbed.errors import WireError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from testbed.node.pace import Pace

PREFIX = struct.Struct(">IQ")
MAX_HEADER_BYTES = 4 << 20
MAX_PAYLOAD_BYTES = 64 << 30
#: Read at a time: with 128 KiB a large update takes a tenth longer (benchmarks/round_overhead.py --inventory).
CHUNK_BYTES = 512 << 10
#: Version of the messages; a controller and an agent that differ refuse each other.
PROTOCOL = 1

Header = dict[str, Any]


class Sink(Protocol):
    """Where a payload goes as it arrives."""

    def write(self, data: memoryview) -> object: ...

    def close(self) -> None: ...


class NoSink:
    """Swallows a payload that nobody wants, so that the frames after it can still be read."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None: ...


def encode(header: Header, payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame; raises WireError when the header is larger than a reader accepts."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(
            f"a {header.get('type')!r} header of {len(text)} bytes was to be sent, and at most {MAX_HEADER_BYTES} are "
            f"accepted; large values belong into tensors, not into scalars"
        )
    return PREFIX.pack(len(text), payload_bytes) + text


def decode(text: bytes) -> Header:
    """The header of a frame; raises WireError for anything but a JSON object with a "type"."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise WireError('a frame\'s header is not a JSON object with a "type"')
    return header


class FrameReader:
    """Turns the bytes of a channel into frames.

    `open_sink(header, payload bytes)` is asked once per frame that has a payload; `on_frame(header, frame bytes, sink)`
    comes when a frame is complete (sink None: it had no payload).
    """

    def __init__(
        self, open_sink: Callable[[Header, int], Sink], on_frame: Callable[[Header, int, Sink | None], None]
    ) -> None:
        self._open_sink = open_sink
        self._on_frame = on_frame
        self._buffer = bytearray()
        self._header: Header | None = None
        self._frame_bytes = 0
        self._missing_bytes = 0
        self._sink: Sink | None = None

    @property
    def inside_payload(self) -> bool:
        return self._header is not None

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the channel; raises WireError when they are no frames (the channel is then lost)."""
        view = memoryview(data)
        while view:
            view = self._take_payload(view) if self._header is not None else self._take_header(view)

    def abort(self) -> None:
        """The channel ended: close a sink that will get no more."""
        if self._sink is not None:
            self._sink.close()
        self._header = self._sink = None

    def _take_header(self, view: memoryview) -> memoryview:
        end = PREFIX.size
        if len(self._buffer) >= PREFIX.size:
            end += self._sizes()[0]
        taken = view[: end - len(self._buffer)]
        self._buffer += taken
        if len(self._buffer) == PREFIX.size:
            self._sizes()  # refused as soon as it can be, before anything is gathered
        elif len(self._buffer) == end and end > PREFIX.size:
            self._begin()
        return view[len(taken) :]

    def _sizes(self) -> tuple[int, int]:
        header_bytes, payload_bytes = PREFIX.unpack_from(self._buffer)
        if not 0 < header_bytes <= MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise WireError(
                f"a frame announces {header_bytes} header and {payload_bytes} payload bytes; at most "
                f"{MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES} are accepted"
            )
        return header_bytes, payload_bytes

    def _begin(self) -> None:
        self._missing_bytes = self._sizes()[1]
        self._frame_bytes = len(self._buffer) + self._missing_bytes
        self._header = decode(bytes(self._buffer[PREFIX.size :]))
        self._buffer.clear()
        if self._missing_bytes:
            self._sink = self._open_sink(self._header, self._missing_bytes)
        else:
            self._complete()

    def _take_payload(self, view: memoryview) -> memoryview:
        taken = view[: self._missing_bytes]
        if self._sink is not None:
            self._sink.write(taken)
        self._missing_bytes -= len(taken)
        if not self._missing_bytes:
            self._complete()
        return view[len(taken) :]

    def _complete(self) -> None:
        header, sink = self._header, self._sink
        self._header = self._sink = None
        if sink is not None:
            sink.close()
        if header is not None:
            self._on_frame(header, self._frame_bytes, sink)


class Channel:
    """A connected stream socket that never blocks, with frames both ways."""

    def __init__(
        self,
        sock: socket.socket,
        open_sink: Callable[[Header, int], Sink],
        on_frame: Callable[[Header, int, Sink | None], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.reader = FrameReader(open_sink, on_frame)
        self.writer = FrameWriter()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, header: Header, payload: Path | None = None) -> int:
        """Queue a frame and send what goes at once; gives the frame's size in bytes.

        A lost channel shows in `receive`, where everybody looks for it.
        """
        size = self.writer.send(header, payload)
        self.flush()
        return size

    def flush(self) -> None:
        """Send what the channel takes now."""
        try:
            self.writer.flush(self.sock)
        except OSError:
            self.writer.close()

    def receive(self) -> bool:
        """Take in what has come; False when the channel has ended.  Raises WireError for what is no frame."""
        try:
            data = self.sock.recv(CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.reader.feed(data)
        return bool(data)

    def close(self) -> None:
        self.reader.abort()
        self.writer.close()
        self.sock.close()


class _File:
    """What is left of a file to be sent."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = self.left = os.fstat(self.fd).st_size
        self.offset = 0

    def send(self, channel: socket.socket, most: int) -> int:
        count = os.sendfile(channel.fileno(), self.fd, self.offset, min(most, 1 << 30))
        if not count:
            raise WireError("a payload became shorter while it was sent")
        self.offset += count
        self.left -= count
        return count

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class FrameWriter:
    """Frames on their way out, in order; `flush` sends what the channel takes, and no faster than its pace."""

    def __init__(self) -> None:
        self._pace: Pace | None = None  # None: as fast as the channel takes it
        self._queue: deque[memoryview | _File | Callable[[], None]] = deque()
        self.waiting_bytes = 0  # of headers; payloads wait in their files
        self.sent_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def pace(self) -> Pace | None:
        """How fast a slow link lets pass what is sent, if it is to be slow."""
        return self._pace

    @pace.setter
    def pace(self, pace: Pace | None) -> None:
        if pace is self._pace:
            return
        if self._pace is not None:
            self._pace.end()
        self._pace = pace
        if pace is not None and self._queue:
            pace.begin()

    @property
    def due(self) -> float | None:
        """When the pace lets something pass again, on the monotonic clock; None where it holds nothing back."""
        return self._pace.due if self._pace is not None and self._queue else None

    @property
    def wants_to_send(self) -> bool:
        """Whether something waits, and may pass now."""
        return bool(self._queue) and (self._pace is None or time.monotonic() >= self._pace.due)

    def send(self, header: Header, payload: Path | None = None) -> int:
        """Queue a frame and return its size in bytes; raises OSError when the payload cannot be read."""
        file = _File(payload) if payload is not None else None
        size = file.size if file is not None else 0
        head = encode(header, size)
        if self._pace is not None and not self._queue:
            self._pace.begin()
        self._queue.append(memoryview(head))
        self.waiting_bytes += len(head)
        if file is not None:
            self._queue.append(file)
        return len(head) + size

    def then(self, action: Callable[[], None]) -> None:
        """Call `action` when everything queued so far has been sent."""
        self._queue.append(action)

    def flush(self, channel: socket.socket) -> bool:
        """Send what the channel takes; True when nothing is left.  Raises OSError when the channel is lost."""
        try:
            while self._queue:
                if not self._send_first(channel):
                    return False
        except BlockingIOError:
            return False
        if self._pace is not None:
            self._pace.end()
        return True

    def close(self) -> None:
        """Forget what was not sent."""
        for item in self._queue:
            if isinstance(item, _File):
                item.close()
        self._queue.clear()
        self.waiting_bytes = 0

    def _send_first(self, channel: socket.socket) -> bool:
        """Send of the first thing what may pass; False where that is nothing now."""
        item = self._queue[0]
        if not isinstance(item, memoryview | _File):
            self._queue.popleft()
            item()
            return True
        left = item.left if isinstance(item, _File) else len(item)
        most = left if self._pace is None else self._pace.grant(left)
        if left and not most:
            return False
        count = self._send_some(channel, item, most) if left else 0
        self.sent_bytes += count
        if self._pace is not None:
            self._pace.took(count)
        if count == left:
            self._queue.popleft()
        return True

    def _send_some(self, channel: socket.socket, item: memoryview | _File, most: int) -> int:
        if isinstance(item, _File):
            count = item.send(channel, most)
            if not item.left:
                item.close()
            return count
        count = channel.send(item[:most])
        self.waiting_bytes -= count
        self._queue[0] = item[count:]
        return count
