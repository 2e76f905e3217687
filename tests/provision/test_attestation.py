"""What a board's image promises, judged from facts; and what was changed by hand since."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from testbed.device_images import catalogue
from testbed.device_images.render import IDENTITY, render
from testbed.provision.attestation import (
    PART,
    Attestation,
    AttestationFile,
    attest,
    drift,
    record,
    state_of,
)  # fmt: skip
from testbed.provision.part import Answer
from testbed.provision.step import Note, Problem
from testbed.provision.view import told
from testbed.provision.visit import READY, Outcome
from testbed.yaml_file import read_file
from tests.device_images.boards import GOLDEN
from tests.provision.tables import device_of, facts_of

BOARD = "generic_v2"
DEVICE = device_of(BOARD)
SSHD = {"passwords": "no", "keyboard": "no", "root": "no"}
IMAGE = {
    "name": "debian_trixie", "recipe": "12ab", "device": "it", "digest": "first", "packages": "0011",
    "files": {"/etc/x": "aa"}, "files_now": {"/etc/x": "aa"},
}  # fmt: skip


def facts(**differs):
    return facts_of(BOARD, {"image": IMAGE, "sshd": SSHD, "clock": {"synchronised": True}, **differs})


def said(found):
    return {each.name: each.holds for each in attest(found, DEVICE)}


def test_everything_holds_on_a_board_as_its_image_made_it():
    assert set(said(facts()).values()) == {True}
    assert Attestation().check(facts(), DEVICE) == Note("attestation", "debian_trixie: 7 of 7 hold")


SWAP = {"devices": [{"name": "/swapfile", "bytes": 1 << 30}], "bytes": 1 << 30, "sources": []}


@pytest.mark.parametrize(
    ("differs", "broken", "words"),
    [
        ({"memory_cgroup": {"version": "v1"}}, "memory_cgroup", "memory_cgroup is v1, not v2"),
        ({"memory_cgroup": {"version": None}}, "memory_cgroup", "memory_cgroup is off, not v2"),
        ({"swap": SWAP}, "swap", "swap is /swapfile (1 GiB), not none"),
        ({"clock": {"synchronised": False}}, "clock", "clock is not synchronised, not synchronised"),
        ({"sshd": {**SSHD, "passwords": "yes"}}, "password_login", "password_login is allowed, not refused"),
        ({"sshd": {**SSHD, "keyboard": "yes"}}, "password_login", "password_login is allowed, not refused"),
        ({"sshd": {**SSHD, "root": "prohibit-password"}}, "root_login", "root_login is allowed, not refused"),
        ({"board": {"desktop": True}}, "desktop", "desktop is running, not none"),
        ({"image": {**IMAGE, "files_now": {"/etc/x": "bb"}}}, "files", "files is changed: /etc/x, not unchanged"),
        ({"image": {**IMAGE, "files_now": {"/etc/x": None}}}, "files", "files is changed: /etc/x, not unchanged"),
    ],
)
def test_what_does_not_hold_is_a_problem_with_what_was_found(differs, broken, words):
    found = facts(**differs)
    assert [name for name, holds in said(found).items() if holds is False] == [broken]
    problem = Attestation().check(found, DEVICE)
    assert isinstance(problem, Problem)
    assert words in problem.text


def test_what_cannot_be_told_neither_holds_nor_fails():
    found = facts(sshd={"passwords": None, "keyboard": "no", "root": None})
    assert [name for name, holds in said(found).items() if holds is None] == ["password_login", "root_login"]
    note = Attestation().check(found, DEVICE)
    assert isinstance(note, Note)
    assert "password_login, root_login cannot be told" in note.text


@pytest.mark.parametrize("image", [None, {**IMAGE, "name": "of another lab"}])
def test_a_board_of_another_origin_is_not_attested(image):
    found = facts(image=None) if image is None else facts(image=image)
    assert Attestation().check(found, DEVICE) is None
    assert record(None, found, DEVICE, (), accept=False) is None


def test_every_recipe_has_its_list():
    for image in catalogue.images().values():
        path = catalogue.folder() / image.recipe / "attestation.yaml"
        assert read_file(path, AttestationFile, "an attestation").assertions


# ── drift ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def visit(stored, first, last=None, *, accept=False):
    """One visit: the drift that it found at its beginning, and the sheet that it leaves."""
    drifted = drift(stored, first, DEVICE)
    return drifted, {"attestation": record(stored, last or first, DEVICE, drifted, accept=accept)}


def test_what_was_changed_by_hand_is_told_until_it_is_mended():
    drifted, sheet = visit(None, facts())
    assert drifted == ()
    by_hand = facts(image={**IMAGE, "packages": "2233"})
    for _ in range(2):
        drifted, sheet = visit(sheet, by_hand)
        assert [(each.what, each.was, each.now) for each in drifted] == [("list of packages", "0011", "2233")]
        assert sheet["attestation"]["drift"]
    drifted, sheet = visit(sheet, facts())
    assert drifted == ()
    assert sheet["attestation"]["drift"] == []


def test_what_a_visit_changes_itself_is_no_drift():
    _, sheet = visit(None, facts(), last=facts(image={**IMAGE, "packages": "4455"}))
    assert visit(sheet, facts(image={**IMAGE, "packages": "4455"}))[0] == ()


def test_what_a_visit_mends_was_drift_and_is_none_any_more():
    _, sheet = visit(None, facts())
    drifted, sheet = visit(sheet, facts(swap=SWAP), last=facts())
    assert [each.what for each in drifted] == ["swap"]
    assert sheet["attestation"]["drift"] == []
    assert visit(sheet, facts())[0] == ()


def test_what_is_accepted_is_told_no_more():
    _, sheet = visit(None, facts())
    _, sheet = visit(sheet, facts(boot={"command_line": "quiet"}), accept=True)
    assert visit(sheet, facts(boot={"command_line": "quiet"}))[0] == ()
    assert visit(sheet, facts())[0]


def test_a_board_that_was_made_anew_has_not_drifted():
    _, sheet = visit(None, facts())
    assert visit(sheet, facts(image={**IMAGE, "digest": "second", "packages": "6677"}))[0] == ()


def test_a_clock_that_comes_and_goes_is_no_drift():
    assert "clock" not in state_of(facts(), DEVICE)


def test_drift_is_told_with_what_it_was():
    _, sheet = visit(None, facts())
    drifted, _ = visit(sheet, facts(swap=SWAP))
    assert "  drifted: swap: none → /swapfile (1 GiB)" in told([Outcome("it", READY, drift=drifted)], verbose=False)


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
INCLUDE = "Include /etc/ssh/sshd_config.d/*.conf"


def sshd(main, **drop_ins):
    files = {"/etc/ssh/sshd_config": main}
    files |= {f"/etc/ssh/sshd_config.d/{name}.conf": text for name, text in drop_ins.items()}
    return PART.parse(Answer(files))["sshd"]


@pytest.mark.parametrize(
    ("found", "passwords"),
    [
        (sshd("Port 22"), "yes"),
        (sshd("PasswordAuthentication no"), "no"),
        (sshd("passwordauthentication=No"), "no"),
        (sshd("#PasswordAuthentication no"), "yes"),
        (sshd(f"{INCLUDE}\nPasswordAuthentication yes", a="PasswordAuthentication no"), "no"),
        (sshd(f"PasswordAuthentication yes\n{INCLUDE}", a="PasswordAuthentication no"), "yes"),
        (sshd("PasswordAuthentication yes", a="PasswordAuthentication no"), "yes"),  # nobody includes it
        (sshd(INCLUDE, b="PasswordAuthentication yes", a="PasswordAuthentication no"), "no"),
        (sshd("PasswordAuthentication no\nMatch User eve\nPasswordAuthentication yes"), None),
        (PART.parse(Answer({}))["sshd"], None),
    ],
)  # fmt: skip
def test_what_sshd_lets_in_is_read_as_sshd_reads_it(found, passwords):
    assert found["passwords"] == passwords


def test_a_board_tells_its_image_and_the_files_that_are_not_as_they_came(tmp_path):
    """The script itself, on files of a real rendering, one changed and one gone."""
    files = {file.path: file.text for file in render(GOLDEN["debian_trixie"]())}
    written = yaml.safe_load(files["seed/user-data"])["write_files"]
    for each in written:
        path = tmp_path / each["path"][1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(each["content"].replace('"/etc/', f'"{tmp_path}/etc/'))
    changed, gone, *_ = [tmp_path / each["path"][1:] for each in written if each["path"] != IDENTITY]
    changed.write_text("PasswordAuthentication yes\n")
    gone.unlink()
    text = (tmp_path / IDENTITY[1:]).read_text()
    script = PART.script.replace(IDENTITY, str(tmp_path / IDENTITY[1:]))
    ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    image = PART.parse(Answer({IDENTITY: text}, ran.stdout))["image"]
    assert image["name"] == json.loads(text)["image"]
    assert set(image["files_now"]) == set(image["files"])
    assert image["files_now"][str(gone)] is None
    assert image["files_now"][str(changed)] == hashlib.sha256(changed.read_bytes()).hexdigest()
    assert Path(str(changed)).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"image": "debian_trixie"}'])
def test_what_is_no_identity_is_none(text):
    assert PART.parse(Answer({IDENTITY: text}))["image"] is None
