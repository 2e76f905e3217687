"""Build a device's environment, prove it, measure an empty trainer in it: the actions behind the environment's steps.

Everything goes through a Connection: programs travel as text (environment_builder, environment_proof), wheels as
contents by hash.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed import code_wheel
from testbed.cache import cache_folder
from testbed.errors import DeviceError
from testbed.provision import wheels
from testbed.provision.site import send

if TYPE_CHECKING:
    from testbed.code_wheel import CodeWheel
    from testbed.connection import Connection, Ran
    from testbed.provision.environment_torch import TorchBuild
    from testbed.provision.site import Way
    from testbed.provision.step import Say
    from testbed.provision.wheels import Target, Wheel

_LOOK_SECONDS = 60.0
_VENV_SECONDS = 300.0
_INSTALL_SECONDS = 3600.0  # torch on an SD card
_PROOF_SECONDS = 2400.0  # the first import of everything, on a slow board
_PACKAGES, _TORCH = "packages", "torch"
#: What the shell, and `subprocess`, make of SIGILL and of SIGKILL.
_ILLEGAL_INSTRUCTION, _KILLED = {132, -4}, {137, -9}
#: In the environment, with the code that was deployed: what an empty trainer takes.
_BASELINE = (
    "import json, sys; sys.path.insert(0, {code!r}); from testbed.node.baseline import measure_here; "
    "print(json.dumps(vars(measure_here({threads}, {accelerator!r}, code=({code!r},)))))"
)


@dataclass(frozen=True)
class Wanted:
    """What an environment shall hold; `key` is what its record is compared with."""

    python: str  # version, "3.11"
    machine: str
    torch: TorchBuild
    lines: tuple[str, ...]  # requirements with hashes, pip's own left out

    @property
    def key(self) -> dict[str, str]:
        return {
            "python": self.python,
            "machine": self.machine,
            "torch": self.torch.version,
            "index": self.torch.index,
            "lock": wheels.fingerprint(self.lines),
        }


@dataclass(frozen=True)
class Installation:
    """Where and how an environment is built."""

    folder: str  # the testbed's on the device
    python: str  # the interpreter that it is made with
    way: Way  # of what is sent there
    target: Target
    lock: Path
    air_gapped: bool
    wheelhouse: Path | None


def build(connection: Connection, say: Say, wanted: Wanted, how: Installation) -> None:
    """Make the environment: begin, install in two stages, prove, put in place.  Raises DeviceError."""
    say("making the environment")
    done = _ask(connection, how.python, "begin", {"folder": how.folder, "wanted": wanted.key}, _VENV_SECONDS)
    if not {_TORCH, _PACKAGES} <= set(done):
        _install(connection, say, wanted, how, done)
    if wanted.torch.preload:
        _ask(connection, how.python, "preload", {"folder": how.folder, "libraries": wanted.torch.preload})
    say("proving it")
    found = prove(connection, f"{how.folder}/env.partial/bin/python")
    if found["torch_cuda"] and not wanted.torch.cuda:
        raise DeviceError(
            f"{connection.name}: torch {found['torch']} was installed, a CUDA build, and the board has no CUDA; "
            f"wanted is {wanted.torch.text}"
        )
    record = {"wanted": wanted.key, "created": int(time.time())}
    _ask(connection, how.python, "finish", {"folder": how.folder, "record": record}, _VENV_SECONDS)


def prove(connection: Connection, python: str, *, cuda: bool = False) -> dict[str, Any]:
    """What `environment_proof` found there; raises DeviceError when it does not work, or CUDA is asked for and lacking.

    `cuda`: an accelerator is asked for, and torch must have been built for its architecture.
    """
    ran = connection.attempt([python, "-I", "-c", _program("environment_proof")], _PROOF_SECONDS)
    if ran.exit_code:
        raise DeviceError(f"{connection.name}: the environment of {python} does not work: {_why(ran)}")
    found: dict[str, Any] = json.loads(ran.output.splitlines()[-1])
    wrong = [f"{kind} gives {value}" for kind, value in found["gradient"].items() if abs(value - 280.0) > 1e-3]
    if wrong:
        raise DeviceError(f"{connection.name}: torch {found['torch']} computes wrongly: {', '.join(wrong)} for 280")
    if cuda:
        _prove_cuda(connection, found)
    return found


def prove_and_measure(
    connection: Connection, say: Say, path: str, python: str, code: str, key: Mapping[str, Any]
) -> None:
    """Prove an environment, measure an empty trainer in it with our code, and keep both on the device.

    path: of the record.
    key: `threads` and `accelerator` of the trainer, and what else the record is compared with.
    """
    say("proving the environment")
    found = prove(connection, python, cuda=key["accelerator"] == "cuda")
    say("measuring what an empty trainer takes")
    expanded = connection.run(["readlink", "-f", code], _LOOK_SECONDS).strip()
    text = _BASELINE.format(code=expanded, threads=key["threads"], accelerator=key["accelerator"])
    ran = connection.attempt([python, "-I", "-c", text], _PROOF_SECONDS)
    if ran.exit_code:
        raise DeviceError(f"{connection.name}: an empty trainer cannot be measured: {_why(ran)}")
    baseline = json.loads(ran.output.splitlines()[-1])
    record = {"key": dict(key), "found": found, "baseline": baseline, "measured": int(time.time())}
    _ask(connection, python, "write", {"path": path, "record": record})


def put_contents(connection: Connection, folder: str, found: Iterable[Wheel], say: Say, way: Way | None = None) -> None:
    """Have these wheels among the device's contents; without a `way` the controller sends them."""
    contents = {wheel.sha256: wheel.path for wheel in found}
    if way is None:
        send(connection, f"{folder}/content", contents, say)
    else:
        way.bring(connection, contents, say)


def put_code(connection: Connection, say: Say, folder: str, way: Way) -> None:
    """Have our code wheel unpacked under FOLDER/code, by its hash."""
    from testbed.node import landing

    wheel = our_code()
    put_contents(connection, folder, [wheels.Wheel(wheel.path, wheel.sha256)], say, way)
    arguments = {
        "wheel": f"{folder}/content/{wheel.sha256}",
        "sha256": wheel.sha256,
        "target": f"{folder}/code/{wheel.sha256}",
    }
    program = Path(str(landing.__file__)).read_text(encoding="utf-8")
    _answer(connection, [way.python, "-I", "-S", "-c", program, "unpack"], arguments, _VENV_SECONDS)


@cache
def our_code() -> CodeWheel:
    """Our code, as it was when this process first asked."""
    return code_wheel.build(cache_folder() / "code")


# ── steps of an installation ─────────────────────────────────────────────────────────────────────────────────────────
def _install(connection: Connection, say: Say, wanted: Wanted, how: Installation, done: Iterable[str]) -> None:
    """The stages that are not done yet: torch first, because it is what fails for want of space or of a wheel."""
    pip = wheels.pip_wheel(how.lock, how.target, how.wheelhouse, say)
    pushed: tuple[Wheel, ...] = ()
    if how.air_gapped:
        pushed = wheels.gather(wanted.lines, wanted.torch, how.target, how.wheelhouse, say)
    put_contents(connection, how.folder, (pip, *pushed), say, how.way)
    parts = {_TORCH: _torch_lines(wanted, pushed), _PACKAGES: wanted.lines}
    for stage in (_TORCH, _PACKAGES):
        if stage in done:
            continue
        say(f"installing {wanted.torch.requirement if stage == _TORCH else f'{len(wanted.lines)} packages'}")
        arguments = {
            "folder": how.folder,
            "stage": stage,
            "pip": pip.sha256,
            "requirements": parts[stage],
            "wheels": {
                wheel.path.name: wheel.sha256 for wheel in pushed if (wheel.project == "torch") == (stage == _TORCH)
            },
            "index": wanted.torch.index if stage == _TORCH else None,
        }
        _ask(connection, how.python, "install", arguments, _INSTALL_SECONDS)


def _torch_lines(wanted: Wanted, pushed: Iterable[Wheel]) -> tuple[str, ...]:
    """The requirement of torch; with the hash of the very wheel that was sent, where one was."""
    hashes = [f" --hash=sha256:{wheel.sha256}" for wheel in pushed if wheel.project == "torch"]
    return (f"{wanted.torch.requirement}{''.join(hashes)}",)


def _prove_cuda(connection: Connection, found: Mapping[str, Any]) -> None:
    if not found["cuda_available"]:
        built = f"built for CUDA {found['torch_cuda']}" if found["torch_cuda"] else "a CPU build"
        raise DeviceError(
            f"{connection.name}: accelerator: cuda is asked for, and torch {found['torch']} ({built}) sees no CUDA "
            f"device; is the login user in the groups `video` and `render`, and does the build fit the board's CUDA?"
        )
    if not _covered(found["capability"], found["architectures"]):
        raise DeviceError(
            f"{connection.name}: torch {found['torch']} was built for {', '.join(found['architectures'])}, and the "
            f"board's {found['cuda_device']} is {found['capability']}; it needs another build of torch"
        )


def _covered(capability: str, architectures: Iterable[str]) -> bool:
    """Whether code for one of the architectures runs there: same major, and a minor that is not higher.

    That is NVIDIA's rule for machine code: what was compiled for X.y runs on X.z where z ≥ y, and on no other X.  (PTX
    would be compiled again there, for a long time, by whoever starts first: it does not count.)  NVIDIA promises it for
    desktop GPUs only, from none of them to a Jetson's; code for sm_80 has been seen to run on an Orin (sm_87) all the
    same (github.com/nvidia-holoscan/holohub/pull/1687), and some has just run there: the proof is asked first.  Of a
    Jetson whose own architecture is not among them there is a note.
    """
    number = int(capability.removeprefix("sm_"))
    for architecture in architectures:
        digits = "".join(filter(str.isdigit, architecture))
        if digits and int(digits) // 10 == number // 10 and int(digits) <= number:
            return True
    return False


# ── programs that travel as text ─────────────────────────────────────────────────────────────────────────────────────
@cache
def _program(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


def _ask(
    connection: Connection, python: str, verb: str, arguments: Mapping[str, Any], patience_seconds: float = 60.0
) -> Any:
    """A verb of environment_builder on the device."""
    return _answer(connection, [python, "-I", "-c", _program("environment_builder"), verb], arguments, patience_seconds)


def _answer(connection: Connection, command: list[str], arguments: Mapping[str, Any], patience_seconds: float) -> Any:
    ran = connection.attempt(command, patience_seconds, data=json.dumps(arguments).encode())
    try:
        said = json.loads(ran.output.splitlines()[-1])
    except (ValueError, IndexError):
        raise DeviceError(f"{connection.name}: {command[-1]} with {command[0]} failed: {_why(ran)}") from None
    if "error" in said:
        raise DeviceError(f"{connection.name}: {command[-1]}: {said['error']}")
    return said["answer"]


def _why(ran: Ran) -> str:
    """The cause, in words."""
    if ran.exit_code in _ILLEGAL_INSTRUCTION:
        return "the processor does not know an instruction of this build of torch (SIGILL); it needs another build"
    if ran.exit_code in _KILLED:
        return "it was killed, most likely for want of memory"
    lines = [line for line in ran.errors.strip().splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {ran.exit_code}"
