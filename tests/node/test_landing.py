"""The lock of a device and the unpacking of a code wheel; and that both work from their text alone."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from testbed.assigned import file_hash
from testbed.node import landing, share


@pytest.fixture
def lock(tmp_path):
    return str(tmp_path / "device" / "lock.json")


def claim(tmp_path, run="first", device="board", orphan_seconds=1800.0):
    spool = str(tmp_path / "spool")
    return {
        "run": run, "device": device, "owner": "ada@lab:1", "since": 0.0, "spool": spool,
        "orphan_seconds": orphan_seconds,
    }  # fmt: skip


def test_one_run_holds_a_device_until_it_lets_go(tmp_path, lock):
    assert landing.holder(lock) is None
    assert landing.hold(lock, claim(tmp_path)) is None
    assert landing.hold(lock, claim(tmp_path)) is None  # resumed
    other = landing.hold(lock, claim(tmp_path, "second"))
    assert (other["run"], other["owner"], other["stale"]) == ("first", "ada@lab:1", False)
    assert not landing.release(lock, "second")
    assert landing.release(lock, "first")
    assert landing.hold(lock, claim(tmp_path, "second")) is None


def test_of_many_that_come_at_once_one_has_it(tmp_path, lock):
    got = []
    claims = [claim(tmp_path, f"run-{number}") for number in range(16)]
    threads = [threading.Thread(target=lambda c=c: got.append(landing.hold(lock, c))) for c in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got.count(None) == 1


def test_the_same_run_under_another_name_of_the_device_does_not_have_it(tmp_path, lock):
    landing.hold(lock, claim(tmp_path, device="one"))
    assert landing.hold(lock, claim(tmp_path, device="two"))["device"] == "one"


def test_after_a_restart_the_age_counts_from_there_whatever_the_clock_says(tmp_path, lock, monkeypatch):
    landing.hold(lock, claim(tmp_path, orphan_seconds=60.0))
    monkeypatch.setattr(landing, "boot", lambda: "another")
    monkeypatch.setattr(landing, "_seconds_since_boot", lambda: 30.0)
    assert (landing.holder(lock)["age_seconds"], landing.holder(lock)["stale"]) == (30.0, False)
    monkeypatch.setattr(landing, "_seconds_since_boot", lambda: 90.0)
    assert landing.holder(lock)["stale"]


def test_a_controller_that_is_barred_does_not_hold_the_device_again(tmp_path, lock):
    landing.bar(lock)  # nobody holds it: nobody is barred
    landing.hold(lock, claim(tmp_path))
    landing.bar(lock)
    assert landing.hold(lock, claim(tmp_path)) == {"barred": "first"}
    assert landing.release(lock, "first")
    assert landing.hold(lock, claim(tmp_path)) == {"barred": "first"}
    assert landing.hold(lock, {**claim(tmp_path), "owner": "ada@lab:2"}) is None


def test_while_a_run_takes_the_device_again_and_again_nobody_else_gets_it(tmp_path, lock):
    """Taking it again replaces the file, letting go removes it: neither may hit what another has just written."""
    got = []

    def hold_and_let_go(run):
        for _ in range(100):
            if landing.hold(lock, claim(tmp_path, run)) is None:
                got.append((landing.hold(lock, claim(tmp_path, run)), landing.holder(lock)["run"] == run))
                landing.release(lock, run)

    threads = [threading.Thread(target=hold_and_let_go, args=(f"run-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(got) == {(None, True)}
    assert landing.holder(lock) is None


def test_what_a_run_that_holds_the_device_may_be_sending_is_not_cleared_away(tmp_path, lock):
    root = Path(lock).parent
    (root / "content").mkdir(parents=True)
    (root / "runs" / "first" / "spool").mkdir(parents=True)
    landing.hold(lock, claim(tmp_path))
    assert landing.tidy(str(root), None, contents=True)["busy"] == ["first"]
    assert (root / "content").is_dir()
    landing.release(lock)
    assert landing.tidy(str(root), None, contents=True)["runs"] == ["first"]
    assert not (root / "content").exists()


def test_a_full_disk_is_told_in_words(monkeypatch, capsys):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/lock.json")

    monkeypatch.setitem(landing.VERBS, "hold", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
    assert landing.main("hold") == 0
    assert json.loads(capsys.readouterr().out) == {"error": "no space left for /data/lock.json", "kind": "DiskError"}


def test_a_lock_that_cannot_be_read_is_stale(tmp_path, lock):
    landing.hold(lock, claim(tmp_path))
    (tmp_path / "device" / "lock.json").write_text("{")
    assert landing.hold(lock, claim(tmp_path))["stale"]
    assert landing.release(lock)


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "content"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "x = 1\n")
    return path


def test_a_wheel_is_unpacked_once_and_only_if_it_is_the_one(tmp_path, wheel):
    target = tmp_path / "code" / file_hash(wheel)
    target.parent.mkdir()
    assert landing.unpack(str(wheel), target.name, str(target))
    assert (target / "package" / "__init__.py").read_text() == "x = 1\n"
    assert not landing.unpack(str(wheel), target.name, str(target))
    with pytest.raises(ValueError, match="not what its name says"):
        landing.unpack(str(wheel), "0" * 64, str(tmp_path / "code" / "other"))
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("module", [landing, share], ids=["landing", "share"])
def test_the_text_alone_is_enough(tmp_path, module):
    text = Path(module.__file__).read_text(encoding="utf-8")
    verb, arguments = ("holder", {"lock": str(tmp_path / "none")}) if module is landing else ("fetch", {"odd": 1})
    command = [sys.executable, "-I", "-S", "-c", text, verb]
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, cwd="/", check=True)
    said = json.loads(done.stdout)
    assert said == {"answer": None} if module is landing else said["kind"] == "DeviceError"
