"""Rendered files, as they stand in golden/; `python tests/device_images/test_render.py` writes those anew."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from testbed.device_images import catalogue
from testbed.device_images.host_key import HostKey
from testbed.device_images.render import IDENTITY, host_key_in, render, write
from testbed.errors import UsageError
from tests.device_images.boards import GOLDEN, HERE, WIFI_PASSWORD

EVERY_BOARD = pytest.mark.parametrize("name", GOLDEN)
#: Those whose files cloud-init writes; NVIDIA's tools write the others (test_jetson.py).
BY_CLOUD_INIT = [name for name, made in GOLDEN.items() if catalogue.images()[made().image].flash is None]


def told(board):
    return {file.path: file.text for file in render(board)}


def below(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@EVERY_BOARD
def test_a_board_is_rendered_as_it_was_looked_at(name):
    assert told(GOLDEN[name]()) == below(HERE / "golden" / name)


def test_every_image_has_been_looked_at():
    assert {made().image for made in GOLDEN.values()} == set(catalogue.images())


@pytest.mark.parametrize("name", BY_CLOUD_INIT)
def test_the_board_is_told_what_it_is_and_which_files_came_with_it(name):
    files = told(GOLDEN[name]())
    user_data = yaml.safe_load(next(text for path, text in files.items() if path.endswith("user-data")))
    written = {each["path"]: each["content"] for each in user_data["write_files"]}
    identity = json.loads(written.pop(IDENTITY))
    assert identity["device"] == "board-1"
    private = {each["path"] for each in user_data["write_files"] if each["permissions"] == "0600"}
    assert set(identity["files"]) == set(written) - private  # the login user cannot look at those


@pytest.mark.parametrize("name", BY_CLOUD_INIT)
def test_nobody_logs_in_by_a_password(name):
    files = told(GOLDEN[name]())
    user_data = yaml.safe_load(next(text for path, text in files.items() if path.endswith("user-data")))
    assert [user["lock_passwd"] for user in user_data["users"]] == [True]
    assert user_data["ssh_pwauth"] is False
    assert "passwd:" not in str(user_data).replace("lock_passwd", "")


def test_the_wireless_password_stands_in_one_file_and_that_one_is_private():
    files = render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]())
    assert [(file.path, file.mode) for file in files if WIFI_PASSWORD in file.text] == [
        ("bootfs/network-config", 0o600)
    ]


def test_a_wireless_password_that_yaml_must_quote_is_private_too():
    odd = replace(GOLDEN["raspberry_pi_os_trixie_by_wifi"](), wifi_password='say "\\ friend')
    (network,) = [file for file in render(odd) if file.path == "bootfs/network-config"]
    points = yaml.safe_load(network.text)["network"]["wifis"]["wlan0"]["access-points"]
    assert points == {"lab net": {"password": odd.wifi_password}}
    assert network.mode == 0o600


@EVERY_BOARD
def test_secrets_are_private_and_so_is_the_folder(name, tmp_path):
    write(render(GOLDEN[name]()), tmp_path / "it")
    secret = [path for path in (tmp_path / "it").rglob("*") if path.is_file() and "PRIVATE KEY" in path.read_text()]
    assert len(secret) == 2
    assert {path.stat().st_mode & 0o777 for path in secret} == {0o600}
    assert (tmp_path / "it").stat().st_mode & 0o777 == 0o700


def test_a_board_without_an_image_is_told_which_have_one():
    with pytest.raises(UsageError, match=r"no image for the profile my_box; there are images for .*jetson_nano_\*"):
        catalogue.choose("my_box", None)


def test_a_board_that_is_rendered_again_is_the_same_board(tmp_path):
    made = GOLDEN["debian_trixie"]()
    write(render(made), tmp_path / "it")
    assert host_key_in(tmp_path / "it").public == made.host_key.public
    assert HostKey.made().public != HostKey.made().public


def test_what_an_earlier_rendering_left_is_gone_with_the_folders_that_it_was_in(tmp_path):
    write(render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]()), tmp_path / "it")
    write(render(GOLDEN["jetson_nano_jetpack_4"]()), tmp_path / "it")
    assert below(tmp_path / "it") == told(GOLDEN["jetson_nano_jetpack_4"]())
    assert not (tmp_path / "it/bootfs").exists()


def test_a_folder_of_another_board_is_left_alone(tmp_path):
    write(render(GOLDEN["debian_trixie"]()), tmp_path / "it")
    before = below(tmp_path / "it")
    with pytest.raises(UsageError, match="holds the files of board-1; name another folder for those of board-2"):
        write(render(replace(GOLDEN["debian_trixie"](), host_name="board-2")), tmp_path / "it")
    assert below(tmp_path / "it") == before


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": []}', "no JSON", "\0"])
def test_a_folder_whose_manifest_is_another_one_is_left_alone(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="is not as `testbed image render` wrote it: put it back, or render"):
        write(render(GOLDEN["debian_trixie"]()), tmp_path)
    assert below(tmp_path) == {"manifest.json": text}


@pytest.mark.parametrize("spoilt", [b"", b"\xff", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_host_key_is_told_with_the_way_out(spoilt, tmp_path):
    (tmp_path / "ssh_host_ed25519_key").write_bytes(spoilt)
    with pytest.raises(UsageError, match=r"is damaged: .*; put it back, or remove the file or name a new folder"):
        host_key_in(tmp_path)


def test_a_disk_that_is_full_costs_no_board_its_host_key(tmp_path, monkeypatch):
    made = GOLDEN["debian_trixie"]()
    write(render(made), tmp_path / "it")

    def write_none(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_none)
    with pytest.raises(UsageError, match="No space left"):
        write(render(replace(made, user="eve")), tmp_path / "it")
    assert host_key_in(tmp_path / "it") == made.host_key


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(UsageError, match="other files"):
        write(render(GOLDEN["debian_trixie"]()), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "…"


if __name__ == "__main__":
    shutil.rmtree(HERE / "golden", ignore_errors=True)
    for case, make in GOLDEN.items():
        for file in render(make()):
            path = HERE / "golden" / case / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, encoding="utf-8")
