"""What `testbed inventory --facts` tells of a board."""

import pytest

from testbed.commands._facts import lines_of
from tests.provision.tables import device_of, facts_of


def told(family="jetpack_6", differs=None, **more):
    sheet = {"status": "ready", "collected": 0.0, **facts_of(family, differs), **more}
    return {line[2:17].strip(): line[17:] for line in lines_of(device_of(family), sheet)[1:]}


def test_what_a_board_runs_is_told_in_a_line():
    assert told()["system"] == "Ubuntu 22.04.5 LTS, L4T 36.4.3, 5.15.148-tegra, aarch64, glibc 2.35"
    assert told("generic_v1", {"board": {"glibc": None}})["system"].endswith("aarch64")


@pytest.mark.parametrize(
    ("charge", "text"),
    [
        (None, "not measured"),
        ({"charged": True, "why": "it grew"}, "yes (it grew)"),
        ({"charged": False, "why": "it did not"}, "no (it did not)"),
        ({"charged": None, "why": "RuntimeError: no memory"}, "could not be told (RuntimeError: no memory)"),
    ],
)
def test_whether_cuda_is_charged_is_told_with_its_reason(charge, text):
    assert told(charge=charge)["CUDA charged"] == text
