"""The clock of a device is set while an agent and its trainer are at work: nothing of theirs hangs on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testbed.job import FINISHED
from tests import drills
from tests.drills import engine, job

LIBFAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


@pytest.mark.parametrize("step", ["+400d", "-400d"])
def test_a_clock_that_is_set_in_mid_job_changes_nothing(tmp_path, monkeypatch, step):
    if LIBFAKETIME is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0d")
    faked = {
        "LD_PRELOAD": str(LIBFAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a step of the clock is none of the monotonic one
    }  # fmt: skip
    told = tmp_path / "told"

    def set_clock(name, client, phase, progress):
        if progress and not told.exists():
            clock.write_text(step)
            told.touch()

    steps = [["now"], ["progress"], ["wait_for", str(told)], ["phase", "after"], ["now"]]
    for name, value in faked.items():
        monkeypatch.setenv(name, value)
    with engine(tmp_path, orphan_seconds=30, options={"on_event": set_clock, "job_timeout_seconds": 60}) as running:
        results = running.run([("board", job(steps=steps, update={"x": [3]}), None)])
        result, _ = next(results)
        results.close()
        assert "libfaketime" in Path(f"/proc/{drills.agent_pid(tmp_path)}/maps").read_text()
        [again] = [result for result, _ in running.run([("board", job(steps=steps, update={"x": [3]}), None)])]
    assert (result.outcome, result.error, again.outcome) == (FINISHED, None, FINISHED)
    before, after = result.scalars["now"]
    assert abs(after - before) > 300 * 86400
    assert 0 <= result.measurement.seconds < 60
    assert all(0 <= phase.seconds < 60 for phase in result.measurement.phases)
