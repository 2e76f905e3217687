"""SIGTERM at commands that make images and labs: what was begun is tidied away."""

import signal
import subprocess
import sys

import pytest

from testbed.cli import main
from testbed.device_images import build
from testbed.lab.lab import Lab

MAKERS = {"lab": "lab up --folder new", "image": "image build rendered -o board.img"}


@pytest.mark.parametrize("words", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "testbed: interrupted"), (signal.SIGTERM, 143, "testbed: terminated")],
)
def test_what_is_being_made_is_tidied_away(words, number, code, told, tmp_path):
    """A second SIGTERM, as `timeout` may send it, does not cut that short."""
    command = (
        "import os, signal, sys\n"
        "from testbed import cli\n"
        "from testbed.device_images import build\n"
        "from testbed.lab.lab import Lab\n"
        "def make(*_, **more):\n"
        "    try:\n"
        "        print('waiting', flush=True)\n"
        "        signal.pause()\n"
        "    finally:\n"
        f"        os.kill(os.getpid(), {int(number) if number == signal.SIGTERM else 0})\n"
        "        print('tidy')\n"
        "build.build = Lab.up = make\n"
        f"sys.exit(cli.main({words.split()}))"
    )
    (tmp_path / "rendered").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        process.stdout.readline()
        process.send_signal(number)
        said, problems = process.communicate()
    assert (process.returncode, said, problems.strip()) == (code, "tidy\n", told)


def test_afterwards_sigterm_is_as_it_was(monkeypatch, tmp_path):
    inside = []

    def refuse(*_, **more):
        inside.append(signal.getsignal(signal.SIGTERM))
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build", refuse)
    monkeypatch.setattr(Lab, "up", refuse)
    before = signal.getsignal(signal.SIGTERM)
    for words in MAKERS.values():
        assert main([*words.split()]) == 130
    assert before not in inside
    assert signal.getsignal(signal.SIGTERM) is before
