"""Who the files of a lab belong to, and where they are, when it is made under sudo."""

import os
import pwd

import pytest

from testbed.lab.access import give_to_user
from testbed.lab.folder import KEY
from testbed.lab.lab import default_folder

NOBODY = pwd.getpwnam("nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts for another user")


def test_the_default_folder_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    monkeypatch.setenv("SUDO_UID", str(NOBODY.pw_uid))
    assert default_folder() == tmp_path / "lab"


@needs_root
def test_under_sudo_it_is_in_the_cache_of_who_called(monkeypatch):
    monkeypatch.delenv("TESTBED_CACHE", raising=False)
    monkeypatch.setenv("SUDO_UID", str(NOBODY.pw_uid))
    assert str(default_folder()) == f"{NOBODY.pw_dir}/.cache/edge-testbed/lab"


@needs_root
def test_under_sudo_the_key_belongs_to_who_called(monkeypatch, tmp_path):
    (tmp_path / KEY).touch()
    (tmp_path / "hosts").mkdir()
    give_to_user(tmp_path)
    assert (tmp_path / KEY).stat().st_uid == 0
    monkeypatch.setenv("SUDO_UID", str(NOBODY.pw_uid))
    give_to_user(tmp_path)
    assert {(tmp_path / name).stat().st_uid for name in ("", KEY)} == {NOBODY.pw_uid}
    assert (tmp_path / "hosts").stat().st_uid == 0
