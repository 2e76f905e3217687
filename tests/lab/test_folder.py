"""A folder without the mark of a lab is somebody's own: nothing in it is overwritten or removed."""

import pytest

from testbed.cli import main
from testbed.device_images import debian
from testbed.errors import LabError
from testbed.lab import lab as namespaces
from testbed.lab.folder import INVENTORY, KEY, LAB_FILE, PROFILES, claim, expect_free, has_lab, remove_files
from testbed.lab.machines import lab as machines
from testbed.lab.machines.lab import MachineLab, MachineWish
from testbed.lab.opened import open_lab, take_down

KINDS = pytest.mark.parametrize("kind", [[], ["--vm"]], ids=["namespaces", "machines"])
NAMES = (INVENTORY, KEY, f"{KEY}.pub", "known_hosts", "hosts/etc", f"{PROFILES}/mine.yaml")


@pytest.fixture
def own(tmp_path):
    """A user's folder, whose files are called like a lab's."""
    folder = tmp_path / "own"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.fixture
def without_image(monkeypatch):
    """Everything is there to make virtual machines; the image is the first thing that is asked for."""
    monkeypatch.setattr(machines, "check_machine", lambda architecture: None)

    def build(architecture, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(debian, "build", build)


def untouched(folder):
    return all((folder / name).read_text() == "mine" for name in NAMES)


@pytest.mark.parametrize("text", [None, "[]", '{"benches": 3}'])
def test_down_removes_nothing_where_there_never_was_a_lab(own, text, capsys):
    if text is not None:  # not every lab.json is ours
        (own / LAB_FILE).write_text(text)
    with pytest.raises(LabError, match="there is no lab"):
        open_lab(own)
    assert main(["lab", "down", "--folder", str(own)]) == 1
    assert f"there is no lab in {own}" in capsys.readouterr().err
    for kind in (namespaces, machines):
        with pytest.raises(LabError, match="there is no lab"):
            kind.take_down(own)
    assert untouched(own)
    assert text is None or (own / LAB_FILE).read_text() == text


@KINDS
def test_up_refuses_a_folder_with_other_files(own, kind, without_image, capsys):
    assert main(["lab", "up", *kind, "--folder", str(own)]) == 1
    assert f"{own} holds other files (hosts, id_ed25519, id_ed25519.pub, …) and no lab" in capsys.readouterr().err
    assert untouched(own)


@KINDS
@pytest.mark.parametrize("below", ["", "/lab"])
def test_up_refuses_a_file(tmp_path, kind, below, without_image, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["lab", "up", *kind, "--folder", f"{file}{below}"]) == 2
    assert f"--folder: expected a folder, {file} is a file" in capsys.readouterr().err
    assert file.read_text() == "mine"


@KINDS
def test_up_refuses_a_folder_with_a_lab_whatever_kind_it_is_of(tmp_path, kind, without_image, capsys):
    claim(tmp_path / "lab", "")
    assert main(["lab", "up", *kind, "--folder", str(tmp_path / "lab")]) == 1
    assert f"there is a lab in {tmp_path}/lab; see" in capsys.readouterr().err
    assert has_lab(tmp_path / "lab")


def test_no_lab_is_in_a_file(tmp_path):
    (tmp_path / "file").touch()
    for do in (open_lab, take_down):
        with pytest.raises(LabError, match="there is no lab in"):
            do(tmp_path / "file")


def test_an_up_that_is_interrupted_while_the_image_is_made_leaves_nothing(tmp_path, without_image):
    with pytest.raises(KeyboardInterrupt):
        MachineLab.up(tmp_path / "lab", MachineWish())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"made_of": "virtual machines"}\n', '{"id": "0123'])
def test_a_lab_whose_making_was_cut_short_is_removed(own, text, tmp_path):
    """The mark comes first, so it is there whatever else is."""
    (own / LAB_FILE).write_text(text)
    with pytest.raises(LabError, match="is not a lab's, or not yet"):
        open_lab(own)
    machines.take_down(own)
    assert list(tmp_path.iterdir()) == []


def test_the_mark_is_the_last_that_goes(own, monkeypatch):
    claim(own, "")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        with pytest.raises(LabError, match=f"{own}/hosts: Permission denied"):
            remove_files(own)
    assert has_lab(own)
    remove_files(own)
    assert not own.exists()


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "new" / "lab"
    expect_free(folder)
    claim(folder, "first")
    with pytest.raises(LabError, match="another `testbed lab up`"):
        claim(folder, "")
    assert (folder / LAB_FILE).read_text() == "first"


def test_what_lives_is_ended_and_files_without_the_mark_stay(own, monkeypatch):
    """The mark was removed by hand while machines run."""
    ended = []
    monkeypatch.setattr(machines, "machines_of", lambda folder: [4711])
    monkeypatch.setattr(machines, "_end_processes", ended.append)
    machines.take_down(own)
    assert ended == [own]
    assert untouched(own)
