"""The Raspberry Pi 5's power chip: its answer taken apart, the mailbox's message, and every refusal."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.config import load_profile
from testbed.errors import MeterError
from testbed.lab.persona import PERSONAS
from testbed.meters.rpi_pmic import RaspberryPiPmic, answer, question, rails
from testbed.package_data import data_folder
from tests.meters.boards import as_nobody, public_folder

ANSWER = PERSONAS / "raspberry_pi_5_8gb/root/usr/lib/persona/vcgencmd/pmic_read_adc"
RAILS = tuple(rail.name for rail in load_profile(data_folder("inventory") / "profiles/raspberry_pi_5_8gb.yaml").rails)
NOT_REGISTERED = 'error=1 error_msg="Command not registered"'


def program(folder: Path, script: str) -> str:
    path = folder / "vcgencmd"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def meter(folder: Path, script: str) -> RaspberryPiPmic:
    """Of a board without the mailbox, where a program answers."""
    return RaspberryPiPmic(str(folder / "vcio"), program(folder, script))


@pytest.fixture
def opened(tmp_path: Path) -> RaspberryPiPmic:
    (tmp_path / "answer").write_text(ANSWER.read_text())
    found = meter(tmp_path, f'[ "$1" = pmic_read_adc ] && cat {tmp_path}/answer')
    found.open()
    return found


# --- the answer ----------------------------------------------------------------------------------------------------


def test_all_rails_of_the_profile_are_read_and_make_up_the_whole(opened):
    assert opened.rails == RAILS
    assert opened.total_rails == RAILS
    assert opened.point == "soc_pmic"
    assert len(opened.accuracy) == 12
    watts = dict(zip(RAILS, opened.read().watts, strict=True))
    assert watts["VDD_CORE"] == pytest.approx(0.75012 * 0.72)
    assert watts["HDMI"] == pytest.approx(0.0136752 * 5.07056)
    assert sum(watts.values()) == pytest.approx(1.57855, abs=1e-5)


def test_voltage_and_current_are_joined_by_name_not_by_number():
    told = " B_A current(0)=2.0A\n A_A current(1)=1.0A\n A_V volt(0)=3.0V\n B_V volt(1)=5.0V\n"
    assert rails(told) == {"B": 10.0, "A": 3.0}


@pytest.mark.parametrize("name", ["EXT5V", "BATT"])
def test_what_has_no_current_is_no_rail(name):
    assert name not in rails(ANSWER.read_text())


def test_an_answer_that_breaks_off_loses_the_broken_line_only():
    told = ANSWER.read_text()
    assert rails(told[: told.index("BATT_V") + 15]) == rails(told)


names = st.from_regex(r"[A-Z0-9][A-Z0-9_]{0,10}[A-Z0-9]", fullmatch=True)


@settings(deadline=None)
@given(st.dictionaries(names, st.tuples(st.floats(0, 99), st.floats(0, 99)), min_size=1), st.randoms())
def test_any_order_of_lines_gives_the_same_rails(values, random):
    lines = [f"  {name}_A current({index})={amperes:.8f}A" for index, (name, (amperes, _)) in enumerate(values.items())]
    lines += [f"{name}_V volt({index + 50})={volts:.8f}V" for index, (name, (_, volts)) in enumerate(values.items())]
    random.shuffle(lines)
    found = rails("\n".join(lines))
    assert found == pytest.approx({name: amperes * volts for name, (amperes, volts) in values.items()}, abs=1e-5)


@settings(deadline=None)
@given(st.text())
def test_no_text_is_taken_for_rails_by_mistake(text):
    with pytest.raises(MeterError):
        rails(text)


# --- the mailbox ---------------------------------------------------------------------------------------------------


def test_the_message_is_the_one_that_vcgencmd_sends():
    message = question("pmic_read_adc")
    words = struct.unpack("=6I", message[:24])
    # vcgencmd.c: (1024 / 4 + 7) words; request; GET_GENCMD_RESULT; buffer of 1024; no length; no error.
    assert words == (4 * 263, 0, 0x00030080, 1024, 0, 0)
    assert len(message) == 4 * 263
    assert message[24:].rstrip(b"\0") == b"pmic_read_adc"


def test_an_answer_comes_in_place_of_the_question():
    message = question("pmic_read_adc")
    message[24 : 24 + 4] = b"A_A\0"
    assert answer(message) == "A_A"


def test_an_error_of_the_firmware_is_told_in_words():
    message = question("pmic_read_adc")
    struct.pack_into("=I", message, 20, 1)
    message[24 : 24 + len(NOT_REGISTERED) + 1] = NOT_REGISTERED.encode() + b"\0"
    with pytest.raises(MeterError, match=r"no pmic_read_adc: only Raspberry Pi 5 measures currents"):
        answer(message)


def test_a_file_that_is_no_mailbox_gives_no_answer(tmp_path):
    (tmp_path / "vcio").write_text("")
    with pytest.raises(MeterError, match=r"vcio: the firmware gives no answer: Inappropriate ioctl"):
        RaspberryPiPmic(str(tmp_path / "vcio")).open()


def test_who_may_not_open_the_mailbox_is_told_the_group():
    with public_folder() as folder:
        (folder / "vcio").touch(mode=0)
        with as_nobody(), pytest.raises(MeterError, match=r"vcio: \w+ may not ask .* group video; `testbed provision`"):
            RaspberryPiPmic(str(folder / "vcio")).open()


# --- the program, and what fails -----------------------------------------------------------------------------------


def test_without_mailbox_and_program_it_is_no_raspberry_pi_5(tmp_path):
    with pytest.raises(
        MeterError, match=r"neither .*vcio nor the program .*: this is no Raspberry Pi 5; .*`meter: none`"
    ):
        RaspberryPiPmic(str(tmp_path / "vcio"), str(tmp_path / "vcgencmd")).open()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "Can\'t open device file: /dev/vcio"; exit 255', "group video"),
        (f"echo '{NOT_REGISTERED}'; exit 255", "only Raspberry Pi 5 measures currents"),
        ("echo what >&2; exit 3", "expected voltages and currents, got what"),
        ("exit 3", "got exit code 3"),
        ("true", "got nothing"),
        ("echo BATT_V 'volt(25)=0.00000000V'", "expected voltages and currents"),
    ],
)
def test_a_program_that_does_not_answer_is_told(tmp_path, script, said):
    with pytest.raises(MeterError, match=said):
        meter(tmp_path, script).open()


def test_a_failed_reading_is_not_the_end(opened, tmp_path):
    whole = (tmp_path / "answer").read_text()
    (tmp_path / "answer").write_text(whole.replace("HDMI_A", "OTHER_A"))
    with pytest.raises(MeterError, match="the answer lacks HDMI"):
        opened.read()
    (tmp_path / "answer").unlink()
    with pytest.raises(MeterError, match="No such file"):
        opened.read()
    (tmp_path / "answer").write_text(whole)
    assert len(opened.read().watts) == 12
