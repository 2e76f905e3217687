"""A host's disk as it is before the first boot: what of its root differs from this machine's.

Written to the upper layer of an overlay whose lower layer is this machine's root: users, SSH server, sudo, names, the
persona's files.  What is personal on this machine is hidden: homes, keys, root's own.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import LabError
from testbed.lab.view import make_opaque

if TYPE_CHECKING:
    from testbed.lab.persona import Face
    from testbed.lab.spec import HostSpec, LabSpec

#: Who may log in, with the lab's key: one with passwordless sudo, one without any.
ADMIN, TESTER = "admin", "tester"
_USERS = {ADMIN: 1000, TESTER: 1001}
_HIDDEN = (
    "/root", "/home", "/var/tmp", "/var/mail", "/var/spool/cron",  # noqa: S108 -- the folder itself is meant
    "/etc/ssh", "/etc/sudoers.d", "/etc/systemd/system",
)  # fmt: skip
#: Of a service that this machine may run, and a host does not: seen there, it would be one that has stopped.
_LEFT_OUT = ("/usr/bin/chronyc", "/usr/sbin/chronyd")
_MOUNTED_OVER = ("/tmp", "/run", "/proc", "/sys", "/dev")  # noqa: S108 -- likewise
_NOBODY = 65534
_FIRST_PERSON = 1000
#: Groups that the first user of a board's system is in, where the system has them.
_ADMIN_GROUPS = {"adm", "audio", "dialout", "netdev", "plugdev", "render", "sudo", "users", "video"}
_SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
UseDNS no
PrintLastLog no
Subsystem sftp internal-sftp
"""
_SUDOERS = f"""\
Defaults env_reset, !lecture
Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
root ALL=(ALL:ALL) ALL
{ADMIN} ALL=(ALL:ALL) NOPASSWD: ALL
@includedir /etc/sudoers.d
"""
_SUDO_PAM = """\
auth required pam_unix.so
account required pam_permit.so
session required pam_permit.so
"""
#: `reboot` and its like: the first process of the host listens to signals.
_POWER = """\
#!/bin/sh
# reboot, poweroff, halt and shutdown of a virtual host.
name=${0##*/}
[ "$(id -u)" -eq 0 ] || { echo "$name: must be root" >&2; exit 1; }
signal=TERM
[ "$name" = reboot ] && signal=HUP
if [ "$name" = shutdown ]; then
\tfor word; do case $word in -r | --reboot) signal=HUP ;; esac; done
fi
exec kill -s $signal 1
"""


def furnish(upper: Path, lab: LabSpec, host: HostSpec, *, folder: Path, public_key: str, face: Face | None) -> None:
    """Write the host's disk; raises LabError."""
    upper.mkdir(parents=True)
    upper.chmod(0o755)
    for path in (*_HIDDEN, str(folder)):
        _hide(upper, path)
    for path in lab.exposed:
        _make_way(upper, path)
    _name_it(upper, lab, host)
    _add_users(upper, public_key)
    _add_servers(upper, host)
    _add_boot(upper)
    if face is not None:
        _put_on(upper, face)
    _leave_out(upper)


def interpreter_folders(folder: Path) -> tuple[str, ...]:
    """What the controller's interpreter needs of the folders that a host does not see."""
    wanted = dict.fromkeys((*map(os.path.realpath, _PREFIXES), *_PREFIXES))
    return tuple(path for path in wanted if not _in_sight(path, folder))


_PREFIXES = (sys.base_prefix, sys.prefix)


def _in_sight(path: str, folder: Path) -> bool:
    """Whether an ordinary user of a host sees a folder of this machine: not hidden, passable, of the root's disk."""
    hidden = any(_is_below(path, above) for above in (*_HIDDEN, *_MOUNTED_OVER, str(folder)))
    passable = all(Path(above).stat().st_mode & stat.S_IXOTH for above in (path, *_parents(path)))
    return not hidden and passable and os.stat(path).st_dev == os.stat("/").st_dev  # noqa: PTH116


def _hide(upper: Path, path: str) -> None:
    """Let a host see an empty folder there."""
    if Path(path).is_dir():
        target = place(upper, path)
        make_opaque(target)
        _copy_owner(Path(path), target)


def _make_way(upper: Path, path: str) -> None:
    """Let everybody get to a folder that another is mounted on: into the folders on the way, but not to look around."""
    target = upper
    for part in Path(path).parts[1:]:
        target /= part
        if not target.is_dir():
            target.mkdir()
            _copy_owner(Path("/", target.relative_to(upper)), target)
        mode = stat.S_IMODE(target.stat().st_mode)
        if not mode & stat.S_IXOTH:
            make_opaque(target)
            target.chmod(mode | 0o111)


def place(upper: Path, path: str) -> Path:
    """Where a path of the host is in the upper layer; the folders on the way are made as they are below."""
    real = Path(os.path.realpath(Path(path).parent), Path(path).name)
    target = upper
    for part in real.parts[1:-1]:
        target /= part
        if not target.is_dir():
            target.mkdir()
            _copy_owner(Path("/", target.relative_to(upper)), target)
    return target / real.name


def _copy_owner(below: Path, above: Path) -> None:
    if below.is_dir():
        found = below.stat()
        os.chown(above, found.st_uid, found.st_gid)
        above.chmod(stat.S_IMODE(found.st_mode))


def _write(upper: Path, path: str, text: str, mode: int = 0o644) -> None:
    target = place(upper, path)
    if target.is_symlink():
        target.unlink()
    target.write_text(text, encoding="utf-8")
    target.chmod(mode)


def _name_it(upper: Path, lab: LabSpec, host: HostSpec) -> None:
    names = "".join(f"{other.address} {other.name}\n" for other in lab.hosts)
    _write(upper, "/etc/hostname", f"{host.name}\n")
    _write(upper, "/etc/hosts", f"127.0.0.1 localhost\n{lab.controller} controller\n{names}")
    _write(upper, "/etc/resolv.conf", "# There is no name server in the lab.\n")
    _write(upper, "/etc/fstab", "# The root of a virtual host is an overlay.\n")
    _write(upper, "/etc/machine-id", f"{uuid.uuid4().hex}\n", 0o444)


def _add_users(upper: Path, public_key: str) -> None:
    """The system's own users stay, people do not.  "*" is no password and no lock: a locked account has no keys."""
    users = [line for line in _lines("/etc/passwd") if _is_system(line)]
    groups = [line for line in _lines("/etc/group") if _is_system(line)]
    joined = [f"{line}{',' if line.split(':')[3] else ''}{ADMIN}" if _admin_is_in(line) else line for line in groups]
    people = [f"{name}:x:{number}:{number}::/home/{name}:{_shell()}" for name, number in _USERS.items()]
    own = [f"{name}:x:{number}:" for name, number in _USERS.items()]
    _write(upper, "/etc/passwd", _text([*users, *people]))
    _write(upper, "/etc/group", _text([*joined, *own]))
    _write(upper, "/etc/shadow", _text(f"{name}:*:19000:0:99999:7:::" for name in _names([*users, *people])), 0o600)
    _write(upper, "/etc/gshadow", _text(f"{name}:*::" for name in _names([*joined, *own])), 0o600)
    for name, number in _USERS.items():
        _make_home(place(upper, f"/home/{name}"), number, public_key)


def _make_home(home: Path, owner: int, public_key: str) -> None:
    skeleton = Path("/etc/skel")
    if skeleton.is_dir():
        shutil.copytree(skeleton, home, symlinks=True)
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "authorized_keys").write_text(public_key, encoding="ascii")
    (home / ".ssh").chmod(0o700)
    home.chmod(0o755)
    for path in (home, *home.rglob("*")):
        os.chown(path, owner, owner, follow_symlinks=False)


def _add_servers(upper: Path, host: HostSpec) -> None:
    _write(upper, "/etc/ssh/sshd_config", _SSHD_CONFIG)
    key = place(upper, "/etc/ssh/ssh_host_ed25519_key")
    make_key(key, f"root@{host.name}")
    _write(upper, "/etc/sudoers", _SUDOERS, 0o440)
    _write(upper, "/etc/pam.d/sudo", _SUDO_PAM)


def _add_boot(upper: Path) -> None:
    """What a boot runs is the host's own, and not what this machine's boot does."""
    _write(upper, "/etc/rc.local", "#!/bin/sh\nexit 0\n", 0o755)
    for name in ("reboot", "poweroff", "halt", "shutdown"):
        _write(upper, f"/usr/sbin/{name}", _POWER, 0o755)


def make_key(path: Path, comment: str) -> None:
    """An SSH key pair without a passphrase; raises LabError."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise LabError(f"no key can be made: {' '.join(command)}: {done.stderr.strip()}")


def _put_on(upper: Path, face: Face) -> None:
    """The persona's files; the folders that they lie in stay as they are below."""
    made = {path for path in upper.rglob("*") if path.is_dir()}
    for path in _folders(face.root):
        _check_no_link(path)
    face.put_on(upper)
    for target in sorted(path for path in upper.rglob("*") if path.is_dir() and path not in made):
        _copy_owner(Path("/", target.relative_to(upper)), target)


def _leave_out(upper: Path) -> None:
    """Let a host not see a program of this machine, unless its persona has one there."""
    for path in filter(os.path.exists, _LEFT_OUT):
        target = place(upper, path)
        if not os.path.lexists(target):
            os.mknod(target, stat.S_IFCHR, 0)  # an overlay's way to say that it is not there


def _folders(root: Path) -> Iterator[Path]:
    return (Path("/", path.relative_to(root)) for path in root.rglob("*") if path.is_dir())


def _check_no_link(folder: Path) -> None:
    if folder.is_symlink():
        raise LabError(
            f"a persona has files in {folder}, which is a link to {folder.readlink()} on this machine; put them there"
        )


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines()


def _is_system(line: str) -> bool:
    """A line of passwd or group: not of a person, and not of a name that is ours."""
    fields = line.split(":")
    if len(fields) < 4 or not fields[2].isdigit() or fields[0] in _USERS:
        return False
    return int(fields[2]) < _FIRST_PERSON or int(fields[2]) == _NOBODY


def _admin_is_in(group: str) -> bool:
    return group.partition(":")[0] in _ADMIN_GROUPS


def _names(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def _text(lines: Iterator[str] | list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _shell() -> str:
    return "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"


def _is_below(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}/")


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents]
