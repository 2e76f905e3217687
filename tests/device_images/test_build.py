"""`testbed image build` as a user meets it, on the image of a card with a real FAT partition."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from testbed.cli import main
from testbed.device_images import boot_partition, catalogue, check
from testbed.device_images.boot_partition import with_words
from testbed.device_images.render import render, write
from tests.device_images.boards import GOLDEN
from tests.device_images.card import COMMAND_LINE, END, OFFSET, fill, make_card, need_tools, publish, typed

ONE = "raspberry_pi_os_trixie_by_wifi"
BOOT_FILES = ("user-data", "meta-data", "network-config")


def rendered(folder, name=ONE):
    write(render(GOLDEN[name]()), folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    need_tools()
    folder = tmp_path_factory.mktemp("published")
    publish(make_card(folder))
    return folder


@pytest.fixture
def desk(published, tmp_path, monkeypatch):
    """A folder with cards/board-1 rendered, and the publisher's files; card.img is the one of all tests."""
    rendered(tmp_path / "cards/board-1")
    for file in published.iterdir():
        (os.link if file.suffix == ".img" else shutil.copy)(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    # What cloud-init and shellcheck say of these files is seen in test_image_command.
    monkeypatch.setattr(check, "_by_tool", lambda name, looked_at, *_: check.Finding(name, looked_at, check.UNSEEN))
    return tmp_path


def seen(folder):
    """Whatever is to be the same when nothing was touched."""
    stats = {path: path.lstat() for path in folder.iterdir()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def build(capsys):
    """Types `testbed image build …`, and gives the exit code and what was said on both streams."""

    def typed_words(*words, folder="cards/board-1"):
        code = main(["image", "build", folder, "-o", "board-1.img", *words])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return typed_words


FROM_PUBLISHER = ("--base", "some-os-lite.img.xz", "--checksums", "SHA256SUMS")


@pytest.mark.parametrize("name", [ONE, "ubuntu_24_04_raspberry_pi_at_an_address"])
def test_the_image_is_the_publishers_with_the_files_of_the_board(name, desk, build):
    rendered(desk / "cards/board-1", name)
    code, said = build(*FROM_PUBLISHER)
    assert code == 0, said
    image, card = desk / "board-1.img", desk / "card.img"
    for file in BOOT_FILES:
        assert typed(image, file) == (desk / "cards/board-1/bootfs" / file).read_text()
    assert typed(image, "cmdline.txt") == f"{COMMAND_LINE} cgroup_enable=memory\n"
    assert typed(image, "config.txt") == "arm_64bit=1\n"
    assert image.stat().st_size == card.stat().st_size
    for rest in (slice(OFFSET), slice(END, None)):
        assert image.read_bytes()[rest] == card.read_bytes()[rest]
    assert "its SHA-256 is the one in the file of checksums" in said
    assert "cat cards/board-1/known_hosts" in said


def test_only_its_owner_may_read_it_and_nothing_is_left_beside_it(desk, build):
    before = set(desk.iterdir())
    assert build(*FROM_PUBLISHER)[0] == 0
    assert (desk / "board-1.img").stat().st_mode & 0o777 == 0o600
    assert set(desk.iterdir()) - before == {desk / "board-1.img"}


def test_an_image_that_is_built_again_is_the_same_byte_by_byte(desk, build, monkeypatch):
    for output, now in (("one.img", "1700000000"), ("other.img", "1800000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", now)  # what mtools takes for the time
        assert build(*FROM_PUBLISHER, "-o", output)[0] == 0
    assert (desk / "one.img").read_bytes() == (desk / "other.img").read_bytes()


def test_an_image_that_is_not_packed_will_do(desk, build):
    completed = subprocess.run(["sha256sum", "card.img"], capture_output=True, text=True, check=True)
    (desk / "sums").write_text(completed.stdout)
    assert build("--base", "card.img", "--checksums", "sums")[0] == 0


def spoil(desk, what):
    if what == "changed by hand":
        (desk / "cards/board-1/bootfs/user-data").write_text("#cloud-config\n")
    elif what == "readable by others":
        (desk / "cards/board-1").chmod(0o755)
    elif what == "another recipe":
        manifest = desk / "cards/board-1/manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "recipe": "0" * 16}))
    elif what == "damaged":
        with (desk / "some-os-lite.img.xz").open("ab") as file:
            file.write(b"!")
    elif what == "not to be read":
        (desk / "SHA256SUMS").write_bytes(b"\xff\xfe")
    elif what.endswith("in the way") or what.startswith("a link"):
        block(desk / "board-1.img", what)
    else:
        publish_another(desk, what)


def publish_another(desk, what):
    if what == "of no Raspberry Pi":
        publish(make_card(desk, {"cmdline.txt": "root=1"}))
    elif what == "no card":
        (desk / "card.img").unlink()
        (desk / "card.img").write_bytes(b"\0" * 600)
        publish(desk / "card.img")
    elif what == "a zip":
        (desk / "some-os-lite.img.xz").write_bytes(b"PK\x03\x04" + bytes(100))
    elif what == "cut short":
        cut_short(desk / "card.img")
    elif what == "without a command line":
        publish(make_card(desk, {"cmdline.txt": "\n", "config.txt": "arm_64bit=1\n"}))
    elif what == "full":
        card = make_card(desk)
        fill(card)
        publish(card)


def cut_short(card):
    content = card.read_bytes()[:-1]
    card.unlink()  # it is the one of all tests
    card.write_bytes(content)
    publish(card)


def block(output, what):
    if what == "a folder in the way":
        output.mkdir()
    elif what == "a file in the way":
        output.write_text("a thesis")
    else:
        output.symlink_to("SHA256SUMS" if what == "a link to the file of checksums" else "nowhere")


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        ("changed by hand", FROM_PUBLISHER, "bootfs/user-data: it was changed by hand"),
        (
            "readable by others",
            FROM_PUBLISHER,
            "chmod 700 cards/board-1; `testbed image check cards/board-1` shows all 1",
        ),
        ("another recipe", FROM_PUBLISHER, "another state of the recipe"),
        ("damaged", FROM_PUBLISHER, "is damaged, or it is not the publisher's file"),
        ("of no Raspberry Pi", FROM_PUBLISHER, "no FAT partition with cmdline.txt and config.txt"),
        ("no card", FROM_PUBLISHER, "no FAT partition with cmdline.txt and config.txt"),
        ("a zip", FROM_PUBLISHER, "expected an .img.xz or .img, and some-os-lite.img.xz is packed by zip: unpack it"),
        ("cut short", FROM_PUBLISHER, "some-os-lite.img.xz is cut short: its partitions end at"),
        ("without a command line", FROM_PUBLISHER, "its cmdline.txt has no words in its first line"),
        ("full", FROM_PUBLISHER, "cannot be written to the boot partition: Disk full"),
        ("not to be read", FROM_PUBLISHER, "--checksums: SHA256SUMS cannot be read: it is no text"),
        ("a folder in the way", FROM_PUBLISHER, "expected the name of a file"),
        ("a file in the way", FROM_PUBLISHER, "board-1.img is there already; name another file for the image"),
        ("a link to the file of checksums", FROM_PUBLISHER, "is the publisher's file of checksums; name another one"),
        ("a link that leads nowhere", FROM_PUBLISHER, "board-1.img is there already"),
        (None, (), "get it from https://www.raspberrypi.com/software/operating-systems/"),
        (None, ("--base", "nothing.img.xz"), "there is no file nothing.img.xz"),
        (None, ("--base", "some-os-lite.img.xz"), "there is nothing to compare some-os-lite.img.xz with"),
        (
            None,
            ("--base", "card.img", "--checksums", "SHA256SUMS"),
            "SHA256SUMS is the file of checksums of another-os.img.xz, some-os-lite.img.xz; get the publisher's",
        ),
        (None, (*FROM_PUBLISHER, "-o", "some-os-lite.img.xz"), "is the publisher's file; name another one"),
        (None, (*FROM_PUBLISHER, "-o", "SHA256SUMS"), "is the publisher's file of checksums; name another one"),
        (
            None,
            (*FROM_PUBLISHER, "-o", "cards/board-1/ssh_host_ed25519_key"),
            "holds the files that the image is made of",
        ),
        (None, (*FROM_PUBLISHER, "-o", "not/there.img"), "there is no folder not; make it, or name another one"),
    ],
)
def test_what_is_in_the_way_is_said_and_nothing_is_left(what, words, message, desk, build):
    if what is not None:
        spoil(desk, what)
    before = seen(desk)
    code, said = build(*words)
    assert code == 2
    assert message in said
    assert seen(desk) == before


@pytest.mark.parametrize(("thrown", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 2)])
def test_what_is_interrupted_leaves_nothing_and_takes_nothing(thrown, code, desk, build, monkeypatch):
    (desk / "board-1.img.part").write_text("of somebody")

    def write_none(self, name, content):
        raise thrown

    monkeypatch.setattr(boot_partition.BootPartition, "write", write_none)
    before = seen(desk)
    assert build(*FROM_PUBLISHER)[0] == code
    assert seen(desk) == before


def test_a_tool_that_is_lacking_is_named_with_its_package(desk, build, monkeypatch):
    monkeypatch.setenv("PATH", str(desk))
    code, said = build(*FROM_PUBLISHER)
    assert code == 2
    assert "apt install mtools" in said


def test_a_folder_that_was_not_rendered_is_refused(desk, build):
    code, said = build(*FROM_PUBLISHER, folder=".")
    assert code == 2
    assert "was not made by `testbed image render`" in said


def test_a_jetson_is_flashed(desk, build, monkeypatch):
    jetson = catalogue.images()["raspberry_pi_os_trixie"].model_copy(update={"kind": "jetson"})
    monkeypatch.setattr(catalogue, "named", lambda name: jetson)
    code, said = build()
    assert code == 2
    assert "run flash.sh of that folder on the machine that the board is connected to" in said


def test_each_recipe_is_built_by_its_module(desk, build, monkeypatch):
    """What builds a Debian image is a module of its own; any that has `build` will do."""
    rendered(desk / "cards/board-1", "debian_trixie")
    module = ModuleType("testbed.device_images.virtual_board")
    module.__spec__ = sys.__spec__
    module.build = lambda order, part, tell: (part.write_text(order.image.recipe), (f"made {order.output}",))[1]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    code, said = build()
    assert code == 0
    assert "made board-1.img" in said
    assert (desk / "board-1.img").read_text() == "debian"


def test_a_recipe_that_nothing_builds_is_told(desk, build, monkeypatch):
    other = catalogue.images()["debian_trixie"].model_copy(update={"recipe": "raspberry_pi_os_by_hand"})
    monkeypatch.setattr(catalogue, "named", lambda name: other)
    code, said = build()
    assert code == 2
    assert "cannot be built here; cards/board-1/README.txt says" in said


@pytest.mark.parametrize(
    "line",
    [
        "console=tty1 rootwait",
        "console=tty1 cgroup_enable=memory rootwait\n",
        "  console=tty1 quiet='a  b' \nnot read by the kernel\n",
        "xcgroup_enable=memory cgroup_enable=memory2\n",
    ],
)
def test_the_words_are_added_as_the_script_of_a_mounted_card_does_it(line, tmp_path):
    folder, card = rendered(tmp_path / "card"), tmp_path / "bootfs"
    card.mkdir()
    (card / "config.txt").touch()
    (card / "cmdline.txt").write_text(line)
    subprocess.run(["sh", folder / "apply.sh", card], check=True, capture_output=True)
    assert with_words(line, "cgroup_enable=memory\n") == (card / "cmdline.txt").read_text()
