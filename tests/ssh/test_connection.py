"""Commands on a device over SSH, against a real OpenSSH server: shells, ends, time limits, root."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import DeviceError, RightError
from testbed.ssh import SshConnection, connect
from tests.ssh_server import SshServer, need_root

pytestmark = pytest.mark.sshd

NOISE = "Welcome to board!  printf '%s\\n' <- not a command"


@contextlib.contextmanager
def connected(server: SshServer) -> Iterator[SshConnection]:
    connection = connect("board", server.access)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with SshServer(tmp_path_factory.mktemp("ssh") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def board(server):
    with connected(server) as connection:
        yield connection


def processes(words: str) -> list[int]:
    """Those whose command line is exactly this."""
    wanted = words.replace(" ", "\0").encode() + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes() == wanted:
                found.append(int(path.parent.name))
    return found


def wait_until(holds, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


# Commands


def test_arguments_arrive_as_they_are(board, server):
    words = ["it's", 'a "word"', "$HOME `id` \\ !x", "", "two\nlines", "*", "-n"]
    shown = board.run(["/usr/bin/env", "printf", "<%s>", *words])
    assert shown == "".join(f"<{word}>" for word in words)


def test_a_tilde_is_the_home_of_the_login_user(board, server):
    assert board.run(["printf", "%s|%s", "~/x y", "a~/b"]) == f"{server.home}/x y|a~/b"


def test_a_command_that_may_fail_answers_with_its_exit_code_and_both_outputs(board):
    ran = board.attempt(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (ran.exit_code, ran.output, ran.errors) == (3, "out\n", "err\n")


def test_a_command_that_must_not_fail_says_what_it_said(board):
    with pytest.raises(DeviceError, match=r"board: sh -c .*: exit code 3: no such thing"):
        board.run(["sh", "-c", "echo no such thing >&2; exit 3"])


def test_a_command_that_is_not_there(board):
    with pytest.raises(DeviceError, match=r"exit code 127: .*no-such-command"):
        board.run(["no-such-command"])


def test_a_command_killed_by_a_signal_is_no_timeout(board):
    assert board.attempt(["sh", "-c", "kill -KILL $$"]).exit_code == 128 + 9


def test_input_and_output_may_both_be_large(board):
    data = os.urandom(1 << 20).hex().encode()
    assert board.run(["cat"], data=data) == data.decode()


def test_much_on_standard_error_does_not_stop_a_command(board):
    ran = board.attempt(["sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' e >&2; echo done"])
    assert ran.output == "done\n"
    assert ran.errors.endswith("eee")


def test_input_that_is_not_read_is_no_error(board):
    assert board.run(["true"], data=b"x" * 5_000_000) == ""


def test_a_command_too_long_for_a_line_is_refused(board):
    with pytest.raises(DeviceError, match="too long for one line"):
        board.run(["echo", "x" * 100_000])


def test_what_a_command_leaves_behind_does_not_hold_it_up(board):
    out = board.run(["sh", "-c", "sleep 61234 & echo $!"], patience_seconds=30)
    os.kill(int(out), 0)  # it lives on
    os.kill(int(out), 9)


def test_many_threads_at_once(board):
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(board.run(["sh", "-c", f"sleep 0.1; echo {n}"])))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, answers)) == list(range(20))


def test_missing_is_one_question(board, server):
    (server.home / "with blank").touch()
    asked = [Path("~/with blank"), Path("~/not there"), Path("/etc/passwd"), Path("/not there")]
    assert board.missing(asked) == [asked[1], asked[3]]
    assert board.missing([]) == []


# Time limits


def test_a_command_that_takes_too_long_is_ended_there(board):
    with pytest.raises(DeviceError, match=r"board: sleep 61001: no end after 0.2 s; it was ended there"):
        board.run(["sleep", "61001"], patience_seconds=0.2)
    assert processes("sleep 61001") == []


def test_so_are_its_children_though_they_will_not_listen(board):
    with pytest.raises(DeviceError, match="it was ended there"):
        board.run(["sh", "-c", "(trap '' TERM; sleep 61002) & sleep 61003"], patience_seconds=0.2)
    assert processes("sleep 61002") == processes("sleep 61003") == []


def test_the_device_ends_it_though_the_connection_is_gone(server):
    with connected(server) as board:
        thread = threading.Thread(target=lambda: _ignore(board, ["sleep", "61004"], 1.0))
        thread.start()
        assert wait_until(lambda: processes("sleep 61004"))
        board.close()
        thread.join()
    assert wait_until(lambda: not processes("sleep 61004"))


def _ignore(board: SshConnection, command: list[str], patience_seconds: float) -> None:
    with contextlib.suppress(DeviceError):
        board.run(command, patience_seconds)


def test_a_connection_that_breaks_ends_the_waiting(tmp_path):
    with SshServer(tmp_path / "server") as server, connected(server) as board:
        timer = threading.Thread(target=lambda: (wait_until(lambda: processes("sleep 61005")), server.stop()))
        timer.start()
        with pytest.raises(DeviceError, match=r"board: the connection to 127.0.0.1 port \d+ is lost"):
            board.run(["sleep", "61005"], patience_seconds=2)
        timer.join()
        assert not board.alive
        with pytest.raises(DeviceError, match="is lost"):
            board.run(["true"])


def test_a_machine_that_stands_still_is_given_up(tmp_path):
    with SshServer(tmp_path / "server") as server:
        server.ssh_config.write_text(
            server.client_config(ServerAliveInterval="1", ServerAliveCountMax="1"), encoding="utf-8"
        )
        with connected(server) as board:
            server.freeze()
            with pytest.raises(DeviceError, match="has not answered for 1 s"):
                board.run(["true"], patience_seconds=600)
            server.thaw()


def test_a_silent_machine_that_answers_is_kept(tmp_path):
    with SshServer(tmp_path / "server") as server:
        server.ssh_config.write_text(
            server.client_config(ServerAliveInterval="1", ServerAliveCountMax="2"), encoding="utf-8"
        )
        with connected(server) as board:
            assert board.run(["sh", "-c", "sleep 4; echo still here"]) == "still here\n"


# Login shells


SHELLS = {
    "bash": (".bashrc", f"echo \"{NOISE}\"; echo warning >&2; cd /; PATH=/nowhere; printf 'no line end'\n"),
    "dash": (".profile", ""),  # reads nothing here
    "zsh": (".zshenv", f"echo '{NOISE[:17]}'; echo warning >&2; cd /; path=(/nowhere)\n"),
    "fish": (".config/fish/config.fish", f'echo "{NOISE}"; echo warning >&2; cd /; set -x PATH /nowhere\n'),
    "tcsh": (".cshrc", f"echo '{NOISE[:17]}'; cd /; setenv PATH /nowhere\n"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_depends_on_the_login_shell(tmp_path, shell):
    path = shutil.which(shell) or (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{shell} is not installed")
    with SshServer(tmp_path / "server", shell=path) as server:
        name, text = SHELLS[shell]
        (server.home / name).parent.mkdir(parents=True, exist_ok=True)
        (server.home / name).write_text(text, encoding="utf-8")
        _use_every_verb(server, tmp_path)


def test_nor_on_one_that_stays_and_is_slow_and_loud(tmp_path):
    loud = tmp_path / "loud-shell"
    loud.write_text(
        f'#!/bin/sh\nsleep 0.5; echo "{NOISE}"; echo warning >&2; PATH=/nowhere; cd /; /bin/sh "$@"\ncode=$?\n'
        "echo goodbye >&2; exit $code\n",
        encoding="utf-8",
    )
    loud.chmod(0o755)
    with SshServer(tmp_path / "server", shell=str(loud)) as server:
        _use_every_verb(server, tmp_path, last_words="goodbye\n")


def _use_every_verb(server: SshServer, folder: Path, last_words: str = "") -> None:
    source, back = folder / "source", folder / "back"
    source.write_bytes(os.urandom(300_000))
    with connected(server) as board:
        ran = board.attempt(["sh", "-c", "pwd; cat; echo err >&2; exit 5"], data=b"input")
        assert (ran.exit_code, ran.output, ran.errors) == (5, f"{server.home}\ninput", f"err\n{last_words}")
        assert board.missing([Path("~/content/x")]) == [Path("~/content/x")]
        assert board.put(source, Path("~/content/x")) == 300_000
        board.get(Path("~/content/x"), back)
        assert back.read_bytes() == source.read_bytes()
        with board.open_channel(["cat"]) as channel:
            channel.sendall(b"there and back")
            assert channel.recv(100) == b"there and back"
        with pytest.raises(DeviceError, match="it was ended there"):
            board.run(["sleep", "61006"], patience_seconds=0.2)
        assert processes("sleep 61006") == []


def test_an_account_that_may_not_run_commands(tmp_path):
    need_root()
    refused = pytest.raises(DeviceError, match=r"login shell of root ended before .*: This account is currently")
    with SshServer(tmp_path / "server", shell="/usr/sbin/nologin") as server, connected(server) as board, refused:
        board.run(["true"])


# Root


@pytest.fixture(scope="module")
def with_sudo(tmp_path_factory):
    need_root()
    with SshServer(tmp_path_factory.mktemp("sudo") / "server", user="ann", sudo=True) as server:
        yield server


@pytest.fixture
def without_sudo(tmp_path):
    need_root()
    with SshServer(tmp_path / "server", user="ann") as server:
        yield server


def test_a_command_becomes_root_only_where_asked(with_sudo):
    with connected(with_sudo) as board:
        assert board.run(["id", "-un"]) == "ann\n"
        ran = board.attempt(["sh", "-c", 'id -un; echo "$0"; cat; exit 4', "~/x"], data=b"input", become=True)
        assert (ran.exit_code, ran.output, ran.errors) == (4, f"root\n{with_sudo.home}/x\ninput", "")


def test_a_umask_of_the_user_is_not_that_of_what_is_made(with_sudo):
    (with_sudo.home / ".bashrc").write_text("umask 077\n", encoding="utf-8")
    with connected(with_sudo) as board:
        for become in (False, True):
            made = ["sh", "-c", 'rm -rf "$0"; mkdir "$0"; stat -c %a "$0"; rm -r "$0"', "~/made"]
            assert board.run(made, become=become) == "755\n"
        with board.open_channel(["sh", "-c", "umask"]) as channel:
            assert channel.recv(100) == b"0022\n"
    (with_sudo.home / ".bashrc").unlink()


def test_a_command_of_root_is_ended_there_too(with_sudo):
    with connected(with_sudo) as board, pytest.raises(DeviceError, match="it was ended there"):
        board.run(["sleep", "61007"], patience_seconds=0.2, become=True)
    assert processes("sleep 61007") == []


def test_refused_sudo_names_the_command(without_sudo):
    with connected(without_sudo) as board:
        with pytest.raises(
            RightError, match=r"`nvpmodel -m 0` needs root, and sudo refuses \(a password is required\)"
        ):
            board.run(["nvpmodel", "-m", "0"], become=True)
        with pytest.raises(RightError):
            board.attempt(["false"], become=True)


def test_become_false_is_respected_though_sudo_would_work(tmp_path):
    need_root()
    refused = pytest.raises(RightError, match="`id` needs root, and the inventory says `become: false`")
    server = SshServer(tmp_path / "server", user="ann", sudo=True, become=False)
    with server, connected(server) as board, refused:
        board.run(["id"], become=True)


def test_root_needs_no_sudo(tmp_path):
    need_root()
    with SshServer(tmp_path / "server", become=False) as server, connected(server) as board:
        assert board.run(["id", "-u"], become=True) == "0\n"
