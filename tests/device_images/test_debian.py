"""The Debian image's maker, when it is ended before it is done."""

import contextlib
import os
from pathlib import Path

import pytest

from testbed.device_images import debian
from testbed.device_images.debian import DebianImage
from tests.needed import need


def commands():
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            yield (path / "cmdline").read_bytes().decode(errors="replace")


def interrupt(_text):
    raise KeyboardInterrupt


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes such an image")
def test_who_ends_it_ends_all_that_it_started_and_nothing_is_left(tmp_path, monkeypatch):
    need("unshare")
    mark = f"31{os.getpid()}"
    program = tmp_path / "bin" / "mmdebstrap"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nfor root; do :; done\nmkdir "$root"\nsleep {mark} &\necho "I: begun" >&2\nwait\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = tmp_path / "image"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        debian._make(DebianImage(folder, "amd64"), interrupt)
    assert [command for command in commands() if mark in command] == []
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_half_written_is_not_left(tmp_path, monkeypatch):
    def run(command):
        if command[0] == "qemu-img":
            Path(command[-1]).touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(debian, "run", run)
    monkeypatch.setattr(debian, "_install", lambda root, *_: root.mkdir())
    monkeypatch.setattr(debian, "_linked", lambda root, name: Path(__file__))
    with pytest.raises(KeyboardInterrupt):
        debian._make(DebianImage(tmp_path, "amd64"), lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["initrd.img", "vmlinuz"]
