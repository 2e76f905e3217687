"""A persona worn without a lab: a root of its own in a mount namespace, in which its programs really run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from testbed.lab.persona import Face, Persona

SETUP = """
set -e
mount -t tmpfs none {work}
mkdir {work}/upper {work}/work {work}/root
mount -t overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/work none {work}/root
cp -a --remove-destination {dress}/. {work}/root/
mount --rbind /dev {work}/root/dev
mount --bind /proc {work}/root/proc
mount --rbind {sys} {work}/root/sys
for file in {proc}/*; do mount --bind "$file" "{work}/root/proc/$(basename "$file")"; done
echo ready
cat
"""
#: What a lab host has for a reboot: here it only says that it was called.
REBOOT = "#!/bin/sh\ntouch /rebooting\n"


def why_not() -> str | None:
    """Why a persona cannot be worn here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no mount namespace here: {done.stderr.strip()}"


class Worn:
    """A persona in a root of its own; `boot()` is what a lab does when its host starts."""

    def __init__(self, persona: Persona, folder: Path) -> None:
        if reason := why_not():
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        self.face: Face = persona.unfold(folder / "persona")
        dress, self._work = folder / "dress", folder / "work"
        self.face.put_on(dress)
        (dress / "usr/sbin").mkdir(parents=True, exist_ok=True)
        (dress / "usr/sbin/reboot").write_text(REBOOT)
        (dress / "usr/sbin/reboot").chmod(0o755)
        self._work.mkdir()
        script = SETUP.format(work=self._work, dress=dress, sys=self.face.sys, proc=self.face.proc)
        self._holder = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.run("useradd --create-home someone")
        self.boot()

    def run(self, command: str, *, user: str | None = None, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell command inside, as root or as the user without rights."""
        inside = ["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
        inside += ["runuser", "-u", user, "--", "sh", "-c", command] if user else ["sh", "-c", command]
        return self._enter("chroot", str(self._work / "root"), *inside, given=given)

    def read(self, path: str) -> str:
        done = self.run(f"cat {path}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def written(self) -> list[str]:
        """Every file that was written since the root was made, the persona's own among them; and folders in /tmp."""
        upper = self._work / "upper"
        found = self._enter("find", str(upper), "!", "-path", str(upper / "tmp"), "-printf", "%P\n")
        return sorted(found.stdout.splitlines())

    def _enter(self, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self._holder.pid), "-m", *command]
        return subprocess.run(enter, input=given, capture_output=True, text=True, timeout=60, check=False)

    def boot(self) -> None:
        """What happens when the host starts: the boot script, and with it everything that waited for a reboot."""
        if self.face.boot is None:
            return
        done = self.run("rm -f /rebooting; exec sh -s", given=self.face.boot.read_text())
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr

    def close(self) -> None:
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(10)
        self._holder.stdout.close()
