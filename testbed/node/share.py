"""Content from one device of a site to another, past the controller's thin uplink.

    python -I -S -c "the text of this file" serve FOLDER      first line of stdin: {"token": …, "contents": [hash, …]};
                                                              ends with stdin
    python -I -S -c "the text of this file" fetch             arguments of `fetch`: a JSON object on stdin

Complete in itself, as `testbed.node.landing` is, whose answers it gives.  The server listens on the address at which
the controller has reached its device, for as long as the channel stands that it was started over, and gives those files
of one folder that it was told, by hash, to whoever knows the token.  Nothing is encrypted: it is for what many devices
are sent, not for anybody's data, which lies in the same folder.  What arrives is verified; a transfer that broke off
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_SILENCE_SECONDS = 60.0
_PIECE_BYTES = 1 << 20
_SIZE = struct.Struct(">q")  # bytes that follow; -1: there is no such file


# ── who has it ───────────────────────────────────────────────────────────────────────────────────────────────────────
def serve(folder: Path, token: str, contents: list[str]) -> None:
    """Say {"address", "port"} on stdout, and give these contents, and no others, until stdin ends."""
    given = {content: folder / content for content in contents}
    with socket.create_server((_own_address(), 0), family=_family(_own_address())) as listener:
        listener.setblocking(False)  # who has hung up before we look must not keep us from seeing the end of stdin
        address, port = listener.getsockname()[:2]
        print(json.dumps({"address": address, "port": port}), flush=True)
        stdin = sys.stdin.fileno()
        while stdin not in (ready := select.select([stdin, listener], [], [])[0]) or os.read(stdin, _PIECE_BYTES):
            if listener in ready:
                _accept(listener, given, token)


def _own_address() -> str:
    """Where the controller has reached us: "client port server port" of the SSH session."""
    return os.environ["SSH_CONNECTION"].split()[2]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _accept(listener: socket.socket, given: Mapping[str, Path], token: str) -> None:
    with contextlib.suppress(OSError):
        client, _ = listener.accept()
        client.settimeout(_SILENCE_SECONDS)
        threading.Thread(target=_answer, args=(client, given, token), daemon=True).start()


def _answer(client: socket.socket, given: Mapping[str, Path], token: str) -> None:
    """One request: {"token", "content", "offset"} in a line.  A stranger is hung up on, and who asks for more.

    Raises nothing: what a thread says while the process ends can abort it.
    """
    strange = contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError)
    with strange, client, client.makefile("rb") as lines:
        asked = json.loads(lines.readline(1 << 16))
        if hmac.compare_digest(str(asked["token"]), token):
            _send(client, given[asked["content"]], int(asked["offset"]))


def _send(client: socket.socket, path: Path, offset: int) -> None:
    if not path.is_file():
        client.sendall(_SIZE.pack(-1))
        return
    with path.open("rb") as file:
        client.sendall(_SIZE.pack(max(0, os.fstat(file.fileno()).st_size - offset)))
        client.sendfile(file, offset)


# ── who wants it ─────────────────────────────────────────────────────────────────────────────────────────────────────
def fetch(folder: str, contents: list[str], address: str, port: int, token: str) -> int:
    """Get the contents from a server into the folder, each whole and verified; the bytes that travelled.

    Raises OSError or ValueError.
    """
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    return sum(_fetch(place / content, (address, port), token) for content in contents)


def _fetch(target: Path, server: tuple[str, int], token: str) -> int:
    if target.exists():
        return 0
    partial = target.with_name(f".{target.name}.fetched")
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # whoever else wants it waits, and finds it there
        if target.exists():
            partial.unlink(missing_ok=True)
            return 0
        count = _complete(file, target.name, server, token)
        if _hash(partial) != target.name:  # what was there before was bad, it may be
            file.truncate(0)
            count += _complete(file, target.name, server, token)
            _check(file, partial, target.name, server[0])
        partial.replace(target)
    return count


def _complete(file: BinaryIO, name: str, server: tuple[str, int], token: str) -> int:
    """Get what is lacking at the file's end; the bytes that travelled."""
    with socket.create_connection(server, _SILENCE_SECONDS) as source:
        asked = {"token": token, "content": name, "offset": file.seek(0, os.SEEK_END)}
        source.sendall(json.dumps(asked).encode() + b"\n")
        count = _receive(source, file, name)
    file.flush()
    os.fsync(file.fileno())
    return count


def _check(file: BinaryIO, path: Path, name: str, server: str) -> None:
    found = _hash(path)
    if found != name:
        file.truncate(0)
        raise ValueError(f"{name} was to be fetched from {server}, and {found} came")


def _receive(source: socket.socket, file: BinaryIO, name: str) -> int:
    head = source.recv(_SIZE.size, socket.MSG_WAITALL)
    if len(head) < _SIZE.size:
        raise ValueError(f"{name} is not given: the server has hung up")
    left = size = _SIZE.unpack(head)[0]
    if size < 0:
        raise ValueError(f"{name} is not there")
    while left:
        piece = source.recv(min(left, _PIECE_BYTES))
        if not piece:
            raise ValueError(f"the transfer of {name} broke off; what has arrived is kept, try again")
        file.write(piece)
        left -= len(piece)
    return int(size)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def main(words: list[str]) -> int:
    """`serve FOLDER`, or `fetch`."""
    if words[0] == "serve":
        serve(Path(words[1]).expanduser(), **json.loads(sys.stdin.buffer.readline()))
        return 0
    try:
        said: dict[str, Any] = {"answer": fetch(**json.load(sys.stdin))}
    except Exception as error:  # noqa: BLE001 -- the top of a process: whatever happens is one line
        said = {"error": str(error) or type(error).__name__, "kind": "DeviceError"}
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
