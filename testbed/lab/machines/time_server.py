"""The lab's clock: a time server that says what this machine's clock says, to the virtual machines only.

    python -m testbed.lab.machines.time_server PORT

Simple NTP version 4 (RFC 4330, server mode) on the loopback, which QEMU's user network leads to.  It says that it is
far from any reference (stratum 10): it is good for a lab whose only other clocks are the boards'.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

STRATUM = 10
_UNIX_EPOCH = 2_208_988_800  # in NTP's seconds, which count from 1900
_REQUEST_BYTES = 48
_CLIENT, _SERVER = 3, 4
_PRECISION_EXPONENT = -20  # about a microsecond


def answer(request: bytes, received: float, sent: float) -> bytes | None:
    """48 bytes for a client's request at a Unix time in seconds; None for what is no request."""
    if len(request) < _REQUEST_BYTES or request[0] & 7 != _CLIENT:
        return None
    version = request[0] >> 3 & 7
    head = struct.pack("!BBbb", version << 3 | _SERVER, STRATUM, request[2] % 128, _PRECISION_EXPONENT)
    root = struct.pack("!II4s", 0, 1 << 4, b"LOCL")  # delay, dispersion, reference
    times = _stamp(received) + request[40:48] + _stamp(received) + _stamp(sent)
    return head + root + times


def serve(channel: socket.socket) -> None:
    """Answer for ever."""
    while True:
        request, client = channel.recvfrom(512)
        received = time.time()
        if (reply := answer(request, received, time.time())) is not None:
            channel.sendto(reply, client)


def _stamp(unix_seconds: float) -> bytes:
    whole, fraction = divmod(unix_seconds, 1.0)
    return struct.pack("!II", (int(whole) + _UNIX_EPOCH) & 0xFFFFFFFF, int(fraction * 2**32))


def main() -> None:
    """Go on in a process of its own, whose id is printed once it can be asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.bind(("127.0.0.1", int(sys.argv[1])))
        if pid := os.fork():
            print(pid)
            return
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):  # whoever reads what was printed must see its end
            os.dup2(nowhere, standard)
        serve(channel)


if __name__ == "__main__":
    main()
