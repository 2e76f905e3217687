"""The script that puts the files onto a mounted card, run for real on a folder that looks like one."""

import subprocess

import pytest

from testbed.device_images.render import render, write
from tests.device_images.boards import GOLDEN


@pytest.fixture
def folder(tmp_path):
    write(render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]()), tmp_path / "it")
    return tmp_path / "it"


@pytest.fixture
def card(tmp_path):
    made = tmp_path / "boot fs"
    made.mkdir()
    (made / "config.txt").write_text("arm_64bit=1\n")
    (made / "cmdline.txt").write_text("console=tty1 root=PARTUUID=1-02 rootwait")  # without an end of line, as it comes
    return made


def apply(folder, *words):
    return subprocess.run(["sh", folder / "apply.sh", *words], capture_output=True, text=True, check=False)


def test_a_card_gets_its_files_and_the_kernels_word_once(folder, card):
    for _ in range(2):
        assert apply(folder, card).returncode == 0
    assert (card / "cmdline.txt").read_text() == "console=tty1 root=PARTUUID=1-02 rootwait cgroup_enable=memory\n"
    for name in ("user-data", "meta-data", "network-config"):
        assert (card / name).read_text() == (folder / "bootfs" / name).read_text()


@pytest.mark.parametrize("text", ["", "\n", "  \nroot=PARTUUID=1-02\n"])
def test_a_card_without_a_command_line_is_told_and_left_alone(text, folder, card):
    (card / "cmdline.txt").write_text(text)
    done = apply(folder, card)
    assert done.returncode == 1
    assert "has no words in its first line" in done.stderr
    assert sorted(path.name for path in card.iterdir()) == ["cmdline.txt", "config.txt"]
    assert (card / "cmdline.txt").read_text() == text


def test_a_folder_that_lacks_a_file_is_told_before_anything_is_copied(folder, card):
    (folder / "bootfs/cmdline.append").unlink()
    done = apply(folder, card)
    assert done.returncode == 1
    assert "bootfs has no cmdline.append: render the files anew" in done.stderr
    assert not (card / "user-data").exists()


def test_any_other_folder_is_left_alone(folder, tmp_path):
    done = apply(folder, tmp_path)
    assert done.returncode == 1
    assert "no boot partition" in done.stderr
    assert not (tmp_path / "user-data").exists()
    assert "usage" in apply(folder).stderr
