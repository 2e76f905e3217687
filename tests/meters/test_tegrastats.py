"""tegrastats: lines of every JetPack taken apart, and a program that prints, falls silent, ends and begins anew."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import MeterError, UsageError
from testbed.lab.persona import PERSONAS
from testbed.meters import make
from testbed.meters.tegrastats import Tegrastats, power
from tests.meters.boards import as_nobody, public_folder

#: Public captures, shortened in their processors' part.
JETPACK_5 = (
    "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] "
    "EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C tj@77.281C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
JETPACK_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 12%@[1300,1300] NVENC0 off PVA0_FREQ off APE 174 cpu@52.968C/52.968C gpu@47.625C/47.625C "
    "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
#: As AGX Xavier prints it on JetPack 4: reconstructed from scripts that parse it.
XAVIER = "RAM 2011/15692MB (lfb 2x4MB) IRAM 0/252kB(lfb 252kB) GPU 0/0 CPU 311/312 SOC 932/932 CV 0/0 SYS5V 1525/1525"


def persona_line(name: str) -> str:
    told = (PERSONAS / name / "root/usr/lib/persona/board").read_text()
    (line,) = re.findall(r"^TEGRASTATS='(.*)'$", told, re.MULTILINE)
    return line.replace("@SWAP@", "0/1978MB")


# --- a line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (persona_line("jetson_nano_4gb"), {"POM_5V_IN": 2.532, "POM_5V_GPU": 0.040, "POM_5V_CPU": 0.400}),
        (persona_line("jetson_orin_nano_8gb"), {"VDD_IN": 4.541, "VDD_CPU_GPU_CV": 0.521, "VDD_SOC": 1.446}),
        (persona_line("jetson_xavier_nx_8gb"), {"VDD_IN": 3.611, "VDD_CPU_GPU_CV": 0.401, "VDD_SOC": 1.003}),
        (JETPACK_5, {"VDD_GPU_SOC": 3.150, "VDD_CPU_CV": 14.312, "VIN_SYS_5V0": 4.968, "VDDQ_VDD2_1V8AO": 1.091}),
        (JETPACK_7, {"VDD_GPU_SOC": 5.139, "VDD_CPU_CV": 3.268, "VIN_SYS_5V0": 5.500}),
        (XAVIER, {"GPU": 0.0, "CPU": 0.311, "SOC": 0.932, "CV": 0.0, "SYS5V": 1.525}),
        ("RAM 4722/7844MB (lfb 1x512kB) SWAP 0/3922MB (cached 0MB) EMC_FREQ 2%@1866 GR3D_FREQ @[1000] APE 150", {}),
        ("", {}),
    ],
)
def test_the_present_power_of_each_rail_is_taken(line, watts):
    assert power(line) == watts
    assert list(power(line)) == list(watts)


rail_names = st.from_regex(r"[A-Z][A-Z0-9_]{0,15}", fullmatch=True)


@settings(deadline=None)
@given(st.dictionaries(rail_names, st.tuples(st.integers(0, 99_999), st.integers(0, 99_999)), min_size=1))
def test_the_average_never_stands_for_the_present(values):
    old = " ".join(f"{rail} {now}/{average}" for rail, (now, average) in values.items())
    new = " ".join(f"{rail} {now}mW/{average}mW" for rail, (now, average) in values.items())
    expected = {rail: now / 1000 for rail, (now, _) in values.items()}
    assert power(f"RAM 1/2MB SWAP 0/1MB {old}") == power(f"RAM 1/2MB {new} ") == expected


# --- the program ---------------------------------------------------------------------------------------------------


class Board:
    """A program that prints what it is given, line by line, and writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.called, self.program = folder / "called", str(folder / "tegrastats")
        fifo = folder / "lines"
        os.mkfifo(fifo)
        self._lines = os.open(fifo, os.O_RDWR)  # both ways: then neither end waits for the other to open
        Path(self.program).write_text(
            f'#!/bin/sh\necho "$@" >>{self.called}\n'
            f'while read -r line; do [ "$line" = end ] && exit 7; printf "%s\\n" "$line"; done <{fifo}\n'
        )
        Path(self.program).chmod(0o755)

    def say(self, text: str) -> None:
        os.write(self._lines, text.encode())

    def close(self) -> None:
        os.close(self._lines)


@pytest.fixture
def board(tmp_path) -> Iterator[Board]:
    found = Board(tmp_path)
    yield found
    found.close()


@pytest.fixture
def meter(board) -> Iterator[Tegrastats]:
    board.say("RAM 1/2MB VDD_IN 4000mW/1mW VDD_SOC 1000mW/1mW\n")
    found = Tegrastats(interval_seconds=0.1, program=board.program)
    found.open()
    yield found
    found.close()


def until(meter: Tegrastats, watts: tuple[float, ...]) -> None:
    """Until the program has printed it; the test's own time limit ends what never comes."""
    while meter.read().watts != watts:
        pass


def test_its_rails_are_those_of_the_line(meter, board):
    assert (meter.rails, meter.total_rails) == (("VDD_IN", "VDD_SOC"), ("VDD_IN",))
    assert meter.read().watts == (4.0, 1.0)
    assert board.called.read_text() == "--interval 100\n"
    assert meter.accuracy[0].timing_seconds == pytest.approx(0.1)
    assert meter.accuracy[0].step_watts == pytest.approx(0.040)


def test_the_newest_line_counts(meter, board):
    board.say("VDD_IN 5000mW/1mW VDD_SOC 1000mW/1mW\nVDD_IN 6000mW/1mW VDD_SOC 2000mW/1mW\n")
    until(meter, (6.0, 2.0))


def test_without_a_new_line_the_last_one_keeps_its_time(meter):
    assert meter.read() == meter.read()
    assert meter.read().unix_seconds is not None


def test_a_line_that_lacks_a_rail_is_no_reading(meter, board):
    board.say("VDD_IN 5000mW/1mW\n")
    with pytest.raises(MeterError, match="its line lacks VDD_SOC"):
        until(meter, (5.0, 1.0))
    board.say("VDD_IN 7000mW/1mW VDD_SOC 3000mW/1mW\n")
    until(meter, (7.0, 3.0))


def test_a_program_that_ends_is_begun_anew(meter, board):
    board.say("end\n")
    with pytest.raises(MeterError, match=r"has ended \(exit code 7\)"):
        until(meter, (8.0, 3.0))
    board.say("VDD_IN 8000mW/1mW VDD_SOC 3000mW/1mW\n")
    until(meter, (8.0, 3.0))
    assert board.called.read_text() == "--interval 100\n" * 2


def test_a_closed_meter_leaves_no_program_behind(meter):
    child = meter._child
    meter.close()
    assert child.returncode is not None


def test_a_program_that_falls_silent_is_told(meter, monkeypatch):
    monkeypatch.setattr("testbed.meters.tegrastats._PATIENCE_SECONDS", -1.0)
    with pytest.raises(MeterError, match="has printed nothing for"):
        meter.read()


def test_a_board_whose_lines_tell_no_power_is_told(board):
    board.say("RAM 1/2MB SWAP 0/1MB\n")
    with pytest.raises(MeterError, match=r"tells no power on this board .*`meter: none`"):
        Tegrastats(program=board.program).open()


def test_where_there_is_no_such_program_the_way_out_is_told(tmp_path):
    with pytest.raises(MeterError, match=r"cannot be run: No such file .*this is no Jetson.*`meter: none`"):
        Tegrastats(program=str(tmp_path / "none")).open()


def test_who_may_not_run_it_is_told():
    with public_folder() as folder:
        (folder / "tegrastats").touch(mode=0o600)
        with as_nobody(), pytest.raises(MeterError, match="cannot be run: Permission denied"):
            Tegrastats(program=str(folder / "tegrastats")).open()


@pytest.mark.parametrize("seconds", [0, -1, 61])
def test_an_interval_that_cannot_be_is_a_wrong_setting(seconds):
    with pytest.raises(UsageError, match=r"interval_seconds: expected 0.001 to 60 seconds"):
        make("tegrastats", {"interval_seconds": seconds})
