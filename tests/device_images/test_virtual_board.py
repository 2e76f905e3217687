"""What is said of a virtual board's image: the command that boots it."""

from __future__ import annotations

import shlex
import shutil
import subprocess

import pytest

from testbed.device_images import debian
from testbed.device_images.build import build
from testbed.device_images.debian import DebianImage
from testbed.device_images.render import render, write
from tests.device_images.boards import GOLDEN
from tests.needed import need


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Builds the disk of a board out of an empty one, and gives what is said of it."""
    need("qemu-img", "debugfs", "mke2fs")
    image = DebianImage(tmp_path / "kept", "arm64")
    image.folder.mkdir()
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(8 << 20)
    (tmp_path / "root/var/lib").mkdir(parents=True)
    for words in (
        ["mke2fs", "-q", "-d", tmp_path / "root", raw],
        ["qemu-img", "convert", "-O", "qcow2", raw, image.disk],
    ):
        subprocess.run([shutil.which(words[0], path="/usr/bin:/usr/sbin:/sbin"), *words[1:]], check=True)
    monkeypatch.setattr(debian, "build", lambda architecture, say: image)
    write(render(GOLDEN["debian_trixie"]()), tmp_path / "card")

    def built(output):
        return build(tmp_path / "card", tmp_path / output, tell=lambda *_: None)

    return built


def test_the_whole_command_that_boots_it_is_said(said, tmp_path):
    lines = said("board, 1.qcow2")
    command = next(line for line in lines if line.strip().startswith("qemu-system-aarch64"))
    words = shlex.split(command)
    assert "root=/dev/vda rw console=ttyAMA0" in words[words.index("-append") + 1]
    assert words[words.index("-drive") + 1] == f"file={tmp_path}/board,, 1.qcow2,if=virtio,format=qcow2"
    assert words[words.index("-netdev") + 1].endswith("hostfwd=tcp:127.0.0.1:2222-:22")
    assert {"-m", "-kernel", "-initrd"} <= set(words)
    assert (tmp_path / "board, 1.qcow2").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(".board*"))


def test_its_readme_names_the_port_at_which_it_answers(said, tmp_path):
    assert any("127.0.0.1, port 2222" in line for line in said("board.qcow2"))
    assert "Port 2222\n" in (tmp_path / "card/README.txt").read_text()
