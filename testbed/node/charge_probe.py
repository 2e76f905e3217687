"""Is memory that a process takes by CUDA charged to its memory cgroup?

On boards where CPU and GPU share one memory it decides whether a cap holds the GPU's part too, and whether that part
must be added to what the cgroup counts.  Jetson releases differ: nvmap allocates without __GFP_ACCOUNT in L4T 36.2 to
36.4.3, newer ones with it.  So it is tried: in a group of its own, some memory is taken on the GPU and written, and
the group's counter is looked at.

`main` reads {"parent": path or null} on stdin and prints {"charged": true, false or null, "why": text} as its last
line.  Needs torch.  Tried on: nothing yet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from testbed.errors import TestbedError
from testbed.node import limits

if TYPE_CHECKING:
    from collections.abc import Callable

_PROBE_BYTES = 256 << 20
#: The group must have room for the interpreter, CUDA's context and the probe where all of it is charged.
_LIMIT_BYTES = 4 << 30
_MEMINFO = Path("/proc/meminfo")


def verdict(before: int, after: int, nvmap: int | None, taken: int = _PROBE_BYTES) -> bool | None:
    """Whether the group's counter grew by what was taken; None where it did neither clearly.

    nvmap    by how much NvMapMemUsed grew; None where the kernel tells none (not a Jetson, or a new driver)
    """
    grown = after - before
    if grown >= 0.75 * taken:
        return True
    if grown <= 0.25 * taken and (nvmap is None or nvmap >= 0.75 * taken):
        return False
    return None


def probe(parent: Path | None, ready: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Have a child take memory inside a group; it goes into the group first, and never has to come out.

    ready    called in the child: gives what takes the memory, and holds it until it is forgotten
    """
    group = limits.create(f"charge-{os.getpid()}", _LIMIT_BYTES, parent=parent)
    try:
        answer, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _be_child(group, ready, said)
            finally:
                os._exit(1)  # never go on as the parent
        os.close(said)
        with os.fdopen(answer, encoding="utf-8") as stream:
            text = stream.read()
        _, status = os.waitpid(pid, 0)
    finally:
        group.remove()
    if not text:
        return {"charged": None, "why": f"the probe ended with {os.waitstatus_to_exitcode(status)}, without a word"}
    found: dict[str, Any] = json.loads(text)
    return found


def _be_child(group: limits.Group, ready: Callable[[], Callable[[], Any]], said: int) -> NoReturn:
    try:
        group.add(os.getpid())
        found = _measure(group, ready())
    except (TestbedError, OSError, RuntimeError, ImportError) as error:
        found = {"charged": None, "why": f"{type(error).__name__}: {error}"}
    os.write(said, json.dumps(found).encode())
    os._exit(0)


def _measure(group: limits.Group, take: Callable[[], Any]) -> dict[str, Any]:
    usage = group.path / ("memory.current" if group.version == "v2" else "memory.usage_in_bytes")
    before, nvmap_before = int(usage.read_text()), _nvmap()
    held = take()
    after, nvmap_after = int(usage.read_text()), _nvmap()
    del held
    nvmap = None if nvmap_before is None or nvmap_after is None else nvmap_after - nvmap_before
    why = f"{_PROBE_BYTES} bytes taken: the group grew by {after - before}, NvMapMemUsed by {nvmap}"
    return {"charged": verdict(before, after, nvmap), "why": why}


def _nvmap() -> int | None:
    """Memory that the GPU's driver has taken, all processes together, in bytes."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("NvMapMemUsed:"):
            return int(line.split()[1]) * 1024
    return None


def _on_gpu() -> Callable[[], Any]:
    """CUDA is started first: its context is not what is asked about."""
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

    def take() -> Any:
        held = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        return held

    return take


def main() -> None:
    """Probe, and say what was found; what keeps it from probing is a reason, not an error."""
    asked = json.load(sys.stdin)
    parent = Path(asked["parent"]) if asked.get("parent") else None
    try:
        found = probe(parent, _on_gpu)
    except (TestbedError, OSError) as error:
        found = {"charged": None, "why": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
