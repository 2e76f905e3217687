"""`testbed image` as a user meets it."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from testbed.cli import main
from testbed.device_images.render import render, write
from tests.device_images.boards import GOLDEN, KEYS, PUBLIC_KEY
from tests.needed import need

VIRTUAL_BOARD = """\
title: Virtual board
memory: 2 GiB
usable_memory: 2 GiB
cores: 2
architecture: x86_64
cgroup_default: v2
peak_source: cgroup2_peak
swap_default: none
python: "3.13"
torch_source: "https://download.pytorch.org/whl/cpu"
"""
INVENTORY = """\
defaults: {kind: raspberry_pi, profile: raspberry_pi_5_8gb, user: ada, budget: {memory: "1 GiB"}}
devices:
  pi-1: {image: {authorized_keys: [login.pub], address: 192.0.2.11/24, gateway: 192.0.2.1}}
  pi-2: {image: {authorized_keys: [login.pub], wifi: lab, country: DE}}
  far: {image: {authorized_keys: [login.pub], address: 192.0.2.13/24, gateway: 198.51.100.1}}
  twin-1: {image: {authorized_keys: [login.pub], address: 192.0.2.14/24}}
  twin-2: {image: {authorized_keys: [login.pub], address: 192.0.2.14/16}}
  Pi_4: {image: {authorized_keys: [login.pub]}}
  pi-4: {image: {authorized_keys: [login.pub]}}
  moved: {host: 192.0.2.16, image: {authorized_keys: [login.pub], address: 192.0.2.15/24}}
  Odd_1: {image: {authorized_keys: [login.pub], address: 192.0.2.17/24}}
  pc: {kind: emulated}
"""


@pytest.fixture
def lab(tmp_path):
    shutil.copy(PUBLIC_KEY, tmp_path / "login.pub")
    shutil.copy(KEYS / "of_no_board", tmp_path / "private")
    (tmp_path / "lab.yaml").write_text(INVENTORY)
    return tmp_path


@pytest.fixture
def image(lab, capsys):
    """Types `testbed image …`, and gives the exit code and what was said on both streams."""

    def typed(*words):
        inventory = ["--inventory", str(lab / "lab.yaml")] if words[0] == "render" else []
        code = main(["image", *(str(word) for word in words), *inventory])
        said = capsys.readouterr()
        return code, said.out + said.err

    return typed


def test_every_image_is_listed(image):
    assert "raspberry_pi_os_trixie" in image("list")[1]


def test_a_device_is_rendered_from_its_inventory_and_checked(image, lab):
    code, said = image("render", "pi-1", "-o", lab / "card")
    assert code == 0, said
    assert "bootfs/user-data (secret)" in said
    assert "192.0.2.11/24" in (lab / "card/bootfs/network-config").read_text()
    assert image("check", lab / "card")[0] == 0


def test_any_board_of_a_profile_is_rendered(image, lab):
    words = ("raspberry_pi_4b_4gb", "-o", lab / "card", "--authorized-key", lab / "login.pub")
    assert image("render", *words)[0] == 0
    assert json.loads((lab / "card/manifest.json").read_text())["device"] == "raspberry-pi-4b-4gb"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pi-1", "--authorized-key", "{lab}/private"], "is a private key; give its public half"),
        (["pi-1", "--authorized-key", "{lab}/none.pub"], "cannot be read"),
        (["pi-1", "--image", "raspbian"], "there is no image 'raspbian'"),
        (["pi-1", "--image", "debian_trixie"], "is not for raspberry_pi_5_8gb"),
        (["pi-3"], "has no device 'pi-3'"),
        (["pc"], "is an emulated device"),
        (["pi-2"], "needs a name and a password"),
        (["far"], "198.51.100.1 is not in the network"),
        (["twin-1"], "twin-1: image.address: 192.0.2.14 is the address of twin-2 too"),
        (["Pi_4"], "Pi_4 and pi-4 would have one host name, pi-4"),
        (["moved"], "moved: host is 192.0.2.16, and image.address is 192.0.2.15/24"),
        (["raspberry_pi_4b_4gb"], "nobody could log in"),
        (
            ["jetson_orin_nano_8gb", "--image", "jetson_nano_jetpack_4", "--authorized-key", "{lab}/login.pub"],
            "is not for",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_message_and_nothing_is_written(image, lab, words, message):
    code, said = image("render", *(word.format(lab=lab) for word in words), "-o", lab / "card")
    assert code != 0
    assert message in said
    assert not (lab / "card").exists()


def test_rendering_compares_the_publishers_file_with_its_checksums(image, lab):
    (lab / "os.img.xz").write_bytes(b"an operating system")
    (lab / "sums").write_text(f"{hashlib.sha256(b'an operating system').hexdigest()}  os.img.xz\n")
    words = ("render", "pi-1", "-o", lab / "card", "--base", lab / "os.img.xz")
    code, said = image(*words, "--checksums", lab / "sums")
    assert code == 0, said
    assert "its SHA-256 is the one in the file of checksums" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "{lab}/os.img.xz", "--checksums", "{lab}/sums"], "is damaged, or it is not the publisher's file"),
        (["--base", "{lab}/os.img.xz"], "there is nothing to compare"),
        (["--base", "{lab}/none.img.xz"], "there is no file"),
        (["--checksums", "{lab}/sums"], "name the publisher's by `--base FILE`"),
    ],
)
def test_nothing_is_rendered_for_a_file_that_is_not_the_publishers(image, lab, words, message):
    (lab / "os.img.xz").write_bytes(b"an operating system, or so")
    (lab / "sums").write_text(f"{hashlib.sha256(b'an operating system').hexdigest()}  os.img.xz\n")
    code, said = image("render", "pi-1", "-o", lab / "card", *(word.format(lab=lab) for word in words))
    assert code != 0
    assert message in said
    assert not (lab / "card").exists()


def test_an_image_of_packages_starts_from_no_file(image, lab):
    (lab / "profiles").mkdir()
    (lab / "profiles/virtual_board_amd64.yaml").write_text(VIRTUAL_BOARD)
    words = ("-o", lab / "card", "--authorized-key", lab / "login.pub", "--base", lab / "os.img.xz")
    code, said = image("render", "virtual_board_amd64", *words)
    assert code == 2
    assert "it takes no --base and no --checksums" in said
    assert not (lab / "card").exists()


def test_a_device_without_its_inventory_is_told_the_option(lab, capsys):
    assert main(["image", "render", "pi-1", "-o", str(lab / "card")]) == 2
    said = capsys.readouterr().err
    assert "there is no profile 'pi-1'" in said
    assert "if pi-1 is a device, name its inventory by `--inventory FILE`" in said


def test_no_empty_line_stands_before_what_is_said(lab, capfd):
    (lab / "os.img.xz").write_bytes(b"an operating system")
    (lab / "sums").write_text(f"{hashlib.sha256(b'an operating system').hexdigest()}\n")
    words = ("pi-1", "-o", lab / "card", "--inventory", lab / "lab.yaml", "--base", lab / "os.img.xz")
    assert main(["image", "render", *map(str, words), "--checksums", str(lab / "sums")]) == 0
    said = capfd.readouterr()
    assert said.out.startswith(str(lab))
    assert said.err.startswith("note: ")


@pytest.mark.parametrize(
    ("text", "message"), [("1234567\n", "8 to 63 characters"), ("open\nsesame\n", "the password alone, on one line")]
)
def test_what_is_no_password_of_wpa_is_refused(text, message, image, lab):
    (lab / "secret").write_text(text)
    code, said = image("render", "pi-2", "-o", lab / "card", "--wifi-password-file", lab / "secret")
    assert code == 2
    assert message in said
    assert not (lab / "card").exists()


@pytest.mark.parametrize(("mode", "noted"), [(0o600, False), (0o644, True)])
def test_a_password_that_others_may_read_is_noted(mode, noted, image, lab):
    (lab / "secret").write_bytes(b"open sesame\r\n")
    (lab / "secret").chmod(mode)
    code, said = image("render", "pi-2", "-o", lab / "card", "--wifi-password-file", lab / "secret")
    assert code == 0
    assert (f"note: others may read the password in {lab / 'secret'}: chmod 600" in said) is noted
    assert 'password: "open sesame"\n' in (lab / "card/bootfs/network-config").read_text()


def test_what_is_typed_at_last_has_the_names_of_the_inventory(image, lab):
    code, said = image("render", "Odd_1", "-o", lab / "card")
    assert code == 0
    assert "note: Odd_1: there is no image.gateway and image.name_servers" in said
    assert f"testbed provision --inventory {lab / 'lab.yaml'} --only Odd_1\n" in (lab / "card/README.txt").read_text()


def test_a_board_behind_another_port_is_known_at_it(image, lab):
    (lab / "lab.yaml").write_text(INVENTORY.replace("Odd_1: {", "Odd_1: {host: gate.lab, port: 2201, "))
    assert image("render", "Odd_1", "-o", lab / "card")[0] == 0
    assert (lab / "card/known_hosts").read_text().startswith("[gate.lab]:2201,192.0.2.17 ssh-ed25519 ")
    assert "ssh -p 2201 ada@gate.lab\n" in (lab / "card/README.txt").read_text()


def test_for_any_board_of_a_profile_it_is_said_that_an_inventory_comes_first(image, lab):
    words = ("raspberry_pi_4b_4gb", "-o", lab / "card", "--authorized-key", lab / "login.pub")
    assert image("render", *words)[0] == 0
    told = (lab / "card/README.txt").read_text()
    assert "write this one into an inventory" in told
    assert "testbed provision --inventory YOUR_INVENTORY --only ITS_NAME\n" in told


def test_what_was_changed_or_opened_afterwards_is_wrong(image, lab):
    write(render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]()), lab / "card")
    (lab / "card/apply.sh").write_text("#!/bin/sh\nrm $1\n")
    (lab / "card/bootfs/network-config").unlink()
    (lab / "card/ssh_host_ed25519_key").chmod(0o644)
    (lab / "card").chmod(0o755)
    code, said = image("check", lab / "card", "--json")
    wrong = {(each["file"], each["looked_at"]) for each in json.loads(said) if each["verdict"] == "wrong"}
    assert code == 1
    assert wrong >= {
        ("apply.sh", "as rendered"), ("bootfs/network-config", "as rendered"), (".", "privacy"),
        ("ssh_host_ed25519_key", "privacy"),
    }  # fmt: skip


def test_a_folder_that_was_not_rendered_is_refused(image, lab):
    assert "was not made by" in image("check", lab)[1]
    assert (
        "expected the folder that `testbed image render` wrote, and it is a file" in image("check", lab / "private")[1]
    )


def test_a_file_that_is_no_text_is_wrong(image, lab):
    write(render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]()), lab / "card")
    (lab / "card/bootfs/user-data").write_bytes(b"\xff\xfe")
    code, said = image("check", lab / "card", "--json")
    wrong = {each["text"] for each in json.loads(said) if each["verdict"] == "wrong"}
    assert code == 1
    assert wrong == {"it was changed by hand", "it is no text (UTF-8)"}


def test_a_folder_of_another_board_is_refused_before_anything_is_compared(image, lab):
    assert image("render", "pi-1", "-o", lab / "card")[0] == 0
    (lab / "secret").write_text("open sesame")
    words = ("-o", lab / "card", "--wifi-password-file", lab / "secret", "--base", lab / "none.img.xz")
    code, said = image("render", "pi-2", *words)
    assert code == 2
    assert f"{lab / 'card'} holds the files of pi-1; name another folder for those of pi-2" in said


def test_a_tool_that_is_not_installed_is_told(image, lab, monkeypatch):
    write(render(GOLDEN["raspberry_pi_os_trixie_by_wifi"]()), lab / "card")
    monkeypatch.setenv("PATH", str(lab))
    code, said = image("check", lab / "card")
    assert code == 0
    assert "shellcheck is not installed" in " ".join(said.split())
    assert image("check", lab / "card", "--strict")[0] == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_rendered_is_right_as_its_own_tools_see_it(name, image, lab):
    """By cloud-init and shellcheck; where they are lacking there is nothing to see, and in CI that is a failure."""
    need("cloud-init", "shellcheck")
    write(render(GOLDEN[name]()), lab / "card")
    code, said = image("check", lab / "card", "--strict")
    assert code == 0, said
    assert "cloud-init schema" in said or "shellcheck" in said
