"""Files over SSH: content goes through the input or output of a command, so that no SFTP server is needed.

What has travelled stays in a partial file beside its target, named by the content's hash; a transfer that broke off
goes on behind it.  The target appears when the hash of the whole is right.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from testbed.errors import DeviceError
from testbed.ssh.session import CHUNK_BYTES, Session

STALL_SECONDS = 120.0  # a transfer that does not move for as long has failed
HASH_SECONDS = 900.0  # what a slow board may take to hash what it holds and to write it to its disk

SHORT, WRONG, BUSY, NO_FILE = 80, 81, 82, 83  # exit codes of the scripts

# $1 target, $2 bytes, $3 SHA-256.  Says "have" and ends, or says how many bytes are there and reads the others.
#
# A writer whose connection was lost may still sit there with the partial file open; its process id lies beside the
# file, and it is the writer if the file is its output.  It is ended as soon as the file has stopped to grow: what a
# lost connection had on its way may still come in when the link is back.  One that goes on growing is somebody's.
RECEIVE = """\
target=$1 size=$2 sum=$3
partial=${target%/*}/.${target##*/}.$(printf %.16s "$sum").partial
fits() { [ "$(stat -Lc %s "$1" 2>/dev/null)" = "$size" ] && [ "$(sha256sum <"$1" | cut -c1-64)" = "$sum" ]; }
length() { stat -c %s "$partial" 2>/dev/null || echo 0; }
mkdir -p "${target%/*}" || exit
if fits "$target"; then rm -f "$partial" "$partial.pid"; echo have; exit; fi
writer=$(cat "$partial.pid" 2>/dev/null)
looks=0
while [ -n "$writer" ] && [ "/proc/$writer/fd/1" -ef "$partial" ]; do
  before=$(length); sleep 2
  if [ "$(length)" = "$before" ]; then kill -KILL "$writer"; break; fi
  looks=$((looks + 1)); [ $looks -lt 10 ] || exit 82
done
if [ $looks -gt 0 ] && fits "$target"; then echo have; exit; fi
have=$(length)
if [ "$have" -gt "$size" ]; then rm -f "$partial"; have=0; fi
echo "$have"
exec 3<&0
cat <&3 >>"$partial" & echo $! >"$partial.pid"
wait $!; code=$?
if [ $code -gt 0 ] && [ $code -lt 128 ]; then rm -f "$partial" "$partial.pid"; exit $code; fi
[ "$(length)" = "$size" ] || exit 80
rm -f "$partial.pid"
if ! fits "$partial"; then rm -f "$partial"; exit 81; fi
sync "$partial" 2>/dev/null
mv -f "$partial" "$target"
"""

# $1 file.  Says its size, time and inode, reads where to begin, writes the content from there on, then its hash.
SEND = """\
[ -f "$1" ] || exit 83
set -- "$1" $(stat -Lc '%s %Y %i' "$1")
echo "$2 $3 $4"
read -r from || exit 80
tail -c +$((from + 1)) "$1" | head -c $(($2 - from))
sha256sum <"$1"
"""

# Reads paths, writes those that lead to nothing.
LACK = """\
while IFS= read -r path; do
  case $path in "~/"*) real=$HOME/${path#??} ;; *) real=$path ;; esac
  [ -e "$real" ] || printf '%s\\n' "$path"
done
"""


def script(text: str, *arguments: object) -> list[str]:
    """The command that runs one of the scripts above."""
    return ["/bin/sh", "-c", text, "sh", *map(str, arguments)]


def sha256_of(path: Path) -> str:
    """Of the content; remembered while size, time and inode stay, because one file goes to many devices."""
    state = path.stat()
    return _sha256_of(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=4096)
def _sha256_of(path: Path, _size: int, _time: int, _inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lines:
    """The output of a session, read line by line and then as bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def line(self) -> str:
        """The next line; "" at the end."""
        while b"\n" not in self._rest:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def pieces(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes, or fewer at the end."""
        while count > 0:
            piece = self._rest or next(self._pieces, b"")
            if not piece:
                break
            self._rest = piece[count:]
            count -= len(piece)
            yield piece[: len(piece) - len(self._rest)]


def send_file(session: Session, source: Path) -> tuple[int, int]:
    """The near side of RECEIVE: gives the bytes that travelled, and the exit code."""
    session.channel.settimeout(STALL_SECONDS)
    reply = Lines(session.output(silence_seconds=HASH_SECONDS)).line()
    sent = 0
    if reply.isdecimal():
        with source.open("rb") as file:
            file.seek(int(reply))
            sent = _pour(session, iter(lambda: file.read(CHUNK_BYTES), b""))
    for _ in session.output(silence_seconds=HASH_SECONDS):
        pass
    return sent, session.exit_code()


def _pour(session: Session, pieces: Iterable[bytes]) -> int:
    """Into its input; when it has ended early, its exit code says why."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            session.send(memoryview(piece))
            sent += len(piece)
    session.end_input()
    return sent


def receive_file(session: Session, target: Path, about: str) -> int:
    """The near side of SEND: gives the exit code; 0 when the target is there, whole and verified."""
    lines = Lines(session.output(silence_seconds=HASH_SECONDS))
    size, _, state = lines.line().partition(" ")
    if not size.isdecimal():
        return session.exit_code() or SHORT
    key = hashlib.sha256(f"{about}\0{size} {state}".encode()).hexdigest()[:16]
    partial = target.with_name(f".{target.name}.{key}.partial")
    whole, told = None, ""
    try:
        with contextlib.suppress(ConnectionError):
            whole = _append(session, lines, partial, int(size))
            told = lines.line()[:64]
        if whole is None or not told:
            return session.exit_code() or SHORT
        right = whole == told
        if right:
            partial.replace(target)
        _forget(target)
    except TimeoutError:
        raise
    except OSError as error:
        raise DeviceError(f"{target} cannot be written: {error.strerror or error}") from None
    return session.exit_code() if right else WRONG


def _append(session: Session, lines: Lines, partial: Path, size: int) -> str | None:
    """What is lacking of a partial file; the SHA-256 of all of it, or None when it did not get whole."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as out:
        out.seek(0)
        if partial.stat().st_size > size:  # not of this file; nothing could be put behind it
            out.truncate(0)
        digest = hashlib.file_digest(out, "sha256")
        start = out.tell()
        session.send(f"{start}\n".encode())
        for piece in lines.pieces(size - start):
            out.write(piece)
            digest.update(piece)
        out.flush()
        os.fsync(out.fileno())
        return digest.hexdigest() if out.tell() == size else None


def _forget(target: Path) -> None:
    """Remove the partial files of a target, those of its earlier contents too."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        partial.unlink(missing_ok=True)
