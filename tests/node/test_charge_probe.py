import json
import os
import subprocess
import sys

import pytest

from testbed.node import charge_probe
from testbed.node.charge_probe import probe, verdict

MIB = 1 << 20


@pytest.mark.parametrize(
    ("grown", "nvmap", "expected"),
    [
        (256, 256, True),  # a driver that charges
        (2, 256, False),  # one that does not, and says what it took
        (2, None, False),  # … and says nothing: a graphics card with a memory of its own
        (2, 3, None),  # nothing was taken anywhere
        (128, 256, None),  # neither
    ],
)
def test_verdict(grown, nvmap, expected):
    assert verdict(1000 * MIB, (1000 + grown) * MIB, None if nvmap is None else nvmap * MIB, 256 * MIB) is expected


def _ordinary():
    return lambda: bytearray(b"x") * charge_probe._PROBE_BYTES


def _elsewhere():
    return lambda: None


def _refuses():
    raise RuntimeError("CUDA driver initialization failed")


def _killed():
    os.kill(os.getpid(), 9)


@pytest.mark.cgroup
def test_ordinary_memory_is_charged():
    found = probe(None, _ordinary)
    assert found["charged"] is True, found["why"]


@pytest.mark.cgroup
def test_memory_of_somebody_else_is_not():
    assert probe(None, _elsewhere)["charged"] is False


@pytest.mark.cgroup
def test_what_keeps_it_from_probing_is_told():
    assert probe(None, _refuses) == {"charged": None, "why": "RuntimeError: CUDA driver initialization failed"}
    assert probe(None, _killed) == {"charged": None, "why": "the probe ended with -9, without a word"}


@pytest.mark.cgroup
def test_as_a_program_it_answers_in_one_line_without_a_gpu():
    code = "from testbed.node.charge_probe import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="{}",
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert json.loads(done.stdout.splitlines()[-1])["charged"] is None
