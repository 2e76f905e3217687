"""What provisioning costs: a lab of 20 hosts, first when everything is to be changed, then when nothing is.

    sudo python benchmarks/provision.py [--hosts 20] [--repeat 3] [--peers] [--environment WHEELHOUSE [--lock FILE]]

Timed are, each as a command from its start to its end:

board       `testbed provision --no-environment`, as a user types it
ten steps   ten files of root's, each compared and written where it differs; by the testbed, and with --peers by
            pyinfra and Ansible beside it (installed by pip into a virtual environment of their own, once)
environment Python's packages out of a folder of wheels, on one host that is ready but for them: apart, because it
            takes as long as the wheels are large

A target of the ten steps that is missed is told, and the exit code is 1.

Needs what a virtual lab needs: root, network namespaces, an OpenSSH server, sudo.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from testbed.cache import cache_folder
from testbed.errors import TestbedError
from testbed.lab.lab import Lab
from testbed.lab.wish import PLAIN, LabWish

STEPS = 10
COLD_SECONDS, WARM_SECONDS = 3.0, 1.5
SUBNET = "10.97.0.0/24"
MEMORY_BYTES = 256 << 20
PEERS = ("pyinfra>=3.5,<4", "ansible-core>=2.16,<2.20")
TARGET = "/etc/benchmark"
FRESH = itertools.count(1)

#: A tool's commands for a fresh folder of files on the hosts.
Commands = Callable[[Lab, Path, str], list[str]]

OURS = """\
import sys
from pathlib import Path
from testbed.config import load_inventory
from testbed.provision.boot_script import write_file
from testbed.provision.facts import FACTS_SCRIPT_PARTS
from testbed.provision.part import Part
from testbed.provision.runner import Provisioning
from testbed.provision.step import Change
from testbed.provision.visit import Options

inventory, folder, count, jobs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


class FileStep:
    def __init__(self, number):
        self.name, self.path, self.content = f"step {number}", f"{folder}/step-{number}", f"value = {number}\\n"

    def check(self, facts, device):
        found = facts["files"].get(self.path)
        if found == self.content.strip():
            return None
        return Change(self.name, found or "nothing", self.content, (write_file(self.path, self.content),))


files = Part("files", lambda answer: {"files": dict(answer.files)}, files=(f"{folder}/*",))
steps = tuple(FileStep(number) for number in range(count))
provisioning = Provisioning(
    load_inventory(inventory), Options(), steps=lambda device: steps, parts=(*FACTS_SCRIPT_PARTS, files), jobs=jobs
)
outcomes = provisioning.run()
print(", ".join(sorted({outcome.status for outcome in outcomes})))
sys.exit(any(outcome.failed for outcome in outcomes))
"""
PYINFRA = """\
from io import StringIO
from pyinfra import host
from pyinfra.operations import files

for number in range(host.data.count):
    files.put(
        name=f"step {number}",
        src=StringIO(f"value = {number}\\n"),
        dest=f"{host.data.folder}/step-{number}",
        _sudo=True,
    )
"""


def ours(lab: Lab, scratch: Path, folder: str) -> list[str]:
    script = scratch / "ours.py"
    script.write_text(OURS, encoding="utf-8")
    return [sys.executable, str(script), str(lab.inventory), folder, str(STEPS), str(len(lab.hosts))]


def pyinfra(lab: Lab, scratch: Path, folder: str) -> list[str]:
    data = {"ssh_user": "admin", "ssh_key": str(lab.folder / "id_ed25519"), "folder": folder, "count": STEPS}
    data |= {"ssh_known_hosts_file": str(lab.folder / "known_hosts"), "ssh_strict_host_key_checking": "yes"}
    hosts = [host.address for host in lab.hosts]
    (scratch / "hosts.py").write_text(f"hosts = ({hosts!r}, {data!r})\n", encoding="utf-8")
    (scratch / "deploy.py").write_text(PYINFRA, encoding="utf-8")
    return [str(peers_folder() / "bin/pyinfra"), "-y", str(scratch / "hosts.py"), str(scratch / "deploy.py")]


def ansible(lab: Lab, scratch: Path, folder: str) -> list[str]:
    common = f"ansible_user=admin ansible_ssh_common_args='-F {lab.ssh_config}'"
    rows = [f"{host.name} {common} ansible_python_interpreter=/usr/bin/python3" for host in lab.hosts]
    (scratch / "hosts.ini").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tasks = [
        f"    - copy: {{content: \"value = {number}\\n\", dest: '{folder}/step-{number}'}}" for number in range(STEPS)
    ]
    head = ["- hosts: all", "  gather_facts: false", "  become: true", "  tasks:"]
    make = [f"    - file: {{path: '{folder}', state: directory}}"]
    (scratch / "play.yaml").write_text("\n".join([*head, *make, *tasks]) + "\n", encoding="utf-8")
    play = str(peers_folder() / "bin/ansible-playbook")
    return [play, "-i", str(scratch / "hosts.ini"), "-f", str(len(lab.hosts)), str(scratch / "play.yaml")]


def peers_folder() -> Path:
    return cache_folder() / "benchmark-peers"


def install_peers() -> None:
    python = peers_folder() / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(peers_folder())], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-qq", *PEERS], check=True)


def seconds_of(command: Sequence[str], scratch: Path) -> float:
    """Run a command to its end; one that fails ends the benchmark with what it said."""
    environment = {**os.environ, "TESTBED_DATA": str(scratch / "data"), "ANSIBLE_PIPELINING": "1"}
    environment |= {"ANSIBLE_HOME": str(scratch / "ansible"), "HOME": str(scratch)}
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return seconds


def cold_and_warm(command: Callable[[str], list[str]], repeat: int, scratch: Path) -> tuple[list[float], list[float]]:
    """Seconds of the first run against a fresh folder, and of one right after it, `repeat` times each."""
    cold, warm = [], []
    for _ in range(repeat):
        line = command(f"{TARGET}-{next(FRESH)}")
        cold.append(seconds_of(line, scratch))
        warm.append(seconds_of(line, scratch))
    return cold, warm


def show(title: str, cold: list[float], warm: list[float], *, target: bool = False) -> bool:
    """Print a line; whether the target is met, where there is one."""
    texts = [f"{statistics.median(each):7.2f} s (best {min(each):.2f})" for each in (cold, warm)]
    reached = statistics.median(cold) <= COLD_SECONDS and statistics.median(warm) <= WARM_SECONDS
    verdict = f"   target {COLD_SECONDS:.1f} s, {WARM_SECONDS:.1f} s: {'ok' if reached else 'MISSED'}" if target else ""
    print(f"{title:<26} cold {texts[0]}   warm {texts[1]}{verdict}", flush=True)
    return reached or not target


def board(lab: Lab, repeat: int, scratch: Path) -> None:
    """Cold once, because a board is fresh once."""
    command = [sys.executable, "-m", "testbed", "provision", "--inventory", str(lab.inventory)]
    command += ["--no-environment", "--jobs", str(len(lab.hosts))]
    cold = [seconds_of(command, scratch)]
    show("testbed provision", cold, [seconds_of(command, scratch) for _ in range(repeat)])


def environment(lab: Lab, wheelhouse: Path, lock: Path | None, scratch: Path) -> None:
    """On the first host.  The lab names an interpreter that has everything; here, one is to be made."""
    lines = lab.inventory.read_text(encoding="utf-8").splitlines(keepends=True)
    inventory = lab.inventory.with_name("inventory-without-python.yaml")
    inventory.write_text("".join(line for line in lines if not line.startswith("  python:")), encoding="utf-8")
    command = [sys.executable, "-m", "testbed", "provision", "--inventory", str(inventory)]
    command += ["--only", lab.hosts[0].name, "--wheelhouse", str(wheelhouse.resolve())]
    command += ["--lock", str(lock.resolve())] if lock else []
    cold, warm = seconds_of(command, scratch), seconds_of(command, scratch)
    show("environment, one host", [cold], [warm])


def main() -> bool:
    """Measure; whether every target is met."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--hosts", type=int, default=20)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--peers", action="store_true", help="pyinfra and Ansible beside it")
    arguments.add_argument("--subnet", default=SUBNET)
    wheelhouse = "a folder with all wheels: the environment, timed apart"
    arguments.add_argument("--environment", type=Path, metavar="WHEELHOUSE", help=wheelhouse)
    arguments.add_argument("--lock", type=Path, help="its versions [default: those that come with the testbed]")
    arguments.add_argument("--memory", type=int, default=MEMORY_BYTES >> 20, help="of a host, in MiB")
    options = arguments.parse_args()
    tools: dict[str, Commands] = {"ten steps, testbed": ours}
    if options.peers:
        install_peers()
        tools |= {"ten steps, pyinfra": pyinfra, "ten steps, Ansible": ansible}
    wish = LabWish(devices=options.hosts, personas=(PLAIN,), memory_bytes=options.memory << 20, subnet=options.subnet)
    with tempfile.TemporaryDirectory() as name, Lab.up(Path(name) / "lab", wish) as lab:
        scratch = Path(name) / "scratch"
        scratch.mkdir()
        print(f"{len(lab.hosts)} hosts, {os.cpu_count()} cores, all on this machine", flush=True)
        board(lab, options.repeat, scratch)
        met = True
        for title, tool in tools.items():
            cold, warm = cold_and_warm(lambda folder, tool=tool: tool(lab, scratch, folder), options.repeat, scratch)
            met &= show(title, cold, warm, target=tool is ours)
        if options.environment:
            environment(lab, options.environment, options.lock, scratch)
    return met


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except TestbedError as error:
        raise SystemExit(str(error)) from None
