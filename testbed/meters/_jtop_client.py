"""Listens to jtop.service and passes on what it hears, one JSON object a line, until its own stdin ends.

    python -I testbed/meters/_jtop_client.py

    {"uptime": 8123.45, "interval": 0.5, "power": {"rail": {"VDD_SOC": {"power": 1507, …}}, "tot": {…}}}
    {"error": "…"}       the service is not there, or no longer; it is asked again and again
    {"lacks": "…"}       this Python cannot import jetson-stats; that was all

A program of its own and not a thread of the agent: the client of jetson-stats is larger than an agent, waits without a
limit for a service that does not answer, and must be of the service's version, so it may need the Python which has
that.  Therefore nothing here is newer than Python 3.6, and nothing is imported from the testbed.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

#: Below 0.2 s the service becomes unstable: https://github.com/rbonghi/jetson_stats/issues/414
INTERVAL_SECONDS = 0.5
CONNECT_SECONDS = 5
RETRY_SECONDS = 3.0
#: The service is silent when nothing new came for so long, or for three of its intervals.
SILENT_SECONDS = 3.0


def say(**facts: Any) -> None:
    """One line, in one piece: the thread of the client speaks too."""
    os.write(sys.stdout.fileno(), json.dumps(facts).encode() + b"\n")


def main() -> None:
    try:
        package = importlib.import_module("jtop")
    except ImportError as error:
        say(lacks=str(error))
        return
    threading.Thread(target=_end_with_whoever_asked, daemon=True).start()
    # At its start a client asks dpkg, nvcc and others what is installed: on a board whose power is being measured.
    package.jtop._load_jetson_libraries = lambda _: None  # noqa: SLF001 -- there is no setting for it
    signal.signal(signal.SIGALRM, _give_up)
    listen(package.jtop)
    time.sleep(RETRY_SECONDS)
    # From the start: multiprocessing keeps a connection per address, and never renews one that has broken.
    isolated = ["-I"] if sys.flags.isolated else []
    os.execv(sys.executable, [sys.executable, *isolated, __file__])  # noqa: S606 -- ourselves


def listen(kind: Any) -> None:
    """Connect, pass on what comes until nothing does, and say why."""
    client = kind(interval=INTERVAL_SECONDS)
    heard = [time.monotonic(), 0.0]  # when something new came last, and the uptime that it brought
    client.attach(lambda jetson: _pass_on(jetson, heard))
    try:
        signal.alarm(CONNECT_SECONDS)
        client.start()
        signal.alarm(0)
        while client.is_alive() and time.monotonic() - heard[0] < max(SILENT_SECONDS, 3 * client.interval):
            client.join(INTERVAL_SECONDS / 2)
        client.ok(spin=True)  # raises what its thread ended with
        say(error="it has gone silent")
    except (EOFError, ConnectionError):  # at its end; what its socket says later, jtop puts in words itself
        say(error="Lost connection")
    except Exception as error:  # noqa: BLE001 -- whatever it was, it is told, and tried again
        say(error=str(error) or type(error).__name__)
    finally:
        signal.alarm(0)


def _pass_on(jetson: Any, heard: Any) -> None:
    """Tell a sample, unless it is the one before: a client that has waited in vain repeats that."""
    uptime = jetson.uptime.total_seconds()
    if uptime != heard[1]:
        heard[:] = time.monotonic(), uptime
        say(uptime=uptime, interval=jetson.interval, power=jetson.power)


def _give_up(_number: int, _frame: Any) -> None:
    raise TimeoutError("it does not answer")


def _end_with_whoever_asked() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
