"""The CSV meter: the files that bench instruments export, right and wrong ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

from testbed.errors import MeterError, UsageError
from testbed.meters import make

AT = 1_769_900_000.0


@pytest.fixture
def exported(tmp_path):
    """Writes a file, gives the meter that reads it, opened."""

    def write(text, **settings):
        path = tmp_path / "export.csv"
        path.write_text(text, encoding="utf-8")
        meter = make("csv", {"file": str(path), **settings})
        meter.open()
        return meter

    return write


def rows(meter, since=AT, until=AT + 100):
    return [(each.unix_seconds, each.watts[0]) for each in meter.history(since, until)]


PLAIN = f"time,W,remark\n{AT},4.5,a\n{AT + 1},5.25,b\n{AT + 2},6,\n"
SAME = [(AT, 4.5), (AT + 1, 5.25), (AT + 2, 6.0)]


FORMS = {
    "unix seconds": (PLAIN, {"watts": "W"}),
    "seconds since its start": ("t,W\n0,4.5\n1,5.25\n2,6\n", {"time": "t", "watts": "W", "offset_seconds": AT}),
    "ISO 8601 in UTC": (
        "time,W\n2026-01-31T22:53:20Z,4.5\n2026-01-31T22:53:21Z,5.25\n2026-01-31 22:53:22.000+00:00,6\n",
        {"watts": "W"},
    ),
    "volts and amps": (
        f"time,A,V\n{AT},0.9,5\n{AT + 1},1.05,5.0\n{AT + 2},1.2,5\n",
        {"volts": "V", "amps": "A"},
    ),
    "a decimal comma": (
        f'Gerät 7\n\nZeit;"Leistung [W]"\n{AT:.1f};4,5\n'.replace(".", ",") + f"{AT + 1:.0f};5,25\n{AT + 2:.0f};6\n",
        {"time": "Zeit", "watts": "Leistung [W]", "decimal": ",", "skip_lines": 2},
    ),
    "tabs, spaces and empty lines": (
        f"\ufefftime\t W \n{AT} \t4.5\n\n{AT + 1}\t5.25\n{AT + 2}\t6\n\n",
        {"watts": "W", "delimiter": "\t"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_instruments_write(exported, form):
    text, settings = FORMS[form]
    meter = exported(text, **settings)
    assert rows(meter) == SAME
    assert meter.period_seconds == 1.0
    assert (meter.point, meter.retrospective) == ("dc_input", True)


def test_a_time_without_a_zone_is_this_machines_own(tmp_path):
    (tmp_path / "x.csv").write_text("time,W\n2026-02-01 07:53:20,4.5\n2026-02-01 07:53:21,5\n")
    script = (
        "from testbed.meters import make\n"
        f"meter = make('csv', {{'file': {str(tmp_path / 'x.csv')!r}, 'watts': 'W'}})\n"
        "print(meter.history(0, 1)[0].unix_seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"TZ": "Asia/Tokyo"}, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == AT


def test_a_window_with_one_row_before_and_one_after(exported):
    meter = exported("time,W\n" + "".join(f"{AT + step},{step}\n" for step in range(20)), watts="W")
    assert [watts for _, watts in rows(meter, AT + 4.5, AT + 7.5)] == [4, 5, 6, 7, 8]
    assert [watts for _, watts in rows(meter, AT - 5, AT + 0.5)] == [0, 1]
    assert [watts for _, watts in rows(meter, AT + 18.5, AT + 90)] == [18, 19]


def test_the_spacing_of_its_rows(exported):
    text = "time,W\n" + "".join(f"{AT + step / 1000:.3f},4\n" for step in range(3000))
    assert exported(text, watts="W").period_seconds == pytest.approx(0.001, rel=0.01)


def test_a_row_that_is_being_written_waits(exported, tmp_path):
    meter = exported(PLAIN + f"{AT + 3},1", watts="W")
    assert rows(meter) == SAME
    with (tmp_path / "export.csv").open("a") as file:
        file.write("2.5,\n")
    assert rows(meter)[-1] == (AT + 3, 12.5)


def test_the_accuracy_is_the_instruments(exported):
    meter = exported(PLAIN, watts="W", gain=0.001, offset_watts=0.002, step_watts=0.0001, timing_seconds=0.01)
    assert meter.accuracy == ((0.001, 0.002, 0.0001, 0.01),)


WRONG = {
    "no such column": (PLAIN, {"watts": "P"}, r"export.csv, line 1: there is no column 'P'; there are 'time', 'W'"),
    "another delimiter": (PLAIN, {"watts": "W", "delimiter": ";"}, r"are 'time,W,remark' \(separated by ';'\)"),
    "no number": (PLAIN.replace("5.25", "OL"), {"watts": "W"}, r"line 3, column 'W': expected a number .* got 'OL'"),
    "another decimal": (PLAIN, {"watts": "W", "decimal": ",", "delimiter": "|"}, "there is no column 'time'"),
    "a decimal point": (
        f"time;W\n{AT:.0f};4.5\n1;2\n", {"watts": "W", "decimal": ","}, r"line 2, .* the decimal \",\", got '4.5'",
    ),
    "no time": (PLAIN.replace(f"{AT + 1}", "noon"), {"watts": "W"}, "line 3, column 'time': expected seconds since"),
    "backwards": (PLAIN.replace(f"{AT + 2}", "12.0"), {"watts": "W"}, "line 4, column 'time': expected a later time"),
    "twice the same time": (PLAIN.replace(f"{AT + 1}", f"{AT}"), {"watts": "W"}, "line 3, .* fractions of a second"),
    "not a number": (PLAIN.replace("5.25", "nan"), {"watts": "W"}, r"line 3, column 'W': .* got 'nan'"),
    "a row that is cut": (PLAIN.replace(",5.25,b", ""), {"watts": "W"}, "line 3, column 'W': .* got 'nothing'"),
    "empty": ("", {"watts": "W"}, "line 1: there is no column 'time'; there are none"),
    "one row": (f"time,W\n{AT},1\n", {"watts": "W"}, "fewer than two rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line_and_column(exported, case):
    text, settings, message = WRONG[case]
    with pytest.raises(MeterError, match=message):
        rows(exported(text, **settings), 0.0, 2 * AT)


def test_no_file(tmp_path):
    with pytest.raises(MeterError, match=r"x.csv: cannot be read \(No such file or directory\); put the instrument"):
        make("csv", {"file": str(tmp_path / "x.csv"), "watts": "W"}).open()


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01" * 10 + b"\n")
    with pytest.raises(MeterError, match="is no CSV file"):
        make("csv", {"file": str(tmp_path / "x.csv"), "watts": "W"}).open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "it needs the name of a column: watts, or both volts and amps"),
        ({"volts": "V"}, "both volts and amps"),
        ({"watts": "W", "volts": "V", "amps": "A"}, "watts, or both"),
        ({"watts": "W", "decimal": ";"}, 'decimal: expected "." or ","'),
        ({"watts": "W", "delimiter": "::"}, "delimiter: expected one character"),
        ({"watts": "W", "delimiter": ",", "decimal": ","}, "other than the decimal's"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        make("csv", {"file": "x.csv", **settings})
