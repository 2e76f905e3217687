"""What a connection over SSH carries, against scp in the same run, and how long it takes to answer.

    python benchmarks/transfer.py [--megabytes 100] [--repeats 5] [--tuning]
    python benchmarks/transfer.py --host NAME [--ssh-config FILE]

Without a host, an OpenSSH server is started on this machine (127.0.0.1), so both ends share its cores.  Content is
random.  Ways take turns, so that what else the machine does falls on all of them; the median counts.

An update arrives through a connection that stands already, as a result does from an agent; scp logs in first, as it
always does, and what that takes is shown.  `put` and `get` hash at both ends and wait for the disk; scp does neither.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from testbed.inventory import Access
from testbed.ssh import SshConnection, connect
from testbed.ssh import session as ssh_session
from testbed.ssh.config import resolve

TARGET = 0.9  # of scp, for an update that arrives through a channel
THERE = "transfer-benchmark"  # below the home of the login user


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tuning", action="store_true", help="Measure what each setting of the connection buys.")
    parser.add_argument("--host")
    parser.add_argument("--ssh-config")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        access = Access(args.host, ssh_config=args.ssh_config) if args.host else stack.enter_context(own_server(folder))
        source = folder / "update"
        source.write_bytes(os.urandom(args.megabytes * 1_000_000))
        if args.tuning:
            tune(access, source, args.repeats)
        else:
            met = compare(access, source, args.repeats)
            sys.exit(0 if met else 1)


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[Access]:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.ssh_server import SshServer

    with SshServer(folder / "server", sftp=True) as server:
        yield server.access


def compare(access: Access, source: Path, repeats: int) -> bool:
    """Print the table; whether the target is met."""
    board = connect(access.host, access)
    try:
        board.run(["mkdir", "-p", f"~/{THERE}"])
        seconds = take_turns(ways(board, access, source), repeats)
        table(seconds, source.stat().st_size)
        answers(board, access, max(20, repeats * 10))
    finally:
        board.run(["rm", "-rf", f"~/{THERE}"])
        board.close()
    took, scp, login = (median(seconds[name]) for name in ("channel, down", "scp, down", "ssh logs in"))
    print(
        f"an update through a channel: {scp / took:.0%} of scp (target {TARGET:.0%}); "
        f"{(scp - login) / took:.0%} of scp without its login"
    )
    return scp / took >= TARGET


def ways(board: SshConnection, access: Access, source: Path) -> dict[str, Callable[[], float]]:
    there, back = Path(f"~/{THERE}/update"), source.with_name("back")
    scp = ["scp", "-q", *(["-F", access.ssh_config] if access.ssh_config else [])]
    remote = f"{access.host}:{THERE}/update"
    gcm = [*scp, "-c", "aes128-gcm@openssh.com"]

    def put() -> None:
        board.put(source, there)

    def get() -> None:
        board.get(there, back)

    def forget() -> None:
        board.run(["rm", "-f", str(there)])

    login = ["ssh", *(["-F", access.ssh_config] if access.ssh_config else []), access.host, "true"]
    return {
        "ssh logs in": lambda: timed(lambda: subprocess.run(login, check=True)),
        "scp, up": lambda: timed(lambda: subprocess.run([*scp, source, remote], check=True)),
        "scp with AES-GCM, up": lambda: timed(lambda: subprocess.run([*gcm, source, remote], check=True)),
        "channel, up": lambda: timed(lambda: through_channel_up(board, source)),
        "put": lambda: timed(put, forget),
        "scp, down": lambda: timed(lambda: subprocess.run([*scp, remote, back], check=True)),
        "scp with AES-GCM, down": lambda: timed(lambda: subprocess.run([*gcm, remote, back], check=True)),
        "channel, down": lambda: timed(lambda: through_channel_down(board, there, source.stat().st_size)),
        "get": lambda: timed(get),
    }


def timed(work: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    if before is not None:
        before()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def take_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The first turn warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            took = way()
            if turn > 0:
                seconds[name].append(took)
    return seconds


def through_channel_up(board: SshConnection, source: Path) -> None:
    content = source.read_bytes()
    with board.open_channel(["sh", "-c", f"cat >~/{THERE}/sent; echo done"]) as channel:
        channel.sendall(content)
        channel.shutdown(socket.SHUT_WR)
        assert channel.recv(10) == b"done\n"


def through_channel_down(board: SshConnection, there: Path, size: int) -> None:
    content, came = bytearray(size), 0
    with board.open_channel(["cat", str(there)]) as channel:
        while came < size:
            came += channel.recv_into(memoryview(content)[came:])


def median(values: list[float]) -> float:
    return statistics.median(values)


def table(seconds: dict[str, list[float]], size: int) -> None:
    for name, values in seconds.items():
        took = median(values)
        print(f"{name:24} {took:6.3f} s ({min(values):.3f} to {max(values):.3f})", end="")
        if name != "ssh logs in":
            scp = median(seconds["scp, up" if name.endswith("up") or name == "put" else "scp, down"])
            print(f"  {size / took / 1e6:5.0f} MB/s  {scp / took:4.2f} × scp", end="")
        print()


def answers(board: SshConnection, access: Access, times: int) -> None:
    """Round trips: TCP's, a message through an open channel, a command."""
    target = resolve(access)

    def handshake() -> None:
        socket.create_connection((target.host, target.port), 10).close()

    with board.open_channel(["cat"]) as channel:

        def echo() -> None:
            channel.sendall(b"x")
            channel.recv(1)

        shown = {"TCP handshake": handshake, "through a channel": echo, "command": lambda: board.run(["true"])}
        for name, work in shown.items():
            values = [timed(work) for _ in range(times)]
            print(f"{name:24} {1000 * median(values):6.2f} ms  ({1000 * min(values):.2f} to {1000 * max(values):.2f})")


def tune(access: Access, source: Path, repeats: int) -> None:
    """The same update through a channel, one setting of ours taken back at a time."""
    cases: dict[str, Callable[[], contextlib.AbstractContextManager[SshConnection]]] = {
        "as it is": lambda: tuned(access),
        "AES-CTR and HMAC": lambda: tuned(access, ciphers="aes128-ctr"),
        "packets of 32 KiB": lambda: tuned(access, packet_bytes=1 << 15),
        "window of 16 MiB": lambda: tuned(access, window_bytes=1 << 24),
        "waiting to fill packets": lambda: tuned(access, no_delay=False),
    }
    with tuned(access) as board:
        board.put(source, Path(f"~/{THERE}/update"))
    ways = {name: (lambda case=case: once(case, source)) for name, case in cases.items()}
    commands: dict[str, list[float]] = {}
    for name, case in cases.items():
        with case() as board:
            commands[name] = [timed(lambda board=board: board.run(["true"])) for _ in range(20)]
    for name, values in take_turns(ways, repeats).items():
        rate = source.stat().st_size / median(values) / 1e6
        print(f"{name:24} {rate:6.0f} MB/s   command {1000 * median(commands[name]):6.2f} ms")
    with tuned(access) as board:
        board.run(["rm", "-rf", f"~/{THERE}"])


def once(case: Callable[[], contextlib.AbstractContextManager[SshConnection]], source: Path) -> float:
    with case() as board:
        return timed(lambda: through_channel_down(board, Path(f"~/{THERE}/update"), source.stat().st_size))


@contextlib.contextmanager
def tuned(
    access: Access,
    *,
    ciphers: str | None = None,
    packet_bytes: int = ssh_session.PACKET_BYTES,
    window_bytes: int | None = None,
    no_delay: bool = True,
) -> Iterator[SshConnection]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "ssh_config"
        lines = f"Ciphers {ciphers}\n" if ciphers else ""
        config.write_text(f"{lines}Include {access.ssh_config or '~/.ssh/config'}\n", encoding="utf-8")
        board = connect(access.host, Access(access.host, access.user, access.port, str(config)))
    transport = board._link.transport  # noqa: SLF001 - the settings of the connection are what is measured
    if window_bytes is not None:
        transport.default_window_size = window_bytes
    transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(no_delay))
    before, ssh_session.PACKET_BYTES = ssh_session.PACKET_BYTES, packet_bytes
    try:
        yield board
    finally:
        ssh_session.PACKET_BYTES = before
        board.close()


if __name__ == "__main__":
    main()
