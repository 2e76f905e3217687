"""Boards that a run must keep away from, on a virtual lab: refused with the way out, and nothing was done there."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from tests.lab_runs import BOARDS, ORIN, PI5, Desk, advises, console, files_of, logins, ours
from tests.virtual_lab import wait_rebooted

pytestmark = [pytest.mark.slow, pytest.mark.lab, pytest.mark.usefixtures("boards_put_right")]


class Untouched:
    """Sees to it that on hosts no file has changed, nothing is at work and, but for `let_in`, nobody has logged in."""

    def __init__(self, study, *names, let_in=False):
        self.hosts = [study.lab.host(name) for name in names]
        self._let_in = let_in

    def __enter__(self):
        self._files, self._logins = [files_of(host) for host in self.hosts], [logins(host) for host in self.hosts]
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        for host, files, before in zip(self.hosts, self._files, self._logins, strict=True):
            assert changed(host, files) == set()
            assert ours(host) == []
            assert self._let_in or logins(host) == before


def changed(host, before):
    """The files that are other ones than before."""
    now = files_of(host)
    return {path for path in {*now, *before} if now.get(path) != before.get(path)}


def strangers(study, name):
    """… whose user has a known_hosts file of its own, with every board's key but that of one."""
    known = study.lab.folder / "known_hosts"
    lines = [line for line in known.read_text().splitlines(keepends=True) if not line.startswith(f"{name},")]
    mine = known.with_name("strangers")
    mine.write_text("".join(lines))
    return study.variant("strangers", study.lab.ssh_config.read_text().replace(str(known), str(mine)))


def refusals(study, inventory, name):
    """What provision, run-method and deploy say of one board, where each must refuse."""
    only = ("--only", name)
    commands = [
        ("provision", "--inventory", inventory, *only),
        ("run-method", "fedpruner", *study.words("refused", *only, inventory=inventory)),
        ("deploy", "fedpruner", *study.words(None, *only, inventory=inventory)),
    ]
    return [study.desk.testbed(*command, code=1).text for command in commands]


# ── who they are ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_unknown_host_key_is_refused_until_it_is_trusted(study):
    inventory = strangers(study, PI5)
    with Untouched(study, PI5):
        for said in refusals(study, inventory, PI5):
            assert "is not known: ED25519 SHA256:" in said
            assert "Nothing was executed there." in said
            assert advises(said, f"trust {PI5}")
        asked = study.desk.testbed("trust", PI5, "--inventory", inventory, code=2).text
        assert "compare them and give --yes" in asked
    study.desk.testbed("trust", PI5, "--inventory", inventory, "--yes")
    study.desk.testbed("status", "--inventory", inventory, "--only", PI5)


@pytest.fixture
def new_key(study):
    """A board that was installed anew: it has another host key."""
    host, key = study.lab.host(PI5), "/etc/ssh/ssh_host_ed25519_key"

    def restart(script):
        boots = host.state().boots
        console(host, script)
        host.reboot()
        wait_rebooted(host, boots)

    restart(f"mv {key} {key}.old && mv {key}.pub {key}.old.pub && ssh-keygen -q -t ed25519 -N '' -f {key}")
    yield
    restart(f"mv {key}.old {key} && mv {key}.old.pub {key}.pub")


@pytest.mark.usefixtures("new_key")
def test_a_changed_host_key_is_refused_until_it_is_trusted(study):
    inventory = strangers(study, ORIN)
    with Untouched(study, PI5):
        for said in refusals(study, inventory, PI5):
            assert "has CHANGED" in said
            assert "Nothing was executed there." in said
            assert advises(said, f"trust {PI5}")
    study.desk.testbed("trust", PI5, "--inventory", inventory, "--yes")
    study.desk.testbed("status", "--inventory", inventory, "--only", PI5)


def test_a_key_that_the_board_refuses_is_named_with_what_would_help(study):
    key = study.lab.folder / "another_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, stdin=subprocess.DEVNULL)
    settings = study.lab.ssh_config.read_text().replace(str(study.lab.folder / "id_ed25519"), str(key))
    with Untouched(study, PI5):
        for said in refusals(study, study.variant("another", settings), PI5):
            assert "refused every key" in said
            assert str(key) in said
            assert f"ssh-copy-id {PI5}" in said


def test_another_board_behind_an_address_is_left_alone(study):
    """The two have changed their addresses, and the user's configuration has not."""
    settings = study.lab.ssh_config.read_text()
    orin, pi5 = (study.lab.host(name).address for name in (ORIN, PI5))
    swapped = settings.replace(f"HostName {orin}\n", "HostName there\n").replace(
        f"HostName {pi5}\n", f"HostName {orin}\n"
    )
    inventory = study.variant("swapped", swapped.replace("HostName there\n", f"HostName {pi5}\n"))
    with Untouched(study, ORIN, PI5, let_in=True):
        provision, run, deploy = refusals(study, inventory, PI5)
    for said in (run, deploy):
        assert f"device {PI5}: behind its address is NVIDIA Jetson Orin Nano" in said
        assert advises(said, f"provision --only {PI5}")
    assert "profile raspberry_pi_5_8gb is raspberrypi,5-model-b in the device tree" in provision
    assert "nothing was changed there: correct host or profile in the inventory" in provision


def test_a_board_of_another_name_in_the_inventory_has_to_be_made_ready_first(study):
    content = yaml.safe_load(study.inventory.read_text())
    content["devices"][ORIN]["host"], content["devices"][PI5]["host"] = PI5, ORIN
    inventory = study.write_inventory("renamed.yaml", content)
    words = study.words("refused", "--only", PI5, inventory=inventory)
    with Untouched(study, *BOARDS):
        said = study.desk.testbed("run-method", "fedpruner", *words, code=1).text
    assert advises(said, f"provision --only {PI5}")


# ── what they allow ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_where_sudo_is_refused_the_right_and_the_command_are_named(study, tmp_path):
    """The user `tester` may log in, and nothing more."""
    desk = Desk(tmp_path)  # whose fact sheets nobody else needs
    desk.variables["TESTBED_CACHE"] = study.desk.variables["TESTBED_CACHE"]
    inventory = study.variant("tester", study.lab.ssh_config.read_text(), user="tester")
    host = study.lab.host(PI5)
    before = files_of(host)
    said = desk.testbed("provision", "--inventory", inventory, "--only", PI5, "--no-environment", code=1).text
    assert "delegation: tester cannot cap memory" in said
    assert "that needs root" in said
    assert "sudo refuses" in said
    assert "let an administrator run" in said
    assert "chown tester /sys/fs/cgroup/memory/edge-testbed-tester" in said
    assert all(path.startswith("home/tester") for path in changed(host, before))
    words = study.words(None, "--only", PI5, "--runs", tmp_path / "runs", inventory=inventory)
    said = desk.testbed("run-method", "fedpruner", *words, code=1).text
    assert advises(said, f"provision --only {PI5}")
