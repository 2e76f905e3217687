"""Save a real board's facts as a persona, for the virtual lab: `testbed record DEVICE`.

    recording = record(connection, Path("our-orin"), profile="jetson_orin_nano_8gb")
    load_persona(recording.folder)

Nothing is changed on the board.  Recorded commands become programs that replay what was said: they have no state, so
what provisioning changes through them shows no effect; the personas that come with the package have that.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from testbed import record_script
from testbed.errors import DeviceError, RightError, UsageError
from testbed.lab.persona import PERSONAS
from testbed.record_privacy import Privacy

if TYPE_CHECKING:
    from testbed.connection import Connection
    from testbed.inventory import HardwareProfile
    from testbed.record_script import Raw, Said

_PATIENCE_SECONDS = 120.0
#: Answered by the lab machine itself: replaying them would break the programs that the testbed runs there.
_NOT_REPLAYED = frozenset({"getconf", "python3"})
_PROGRAMS = "usr/lib/persona"
_RECORDED = f"{_PROGRAMS}/recorded"
_REPLAY = """\
#!/bin/sh
# Replays what `{program}` said when this board was recorded; it changes nothing.
RECORDED=/{recorded}/{program}
while read -r number words; do
	if [ "$words" = "$*" ]; then
		cat "$RECORDED/$number.errors" >&2
		cat "$RECORDED/$number.output"
		exit "$(cat "$RECORDED/$number.code")"
	fi
done <"$RECORDED/commands"
echo "{program}: this persona is a recording, and has no answer to: {program} $*" >&2
exit 64
"""
#: What the packaged personas' uname asks for, and the flag that tells it.
_UNAME = {"KERNEL_RELEASE": "-r", "KERNEL_VERSION": "-v", "MACHINE": "-m", "UNAME_PROCESSOR": "-p"}
#: The kernel's line of a Raspberry Pi: the firmware's words, then those of cmdline.txt as it is now.
_PI_BOOT = """\
#!/bin/sh
# At a boot the firmware puts its own words before the first line of cmdline.txt.
echo {words}"$(head -n 1 /boot/firmware/cmdline.txt)" >/proc/cmdline
"""
_SOURCES = """\
# Where the values of these files come from.
root/{programs}/board: recorded on {date} from a board ({model}) by `testbed record`, {right}.
root/{recorded}/*: recorded on {date} from a board ({model}) by `testbed record`, {right}.
root/usr/*: this project's own: programs that replay the recorded answers.  They have no state.
boot: this project's own; the words in it were recorded.
*: recorded on {date} from a board ({model}) by `testbed record`, {right}; what identifies the board was replaced.
"""


@dataclass(frozen=True)
class Recording:
    """A persona that was recorded."""

    folder: Path
    title: str
    profile: str
    removed: dict[str, int]  # how many different words of each kind were replaced
    as_root: bool  # whether what only root may read is in it


def record(connection: Connection, folder: Path, *, profile: str, may_become: bool = True) -> Recording:
    """Record the board at the other end into a new folder.

    profile       the name of the hardware profile that the persona has where its device tree tells no other
    may_become    whether sudo may be used to read what only root may

    Raises UsageError when the folder is there already, DeviceError when the board does not answer.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; name another folder with -o")
    raw, as_root = _read(connection, may_become)
    privacy = Privacy(raw.private)
    files = dict(_cleaned_file(privacy, path, text) for path, text in raw.files.items())
    said = [_cleaned_answer(privacy, each) for each in raw.said]
    if "MemTotal:" not in files.get("/proc/meminfo", ""):
        raise DeviceError(f"{connection.name}: it cannot be recorded: its /proc/meminfo does not tell its memory")
    board = _Board.of(files, profile)
    try:
        _write(folder, board, files, raw, said, as_root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Recording(folder, board.title, board.profile, privacy.removed, as_root)


def _read(connection: Connection, may_become: bool) -> tuple[Raw, bool]:
    command = ["sh", "-c", record_script.script()]
    as_root = may_become
    try:
        ran = connection.attempt(command, _PATIENCE_SECONDS, become=may_become)
    except RightError:
        as_root = False
        ran = connection.attempt(command, _PATIENCE_SECONDS)
    if ran.exit_code or not ran.output.strip():
        said = (ran.errors.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(
            f"{connection.name}: it cannot be recorded: {said}; that takes a few MiB in /tmp there, and mktemp, tar, "
            "gzip and base64"
        )
    return record_script.unpacked(ran.output, connection.name), as_root


def _cleaned_file(privacy: Privacy, path: str, text: str) -> tuple[str, str]:
    of_kernel = path.startswith("/sys/")
    return privacy.cleaned(path, of_kernel=of_kernel), privacy.cleaned(text, of_kernel=of_kernel)


def _cleaned_answer(privacy: Privacy, said: Said) -> Said:
    program, output, errors = map(privacy.cleaned, (said.program, said.output, said.errors))
    return replace(said, program=program, output=output, errors=errors)


@dataclass(frozen=True)
class _Board:
    """What the persona says about itself."""

    title: str
    model: str
    kind: str
    profile: str
    memory_kib: int
    needs_cmdline: bool

    @classmethod
    def of(cls, files: dict[str, str], profile: str) -> _Board:
        tree = "/sys/firmware/devicetree/base"
        compatible = files.get(f"{tree}/compatible", "").strip("\0").split("\0")
        model = files.get(f"{tree}/model", "").strip("\0\n") or "a machine without a device tree"
        memory_kib = _total_kib(files.get("/proc/meminfo", ""))
        cmdline = files.get("/proc/cmdline", "")
        return cls(
            title=f"{model}, {_system(files)}",
            model=model,
            kind=_kind(compatible),
            profile=_guessed_profile(compatible, memory_kib << 10) or profile,
            memory_kib=memory_kib,
            needs_cmdline="cgroup_disable=memory" in cmdline.split(),
        )


def _total_kib(meminfo: str) -> int:
    return next(int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemTotal:"))


def _system(files: dict[str, str]) -> str:
    lines = files.get("/etc/os-release", "").splitlines()
    names = [line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")]
    return names[0] if names else "unknown system"


def _kind(compatible: list[str]) -> str:
    for vendor, kind in (("nvidia,", "jetson"), ("raspberrypi,", "raspberry_pi")):
        if any(entry.startswith(vendor) for entry in compatible):
            return kind
    return "generic"


def _guessed_profile(compatible: list[str], memory_bytes: int) -> str | None:
    """The catalogue's board of that device tree whose memory is nearest; None when there is none."""
    from testbed.config import load_profile
    from testbed.package_data import data_folder

    profiles = [load_profile(path) for path in sorted((data_folder("inventory") / "profiles").glob("*.yaml"))]
    fitting = [profile for profile in profiles if _fits(profile, compatible)]
    nearest = min(fitting, key=lambda profile: abs(profile.usable_memory_bytes - memory_bytes), default=None)
    return nearest.name if nearest else None


def _fits(profile: HardwareProfile, compatible: list[str]) -> bool:
    return any(word in entry for word in profile.compatible for entry in compatible)


def _write(folder: Path, board: _Board, files: dict[str, str], raw: Raw, said: list[Said], as_root: bool) -> None:
    for path, text in files.items():
        tree = path.split("/")[1]
        _put(folder / (path[1:] if tree in {"proc", "sys"} else f"root{path}"), text)
    _write_uname(folder / "root", [each for each in said if each.command[0] == "uname"])
    _write_programs(folder / "root", [each for each in said if each.command[0] not in {*_NOT_REPLAYED, "uname"}])
    boot = _pi_boot(files) if board.needs_cmdline else None
    if boot is not None:
        _put(folder / "boot", boot, 0o755)
    links = {path[1:]: target for path, target in raw.links.items() if "/cpufreq" in target}
    _put(folder / "persona.yaml", _yaml(board, links, said))
    right = "as root" if as_root else "as a user without rights: what only root may read is missing"
    date = dt.datetime.now(dt.timezone.utc).date()
    _put(
        folder / "SOURCES",
        _SOURCES.format(programs=_PROGRAMS, recorded=_RECORDED, date=date, model=board.model, right=right),
    )


def _put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(mode)


def _write_programs(root: Path, said: list[Said]) -> None:
    for name in dict.fromkeys(each.command[0] for each in said):
        answers = [each for each in said if each.command[0] == name]
        recorded = root / _RECORDED / name
        _put(recorded / "commands", "".join(f"{n} {' '.join(a.command[1:])}\n" for n, a in enumerate(answers)))
        for number, answer in enumerate(answers):
            _put(recorded / f"{number}.output", answer.output)
            _put(recorded / f"{number}.errors", answer.errors)
            _put(recorded / f"{number}.code", f"{answer.exit_code}\n")
        program = _REPLAY.format(program=name, recorded=_RECORDED)
        _put(root / _place(name, answers[0].program), program, 0o755)


def _place(name: str, program: str) -> str:
    """Where the program goes: its own place, /bin and /sbin being links to /usr by now.

    The place is a board's word: one that leads out of the persona's root is not followed.
    """
    if not program.startswith("/") or ".." in PurePosixPath(program).parts:
        return f"usr/bin/{name}"
    folder = str(PurePosixPath(program).parent)
    return f"{folder if folder.startswith('/usr') else f'/usr{folder}'}/{name}"[1:]


def _write_uname(root: Path, said: list[Said]) -> None:
    """The one of the packaged personas, which answers every combination of flags, with this board's values."""
    told = {each.command[1]: each.output.strip() for each in said}
    values = {name: told.get(flag, "unknown") for name, flag in _UNAME.items()}
    _put(root / _PROGRAMS / "board", "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()))
    source = PERSONAS / "_common/root/usr/local/bin/uname"
    _put(root / "usr/local/bin/uname", source.read_text(encoding="utf-8"), 0o755)


def _pi_boot(files: dict[str, str]) -> str | None:
    """None when the kernel's line does not end as cmdline.txt says: it was edited and not booted since."""
    own = files.get("/boot/firmware/cmdline.txt", "").split("\n")[0].strip()
    line = files.get("/proc/cmdline", "").rstrip("\n ")
    if not own or not line.endswith(own):
        return None
    return _PI_BOOT.format(words=shlex.quote(line.removesuffix(own)))


def _yaml(board: _Board, links: dict[str, str], said: list[Said]) -> str:
    """JSON scalars are YAML: nothing in a text from a board can break the file."""
    expected = {" ".join(each.command): each.output.strip() for each in said if each.command[0] in _NOT_REPLAYED}
    lines = [
        f"title: {json.dumps(board.title)}",
        f"kind: {board.kind}",
        f"profile: {board.profile}",
        f'memory: "{board.memory_kib} KiB"',
        f"memory_cgroup: {'needs_cmdline' if board.needs_cmdline else 'always'}",
        *_mapping("links", links),
        *_mapping("expected", expected),
    ]
    return "\n".join(lines) + "\n"


def _mapping(key: str, values: dict[str, str]) -> list[str]:
    return (
        [f"{key}:", *(f"  {json.dumps(name)}: {json.dumps(text)}" for name, text in values.items())] if values else []
    )
