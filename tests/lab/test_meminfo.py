import pytest

from testbed.lab.meminfo import meminfo, refresh

MIB = 1 << 20
BOARD = """\
MemTotal:        7802880 kB
MemFree:          100000 kB
NvMapMemUsed:      12345 kB
SwapTotal:       3901416 kB
"""


def fields(text):
    return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()}


class Groups:
    def __init__(self, used_bytes):
        self._used = used_bytes

    def used_bytes(self):
        return self._used


def test_a_host_sees_its_cap():
    shown = fields(meminfo(512 * MIB))
    assert shown["MemTotal"] == shown["MemAvailable"] == 512 << 10
    assert shown["SwapTotal"] == 0


def test_a_personas_other_lines_stay():
    shown = fields(meminfo(512 * MIB, BOARD))
    assert shown == {"MemTotal": 512 << 10, "MemFree": 512 << 10, "NvMapMemUsed": 12345, "SwapTotal": 3901416}


@pytest.mark.parametrize(("used", "free"), [(100 * MIB, 412 << 10), (600 * MIB, 0), (None, 512 << 10)])
def test_its_use_is_written_in_place(tmp_path, used, free):
    file = tmp_path / "meminfo"
    file.write_text(meminfo(512 * MIB))
    before = file.stat()
    refresh(file, 512 * MIB, Groups(used))
    assert fields(file.read_text())["MemFree"] == free
    assert (file.stat().st_ino, file.stat().st_size) == (before.st_ino, before.st_size)
