"""A real OpenSSH server on 127.0.0.1 for the tests: its own port, host key, authorized key, home and known hosts.

    with SshServer(tmp_path) as server:
        connection = connect("board", server.access)

Run as root it has a mount namespace with its own /etc/passwd, so that the user, the login shell and the rights to
sudo are the test's choice; run as somebody else it serves that user with the user's own shell.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from testbed.inventory import Access

ALIAS = "board"
USER_ID = 64242  # of the user that exists in the server's own /etc/passwd only
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")


def why_no_sshd() -> str | None:
    return None if SSHD else "there is no OpenSSH server on this machine (Debian, Ubuntu: openssh-server)"


def need_sshd() -> None:
    """Skip the test where no server is installed; in CI that is a failure."""
    if reason := why_no_sshd():
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def need_root() -> None:
    """For what only root can arrange: another login shell, another user, sudo."""
    if os.geteuid() != 0:
        pytest.skip("a login shell, user or sudo of the test's choice needs root")


def new_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", path], check=True)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class SshServer:
    """`access` reaches it; `folder` holds ssh_config, known_hosts, id_ed25519 and the user's home."""

    def __init__(
        self,
        folder: Path,
        *,
        shell: str | None = None,  # the login shell (root only)
        user: str | None = None,  # log in as this new user without rights, instead of who runs the tests (root only)
        sudo: bool = False,  # … who may use sudo without a password
        sftp: bool = False,
        passwords: bool = False,
        alias: str = ALIAS,
        become: bool = True,
        options: str = "",  # more lines of sshd_config
    ) -> None:
        need_sshd()
        if shell or user:
            need_root()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.alias = alias
        self.port = free_port()
        self.user = user or pwd.getpwuid(os.geteuid()).pw_name
        # pytest's folders are closed to others, so a user of its own lives elsewhere
        self.home = Path(tempfile.mkdtemp(prefix="testbed-home-")) if user else folder / "home"
        self.ssh_config = folder / "ssh_config"
        self.known_hosts = folder / "known_hosts"
        self.identity = folder / "id_ed25519"
        self.host_key = folder / "host_ed25519"
        self.log = folder / "sshd.log"
        self.access = Access(host=alias, ssh_config=str(self.ssh_config), become=become)
        self._shell, self._new_user, self._sudo, self._options = shell, user, sudo, options
        self._sftp, self._passwords = sftp, passwords
        self._process: subprocess.Popen[bytes] | None = None
        self._write()

    def _write(self) -> None:
        self.home.mkdir(exist_ok=True)
        new_key(self.identity)
        new_key(self.host_key)
        (self.home / ".ssh").mkdir(exist_ok=True)
        shutil.copyfile(self.identity.with_suffix(".pub"), self.home / ".ssh/authorized_keys")
        self.trust()
        self.ssh_config.write_text(self.client_config(), encoding="utf-8")
        self._write_server_config()
        if os.geteuid() == 0:
            self._write_accounts()

    def client_config(self, **more: str) -> str:
        """The `Host` block for the user's side."""
        settings = {
            "HostName": "127.0.0.1",
            "Port": str(self.port),
            "User": self.user,
            "IdentityFile": str(self.identity),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            **more,
        }
        return f"Host {self.alias}\n" + "".join(f"  {key} {value}\n" for key, value in settings.items())

    def trust(self) -> None:
        """Write the server's host key to known_hosts."""
        key = self.host_key.with_suffix(".pub").read_text(encoding="utf-8").split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key[0]} {key[1]}\n", encoding="utf-8")

    def change_host_key(self) -> None:
        """From the next start on; the user does not know it yet."""
        for path in (self.host_key, self.host_key.with_suffix(".pub")):
            path.unlink()
        new_key(self.host_key)

    def _write_server_config(self) -> None:
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.home / '.ssh/authorized_keys'}",
            f"PidFile {self.folder / 'sshd.pid'}",
            f"SetEnv HOME={self.home}",
            "AllowAgentForwarding no",
            "KbdInteractiveAuthentication no",
            f"PasswordAuthentication {'yes' if self._passwords else 'no'}",
            "PermitRootLogin yes",
            "PrintMotd no",
            "StrictModes no",
            "UseDNS no",
            f"UsePAM {'no' if os.geteuid() == 0 else 'yes'}",  # only root can see that an account is not locked
            *(["Subsystem sftp internal-sftp"] if self._sftp else []),
            self._options,
        ]
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _write_accounts(self) -> None:
        lines = [line.split(":") for line in Path("/etc/passwd").read_text(encoding="utf-8").splitlines()]
        shell = self._shell or "/bin/sh"
        if self._new_user:
            lines.append([self._new_user, "*", str(USER_ID), str(USER_ID), "", str(self.home), shell])
            os.chown(self.home, USER_ID, USER_ID)
        for line in lines:
            if line[0] == self.user:
                line[5:] = [str(self.home), self._shell or line[6]]
        (self.folder / "passwd").write_text("".join(":".join(line) + "\n" for line in lines), encoding="utf-8")
        sudoers = "root ALL=(ALL:ALL) NOPASSWD: ALL\n"
        if self._new_user and self._sudo:
            sudoers += f"{self._new_user} ALL=(ALL:ALL) NOPASSWD: ALL\n"
        (self.folder / "sudoers").write_text(sudoers, encoding="utf-8")
        (self.folder / "sudoers").chmod(0o440)

    def _command(self) -> list[str]:
        sshd = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if os.geteuid() != 0:
            return sshd
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        script = 'cd "$1" && shift && mount --bind passwd /etc/passwd && '
        script += '{ test ! -e /etc/sudoers || mount --bind sudoers /etc/sudoers; } && exec "$@"'
        return ["unshare", "-m", "sh", "-c", script, "sh", str(self.folder), *sshd]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._new_user:
            shutil.rmtree(self.home, ignore_errors=True)

    def start(self) -> None:
        """On the same port as ever; returns when it accepts connections."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 10
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"sshd did not start: {self.log.read_text(errors='replace')}", pytrace=False)
            time.sleep(0.01)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
            return probe.recv(4) == b"SSH-"
        return False

    def stop(self) -> None:
        """End the server and every connection to it; what a user started detached lives on."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait(10)
        self._process = None

    def freeze(self) -> None:
        """The server and its connections stand still: nothing answers, nothing is refused."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        for pid in _server_processes(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _server_processes(pid: int) -> list[int]:
    """The server and its connections, parents first; not what users run."""
    found = [pid]
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        for child in map(int, children):
            if Path(f"/proc/{child}/comm").read_text(encoding="utf-8").startswith("sshd"):
                found += _server_processes(child)
    return found
