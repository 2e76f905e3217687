"""The memory cgroup: usable on this board, and delegated to the login user, so that a run needs no sudo.

v1   a directory of the user's in the memory hierarchy (and in cpu, for quotas), made again at every boot.
v2   with systemd: the user's manager lingers and has the memory controller; an agent gets a scope from it.
     Without systemd: a group of the user's at the top, and the right to move processes from the top into it.

Tried on: v1 as a user without rights, in the virtual lab; v2 by systemd 252 on Linux 6.1 and
systemd 257 on Linux 6.12, in virtual machines.
Without systemd on v2: nothing yet.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from testbed.provision import boot_script
from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts, Problem

if TYPE_CHECKING:
    from testbed.inventory import Device

ROOT = "/sys/fs/cgroup"
_BOOT_FILES = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")
_ENABLE, _DISABLE = "cgroup_enable=memory", "cgroup_disable=memory"
_DELEGATE_FILE = "/etc/systemd/system/user@.service.d/edge-testbed.conf"
_DELEGATE = "[Service]\nDelegate=cpu cpuset io memory pids\n"
_INSTALL_SECONDS = 600.0

# `-O` asks who owns a group: to root itself, everything is writable.  /proc/cgroups is not asked: on Linux 6.12 it
# has no line for memory even where the v2 controller works.  Raspberry Pi OS leaves a stub at the old place.
_SCRIPT = f"""\
printf 'user=%s\\nuid=%s\\n' "$ME" "$ME_UID"
[ -e {ROOT}/memory/memory.limit_in_bytes ] && echo v1=yes
[ -e {ROOT}/cpu/cpu.shares ] && echo v1_cpu=yes
own() {{ [ -d "$2" ] && [ -O "$2" ] && echo "own_$1=yes"; }}
own memory "{ROOT}/memory/edge-testbed-$ME"
own cpu "{ROOT}/cpu/edge-testbed-$ME"
own top "{ROOT}/edge-testbed-$ME"
[ -w {ROOT}/cgroup.procs ] && echo procs=writable
[ -e "/var/lib/systemd/linger/$ME" ] && echo linger=yes
manager={ROOT}/user.slice/user-$ME_UID.slice/user@$ME_UID.service
[ -w $manager ] && echo manager=writable
[ -S /run/user/$ME_UID/bus ] && echo bus=yes
for file in {" ".join(_BOOT_FILES)}; do
  if [ -r $file ] && ! grep -qs 'DO NOT EDIT' $file; then echo "boot_file=$file"; break; fi
done
"""


def _parse(answer: Answer) -> dict[str, Any]:
    values = answer.values
    controllers = (answer.text(f"{ROOT}/cgroup.controllers") or "").split()
    user, uid = values.get("user"), values.get("uid", "")
    manager = f"{ROOT}/user.slice/user-{uid}.slice/user@{uid}.service/cgroup.controllers"
    cgroup = {
        "version": "v1" if "v1" in values else "v2" if "memory" in controllers else None,
        "own": [name for name in ("memory", "cpu", "top") if f"own_{name}" in values],
        "v1_cpu": "v1_cpu" in values,
        "linger": "linger" in values,
        "manager_controllers": (answer.text(manager) or "").split() if "manager" in values else [],
        "bus": "bus" in values,
        "procs_writable": "procs" in values,
        "delegate_file": answer.text(_DELEGATE_FILE) == _DELEGATE.strip(),
    }
    path = values.get("boot_file")
    return {
        "memory_cgroup": {**cgroup, **_delegated(cgroup, user, uid)},
        "boot_file": {"path": path, "text": answer.files.get(path, "")} if path else None,
    }


PART = Part(
    "memory_cgroup",
    _parse,
    files=(
        f"{ROOT}/cgroup.controllers",
        f"{ROOT}/user.slice/user-*.slice/user@*.service/cgroup.controllers",
        *_BOOT_FILES,
        _DELEGATE_FILE,
    ),
    script=_SCRIPT,
)


def _delegated(cgroup: dict[str, Any], user: str | None, uid: str) -> dict[str, Any]:
    """`parent`: where an agent makes its groups; None where it finds a place itself (as root, or in a scope)."""
    version, own = cgroup["version"], cgroup["own"]
    if version is None or uid == "0":
        return {"parent": None, "delegated": version is not None}
    if version == "v1":
        ready = "memory" in own and ("cpu" in own or not cgroup["v1_cpu"])
        return {"parent": f"{ROOT}/memory/edge-testbed-{user}" if ready else None, "delegated": ready}
    if "top" in own and cgroup["procs_writable"]:
        return {"parent": f"{ROOT}/edge-testbed-{user}", "delegated": True}
    scope = cgroup["linger"] and cgroup["bus"] and "memory" in cgroup["manager_controllers"]
    return {"parent": None, "delegated": scope}


class MemoryCgroup:
    """The kernel can cap memory.

    Raspberry Pi OS has that switched off; a word on the kernel's command line turns it on.  The firmware puts
    cgroup_disable=memory first and the words of cmdline.txt after it: the last one counts.
    """

    name = "memory cgroup"

    def check(self, facts: Facts, device: Device) -> Change | Problem | None:
        if facts["memory_cgroup"]["version"] is not None:
            return None
        file, wanted = facts["boot_file"], "memory can be capped"
        if _enabled(facts["boot"]["command_line"] or ""):
            text = f"the kernel was started with {_ENABLE} and has no memory controller: it needs one with CONFIG_MEMCG"
            return Problem(self.name, text)
        if file is None:
            text = f"the kernel has no memory controller, and no {_BOOT_FILES[0]} to turn it on in"
            return Problem(self.name, f"{text}; start it with {_ENABLE}")
        if _enabled(file["text"]):
            return Change(self.name, f"{_ENABLE} in {file['path']}, not yet in effect", wanted, needs_reboot=True)
        commands = (
            Command(("cp", file["path"], f"{file['path']}.before-edge-testbed"), become=True),
            boot_script.write_file(file["path"], _with_word(file["text"])),
            Command(("sync",), become=True),
        )
        return Change(self.name, "no memory controller", f"{_ENABLE} in {file['path']}", commands, needs_reboot=True)


def _enabled(line: str) -> bool:
    words = [word for word in line.split() if word in {_ENABLE, _DISABLE}]
    return bool(words) and words[-1] == _ENABLE


def _with_word(text: str) -> str:
    """The file with the word at the end of its one line; whatever else it holds, the firmware does not read."""
    line, newline, rest = text.strip("\n").partition("\n")
    return f"{line.rstrip()} {_ENABLE}\n{rest}{newline}"


class Delegation:
    """The login user may cap memory: checked every time, because a boot may forget it."""

    name = "delegation"

    def check(self, facts: Facts, device: Device) -> Change | None:
        cgroup = facts["memory_cgroup"]
        if cgroup["version"] is None or facts["login"]["uid"] == 0:
            return None
        if cgroup["version"] == "v2" and facts["board"]["systemd"]:
            return self._by_systemd(facts, device)
        user = facts["login"]["user"]
        found, wanted = f"{user} cannot cap memory", f"{user} may cap memory (cgroup {cgroup['version']})"
        name = f"cgroup-{user}"
        script = _own_groups(user, cgroup)
        if cgroup["delegated"] and boot_script.installed(facts, name, script):
            return None
        if cgroup["delegated"]:
            found, wanted = f"{user} may cap memory until the next boot", f"{wanted}, after a boot too"
        return Change(self.name, found, wanted, boot_script.install(facts, name, script))

    def _by_systemd(self, facts: Facts, device: Device) -> Change | None:
        cgroup, user = facts["memory_cgroup"], facts["login"]["user"]
        missing = _missing_controllers(cgroup, device)
        lacking = [] if cgroup["linger"] else ["does not outlive a login"]
        lacking += [] if cgroup["bus"] else ["has no bus"]
        lacking += [f"may not limit {' and '.join(missing)}"] if missing else []
        if not lacking:
            return None
        found, wanted = f"the service manager of {user} {', '.join(lacking)}", f"{user} may cap memory (cgroup v2)"
        return Change(self.name, found, wanted, tuple(_manager_commands(facts, missing)))


def _missing_controllers(cgroup: dict[str, Any], device: Device) -> list[str]:
    needed = ["memory"] if device.budget.cores is None else ["memory", "cpu"]
    return [name for name in needed if name not in cgroup["manager_controllers"]]


def _manager_commands(facts: Facts, missing: list[str]) -> Iterator[Command]:
    """Have the user's manager run always; one that runs already, and lacks something, is given it."""
    cgroup, user = facts["memory_cgroup"], facts["login"]["user"]
    running = bool(cgroup["manager_controllers"])
    yield Command(("loginctl", "enable-linger", user), become=True)
    if running and missing:
        yield boot_script.write_file(_DELEGATE_FILE, _DELEGATE)
        yield Command(("systemctl", "daemon-reload"), become=True)
    if running and not cgroup["bus"]:
        install = ("apt-get", "install", "-y", "-q", "dbus-user-session")
        yield Command(install, become=True, patience_seconds=_INSTALL_SECONDS)
    # Started, it is waited for: what it delegates is there when the facts are gathered again.
    verb = "restart" if running and (missing or not cgroup["bus"]) else "start"
    yield Command(("systemctl", verb, f"user@{facts['login']['uid']}.service"), become=True)


def _own_groups(user: str, cgroup: dict[str, Any]) -> str:
    """A boot script that gives the user groups to work in; what is inside belongs to whoever makes it."""
    owner = shlex.quote(user)
    if cgroup["version"] == "v1":
        hierarchies = ["memory", "cpu"] if cgroup["v1_cpu"] else ["memory"]
        groups = [shlex.quote(f"{ROOT}/{name}/edge-testbed-{user}") for name in hierarchies]
        return "".join(f"mkdir -p {group} && chown {owner} {group}\n" for group in groups)
    group = shlex.quote(f"{ROOT}/edge-testbed-{user}")
    return (
        f"mkdir -p {group}\n"
        f"echo +memory >{ROOT}/cgroup.subtree_control\n"
        f"echo +cpu >{ROOT}/cgroup.subtree_control\n"
        f"chown {owner} {group} {group}/cgroup.procs {group}/cgroup.subtree_control {ROOT}/cgroup.procs\n"
    )
