"""What must be done again at every boot: a small script on the device, run at once and by every boot from then on.

Scripts are /etc/edge-testbed/boot.d/NAME.sh.  One hook runs them all: a systemd unit, or where systemd is not process
1 a line in /etc/rc.local.  Remove /etc/edge-testbed and the hook to be rid of it all.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from testbed.provision.part import Answer, Part
from testbed.provision.step import Change, Command, Facts

if TYPE_CHECKING:
    from testbed.inventory import Device

FOLDER = "/etc/edge-testbed/boot.d"
_UNIT_FILE = "/etc/systemd/system/edge-testbed-boot.service"
_ENABLED = "/etc/systemd/system/multi-user.target.wants/edge-testbed-boot.service"
_RC_LOCAL = "/etc/rc.local"
_RUN_ALL = f'for script in {FOLDER}/*.sh; do [ ! -f "$script" ] || sh "$script"; done'  # no script: no failure
#: After what sets clocks and swap by itself: nvpmodel sets the frequencies that jetson_clocks then holds.
_UNIT = f"""\
[Unit]
Description=Settings of edge-testbed that a boot forgets
After=local-fs.target swap.target nvpmodel.service nvzramconfig.service dphys-swapfile.service nvfancontrol.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c '{_RUN_ALL}'

[Install]
WantedBy=multi-user.target
"""
#: Before the "exit 0" that a rc.local of old ends with, so that it is reached.
_ADD_TO_RC_LOCAL = f"""\
set -e
test -s {_RC_LOCAL} || printf '#!/bin/sh\\nexit 0\\n' >{_RC_LOCAL}
cp -p {_RC_LOCAL} {_RC_LOCAL}.new
{{ sed -n '1p' {_RC_LOCAL}; echo '{_RUN_ALL}'; sed '1d' {_RC_LOCAL}; }} >{_RC_LOCAL}.new
chmod 755 {_RC_LOCAL}.new
mv {_RC_LOCAL}.new {_RC_LOCAL}
"""


def _parse(answer: Answer) -> dict[str, Any]:
    scripts = {path.rpartition("/")[2].removesuffix(".sh"): path for path in answer.files if path.startswith(FOLDER)}
    by_systemd = answer.text(_UNIT_FILE) == _UNIT.strip() and "enabled" in answer.values
    by_rc_local = _RUN_ALL in (answer.text(_RC_LOCAL) or "").splitlines()
    return {
        "boot_scripts": {name: answer.text(path) for name, path in sorted(scripts.items())},
        "boot_hooks": [name for name, there in (("systemd", by_systemd), ("rc.local", by_rc_local)) if there],
    }


PART = Part(
    "boot_scripts",
    _parse,
    files=(f"{FOLDER}/*.sh", _UNIT_FILE, _RC_LOCAL),
    script=f"[ -L {_ENABLED} ] && echo enabled=yes",
)


class BootHook:
    """Every boot runs the scripts of the other steps."""

    name = "boot hook"

    def check(self, facts: Facts, device: Device) -> Change | None:
        hook = "systemd" if facts["board"]["systemd"] else "rc.local"
        if hook in facts["boot_hooks"]:
            return None
        found, wanted = f"{FOLDER} is not run at boot", f"run at boot by {hook}"
        if hook == "rc.local":
            return Change(self.name, found, wanted, (Command(("sh", "-c", _ADD_TO_RC_LOCAL), become=True),))
        commands = (
            write_file(_UNIT_FILE, _UNIT),
            # What `systemctl enable` does, and it asks no running systemd.
            Command(("mkdir", "-p", _ENABLED.rpartition("/")[0]), become=True),
            Command(("ln", "-sf", _UNIT_FILE, _ENABLED), become=True),
            Command(("systemctl", "daemon-reload"), become=True),
        )
        return Change(self.name, found, wanted, commands)


def installed(facts: Facts, name: str, script: str) -> bool:
    """Whether the script is there as it should be."""
    return bool(facts["boot_scripts"].get(name) == script.strip())


def install(facts: Facts, name: str, script: str) -> tuple[Command, ...]:
    """Put the script there where it is not, and run it."""
    path = f"{FOLDER}/{name}.sh"
    put = () if installed(facts, name, script) else (write_file(path, script),)
    return (*put, Command(("sh", path), become=True))


def write_file(path: str, content: str) -> Command:
    """Put a file of root's there, whole or not at all; its folder is made."""
    folder, new, target = (shlex.quote(each) for each in (path.rpartition("/")[0], f"{path}.new", path))
    return Command(("sh", "-c", f"mkdir -p {folder} && cat >{new} && mv {new} {target}"), True, content.encode())
