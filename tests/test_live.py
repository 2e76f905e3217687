from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.job import FAILED, TIMED_OUT, Result
from testbed.live import Guarded, LiveWatcher, PlainWatcher, Silent, make_watcher
from testbed.live_table import render
from testbed.live_view import RunView
from tests.run_records import MIB, finished, out_of_memory, planned, quality, record, refused

RUN = "lora-20260314-150926-5f3a"
CLIENTS = [
    planned(0, "orin-1", 800, 740, 12),
    planned(1, "pi-1", 500, 470, 3),
    refused(2, "pi-0", 300, 470),
]
PLAN = record(clients=CLIENTS).plan


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Flushed(io.StringIO):
    """A file that knows how much of it was flushed."""

    flushed = ""

    def flush(self) -> None:
        super().flush()
        self.flushed = self.getvalue()


def two_rounds(watcher, clock: Clock) -> None:
    watcher.run_started(RUN, PLAN, 3)
    watcher.evaluated(-1, quality(0.125, 2.0))
    for index in range(2):
        watcher.round_started(index, 2, 0.002)
        watcher.event("orin-1", 0, phase="load")
        watcher.event("orin-1", 0, phase="train")
        watcher.event("orin-1", 0, progress={"step": 3, "steps": 8, "loss": 1.7})
        clock.now += 10.0
        watcher.job_ended(finished(index, 0, "orin-1", 720))
        watcher.job_ended(finished(index, 1, "pi-1", 450) if index == 0 else out_of_memory(index, 1, "pi-1", 500))
        if index == 0:
            watcher.evaluated(index, quality(0.5, 1.2))
        clock.now += 2.0


def test_a_lost_link_has_its_line_as_soon_as_it_is_noticed(clock):
    console = Console(file=io.StringIO(), width=200)
    watcher = PlainWatcher(console, clock)
    watcher.run_started(RUN, PLAN, 3)
    watcher.event("orin-1", 0, phase="link lost")
    assert console.file.getvalue().endswith("link lost: orin-1 is looked for again\n")


def test_plain_lines_one_per_round_and_notable_outcome(clock):
    console = Console(file=Flushed(), width=40)
    watcher = PlainWatcher(console, clock)
    two_rounds(watcher, clock)
    watcher.run_ended("finished")
    assert console.file.getvalue().splitlines() == [
        f"run {RUN}: 3 clients on 3 devices, 3 rounds",
        "refused: client 2 on pi-0: the smallest submodel needs 470 MiB, its budget is 300 MiB",
        "before the first round  loss 2.000  accuracy 0.125",
        "round 1/3  2 of 2 finished  train loss 1.500  loss 1.200  accuracy 0.500  10.0 s  20.0 s left",
        "out_of_memory: client 1 on pi-1, round 2, in train, peak 500 MiB of 500 MiB: the kernel killed the trainer",
        "round 2/3  1 of 2 finished  train loss 1.400  12.0 s  12.0 s left",
        f"run {RUN} finished, 24.0 s",
    ]
    assert console.file.flushed == console.file.getvalue()


def test_a_round_that_was_interrupted_has_no_line_but_one_that_was_over_has(clock):
    for ended, told in ((0, False), (2, True)):
        console = Console(file=io.StringIO(), width=200)
        watcher = PlainWatcher(console, clock)
        watcher.run_started(RUN, PLAN, 2)
        watcher.round_started(1, 2, 2e-3)
        for client, device in ((0, "orin-1"), (1, "pi-1"))[:ended]:
            watcher.job_ended(finished(1, client, device, 400))
        watcher.run_ended("interrupted")
        assert ("round 2/2" in console.file.getvalue()) == told


def test_one_of_a_kind_is_told_in_the_singular(clock):
    console = Console(file=io.StringIO(), width=200)
    PlainWatcher(console, clock).run_started(RUN, {"clients": PLAN["clients"][:1]}, 1)
    assert "1 client on 1 device, 1 round\n" in console.file.getvalue()


def test_every_line_is_flushed_when_it_is_said(clock):
    console = Console(file=Flushed())
    watcher = PlainWatcher(console, clock)
    watcher.run_started(RUN, PLAN, 1)
    assert console.file.flushed.count("\n") == 2


def test_a_round_without_evaluation_has_its_line_before_the_next(clock):
    console = Console(file=Flushed())
    watcher = PlainWatcher(console, clock)
    watcher.run_started(RUN, PLAN, 9)
    watcher.round_started(4, 2, 0.1)  # of a resumed run
    clock.now += 3.0
    watcher.round_started(5, 2, 0.1)
    assert console.file.flushed.splitlines()[-1] == "round 5/9  0 of 2 finished  3.0 s  12.0 s left"


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (Result("j", 1, 0, TIMED_OUT, "pi-1"), "timed_out: client 1 on pi-1, round 1"),
        (Result("j", 1, 0, FAILED, "pi-1", error="[red] it"), "failed: client 1 on pi-1, round 1: [red] it"),
        (Result("j", 1, 0, FAILED), "failed: client 1 on ?, round 1"),
    ],
)  # fmt: skip
def test_outcomes_that_know_little(clock, result, line):
    console = Console(file=Flushed())
    watcher = PlainWatcher(console, clock)
    watcher.job_ended(result)
    assert console.file.getvalue() == line + "\n"


# ── the live table ──────────────────────────────────────────────────────────────────────────────────────────────────
def drawn(view: RunView, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, record=True)
    console.print(render(view, width))
    return console.export_text().splitlines()


@pytest.fixture
def view(clock) -> RunView:
    """In the second round of three: orin-1 trains, pi-1 ran out of memory, pi-0 was refused."""
    view = RunView(clock)
    view.run_started(RUN, PLAN, 3)
    view.round_started(0, 2, 0.002)
    view.job_ended(finished(0, 0, "orin-1", 720))
    view.evaluated(0, 1.2, 0.5)
    clock.now += 30.0
    view.round_started(1, 2, 0.002)
    view.job_ended(out_of_memory(1, 1, "pi-1", 500))
    view.event("orin-1", 0, "train", {"step": 3, "steps": 8, "loss": 1.7})
    return view


def test_a_wide_terminal_shows_everything(view):
    head, titles, orin, pi, pi_0 = drawn(view, 130)
    assert head == f"{RUN}  round 2/3  loss 1.200  accuracy 0.500  30.0 s  about 1 min 00 s left"
    assert titles.split() == ["Device", "State", "Client", "Round", "Step", "Loss", "Peak", "of", "budget"]
    assert orin.split()[:6] == ["orin-1", "train", "0", "2", "3/8", "1.700"]
    assert orin.rstrip().endswith("██████████████████░░  90%  720 MiB of 800 MiB")
    assert pi.split()[:2] == ["pi-1", "out_of_memory"]
    assert pi_0.split()[:2] == ["pi-0", "refused"]


@pytest.mark.parametrize("width", [8, 20, 40, 50, 60, 80, 100])
def test_a_narrow_terminal_loses_columns_and_not_the_view(view, width):
    lines = drawn(view, width)
    assert all(len(line) <= width for line in lines)
    assert width < 40 or any("orin-1" in line and "train" in line and "90%" in line for line in lines)


def test_the_peak_shown_is_the_highest_seen(view):
    view.event("orin-1", 0, None, {"peak_bytes": 820 * MIB})
    view.event("orin-1", 0, None, {"peak_bytes": 500 * MIB})
    assert "102%  820 MiB of 800 MiB" in drawn(view, 130)[2]


def test_a_new_client_on_a_device_starts_without_the_old_ones_step(view):
    view.event("orin-1", 3, "load", None)
    assert drawn(view, 130)[2].split()[:6] == ["orin-1", "load", "3", "2", "–", "–"]


def test_the_live_watcher_draws_and_leaves_the_last_picture(clock):
    console = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    watcher = LiveWatcher(console, clock)
    two_rounds(watcher, clock)
    watcher.run_ended("finished")
    text = console.file.getvalue()
    assert "out_of_memory: client 1 on pi-1, round 2, in train" in text
    assert f"{RUN}  finished  round 2/3  loss 1.200  accuracy 0.500  24.0 s" in text


# ── never into the run ──────────────────────────────────────────────────────────────────────────────────────────────
class Gone(io.StringIO):
    """A terminal that does not take anything any more."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_that_is_gone_does_not_reach_the_run(clock, terminal):
    two_rounds(make_watcher(Console(file=Gone(), force_terminal=terminal)), clock)


_INTO_A_CLOSED_PIPE = """
import sys
from rich.console import Console
from testbed.live import make_watcher
sys.stdin.readline()  # until the reader is gone
watcher = make_watcher(Console(force_terminal=sys.argv[1] == "True", _environ={"TERM": "xterm"}))
watcher.run_started("lora-1", {"clients": []}, 3)
watcher.round_started(0, 1, 0.1)
watcher.run_ended("finished")
print("survived", file=sys.stderr)
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reader_that_went_away_does_not_end_the_run(terminal):
    """`testbed run-method lora | head -1`: rich wants to exit then."""
    command = [sys.executable, "-c", _INTO_A_CLOSED_PIPE, str(terminal)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stderr.read() == "survived\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_nonsense_does_not_reach_the_run_and_is_told_once(clock, terminal):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    watcher = make_watcher(console)
    watcher.run_started(RUN, {"clients": [{"name": "no more"}]}, 3)
    watcher.round_started(0, 1, 0.1)
    watcher.job_ended(replace(finished(0, 0, "orin-1", 700), scalars={"loss": "text"}))
    watcher.run_ended("finished")
    assert console.file.getvalue().count("not watching any more (KeyError: 'outcome'); the run goes on") == 1


def test_a_keyboard_interrupt_is_the_users_and_goes_through():
    class Interrupted(Silent):
        def run_ended(self, status: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted(), Console(file=io.StringIO())).run_ended("finished")


def test_no_terminal_means_plain_lines(clock):
    console = Console(file=io.StringIO(), force_terminal=False)
    watcher = make_watcher(console)
    watcher.run_started(RUN, PLAN, 1)
    watcher.run_ended("interrupted")
    assert "\x1b" not in console.file.getvalue()
    assert f"run {RUN} interrupted" in console.file.getvalue()
