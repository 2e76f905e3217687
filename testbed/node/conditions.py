"""How a board stands: how hot it is, and what it is held back by.

    conditions = Conditions()
    conditions.celsius()        # the hottest of its processors' sensors
    conditions.throttled()      # what holds it back now, in words; None where nothing tells (a PC)
    conditions.mark()           # a window begins
    conditions.since_mark()     # what has held it back since, also where it is over

What tells:

Raspberry Pi   the firmware's flags (sysfs of earlier kernels, else `vcgencmd get_throttled`, which wants group video),
               and the under-voltage alarm of the kernel, which looks every two seconds (raspberrypi-hwmon.c)
Jetson         counters of over-current events (oc?_event_cnt; on Orin the first counts under-voltage), and the alarms
               of the INA3221 sensors
all            thermal zones that stand above one of their trip points (passive, hot, critical), where they have any

Sources: https://www.raspberrypi.com/documentation/computers/os.html#get_throttled; NVIDIA's "Platform Power and
Performance" for Orin; https://docs.kernel.org/driver-api/thermal/sysfs-api.html; https://docs.kernel.org/hwmon/ina3221.html.
Tried on: the virtual lab's boards, which are reconstructed; no board yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from testbed.node.kernel_file import KernelFile

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What the firmware of a Raspberry Pi tells, by bit; 16 bits up: since the boot.
THROTTLED = ("under-voltage", "capped frequency", "throttling", "the soft temperature limit")
_SINCE_BOOT = 16
#: Thermal zones that lie in the processors: CPU-therm, cpu-thermal, cpu_thermal, soc0-thermal, tj-thermal, …  Not the
#: power supply's (PMIC-Die tells a constant 100 °C on Jetson Nano) nor a fan's estimate.
_PROCESSORS = ("cpu", "gpu", "soc", "tj", "cv", "x86_pkg_temp")
_PC_SENSORS = ("coretemp", "k10temp", "zenpower")
_TRIPS = ("passive", "hot", "critical")
_VCGENCMD = ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd")
_VCGENCMD_SECONDS = 2.0


class _Zone(NamedTuple):
    """A sensor: thousandths of a degree, and its trip points in the same unit, the highest first."""

    temperature: KernelFile
    trips: tuple[tuple[int, str], ...] = ()

    def read(self) -> int | None:
        """None for a zone that is switched off: it fails, or reads 0 or something negative (-256 °C)."""
        return self.temperature.number() or None

    def passed(self, temperature: int) -> str | None:
        """The highest of its trip points that it stands above, in words."""
        return next((words for trip, words in self.trips if temperature >= trip), None)


class Conditions:
    """Reads one board; the files are those that are there when it is made."""

    def __init__(self, root: str | Path = "/") -> None:
        base = Path(root)
        self._zones = [*_thermal_zones(base), *_pc_sensors(base)]
        self._alarms = list(_alarms(base))
        self._counters = list(_event_counters(base))
        self._flags_file = next((KernelFile(path) for path in _flag_files(base)), None)
        self._vcgencmd = next((str(base / path) for path in _VCGENCMD if (base / path).exists()), None)
        self._seen: dict[str, None] = {}  # words, in the order in which they came up
        self.mark()

    def celsius(self) -> float | None:
        """The hottest of the processors' sensors, in °C; None where there is none that can be read.

        What a look at sensors and alarms finds counts for `since_mark` too.
        """
        highest, words = self._look()
        self._note(words)
        return None if highest is None else highest / 1000

    def throttled(self) -> tuple[str, ...] | None:
        """What holds the board back now; () where nothing does, None where nothing tells."""
        return self._now(self._flags())

    def mark(self) -> None:
        """A window begins: forget what was, and note what only ever grows."""
        flags = self._flags()
        self._seen = {}
        self._marked_flags = flags
        self._marked_counts = [counter.number() for _, counter in self._counters]
        self._now(flags)

    def since_mark(self) -> tuple[str, ...] | None:
        """What has held the board back since the mark; () where nothing did, None where nothing tells.

        A flag of the firmware that has stood since before the mark tells nothing of what came later: there, only what
        a look has found counts.
        """
        flags = self._flags()
        if self._now(flags) is None:
            return None
        if flags is not None and self._marked_flags is not None:
            self._note(_words((flags & ~self._marked_flags) >> _SINCE_BOOT))
        return (*self._seen, *self._new_events())

    def _now(self, flags: int | None) -> tuple[str, ...] | None:
        now = tuple(dict.fromkeys((*_words(flags or 0), *self._look()[1])))
        self._note(now)
        tells = flags is not None or self._alarms or self._counters or any(zone.trips for zone in self._zones)
        return now if tells else None

    def _look(self) -> tuple[int | None, tuple[str, ...]]:
        """The highest temperature, in thousandths; what sensors and alarms find, in words."""
        read = [(zone, zone.read()) for zone in self._zones]
        known = [(zone, temperature) for zone, temperature in read if temperature is not None]
        passed = [zone.passed(temperature) for zone, temperature in known]
        alarms = [words for words, alarm in self._alarms if alarm.number()]
        words = (*(each for each in passed if each is not None), *alarms)
        return max((temperature for _, temperature in known), default=None), words

    def _note(self, words: tuple[str, ...]) -> None:
        self._seen.update(dict.fromkeys(words))

    def _new_events(self) -> Iterator[str]:
        grown: dict[str, int] = {}
        for (words, counter), before in zip(self._counters, self._marked_counts, strict=True):
            now = counter.number()
            if now is not None and before is not None and now > before:
                grown[words] = grown.get(words, 0) + now - before
        return (f"{words} ({count} event{'s' * (count > 1)})" for words, count in grown.items())

    def _flags(self) -> int | None:
        """The firmware's flags; None where there is no such firmware, or it does not answer us."""
        if self._flags_file is not None:
            return _hexadecimal(self._flags_file.read())
        return _ask_firmware(self._vcgencmd) if self._vcgencmd is not None else None


def _words(flags: int) -> tuple[str, ...]:
    return tuple(words for bit, words in enumerate(THROTTLED) if flags >> bit & 1)


def _ask_firmware(vcgencmd: str) -> int | None:
    import subprocess  # on a Raspberry Pi only

    try:
        ran = subprocess.run([vcgencmd, "get_throttled"], capture_output=True, timeout=_VCGENCMD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, _, value = ran.stdout.partition(b"=")
    return _hexadecimal(value) if name == b"throttled" else None


def _hexadecimal(text: bytes | None) -> int | None:
    try:
        return int(text or b"", 16)
    except ValueError:
        return None


def _thermal_zones(base: Path) -> Iterator[_Zone]:
    for folder in sorted(base.glob("sys/class/thermal/thermal_zone*")):
        name = _text(folder / "type")
        if name.lower().startswith(_PROCESSORS):
            yield _Zone(KernelFile(folder / "temp"), tuple(sorted(_trips(folder, name), reverse=True)))


def _trips(folder: Path, zone: str) -> Iterator[tuple[int, str]]:
    """A trip point that is not in use reads 0 or less."""
    for path in folder.glob("trip_point_*_temp"):
        kind = _text(path.with_name(path.name.replace("_temp", "_type")))
        temperature = _text(path)
        if kind in _TRIPS and temperature.isdigit() and int(temperature):
            yield int(temperature), f"{zone} above its {kind} trip {int(temperature) / 1000:g} °C"


def _pc_sensors(base: Path) -> Iterator[_Zone]:
    for folder in _sensors(base):
        if _text(folder / "name") in _PC_SENSORS:
            yield from (_Zone(KernelFile(path)) for path in sorted(folder.glob("temp*_input")))


def _alarms(base: Path) -> Iterator[tuple[str, KernelFile]]:
    for folder in _sensors(base):
        name = _text(folder / "name")
        if name == "rpi_volt":
            paths = {folder / "in0_lcrit_alarm": THROTTLED[0]}
        elif name.startswith("ina"):
            found = sorted((*folder.glob("curr*_crit_alarm"), *folder.glob("curr*_max_alarm")))
            paths = {path: f"over-current on {_rail(folder, path)}" for path in found}
        else:
            continue
        yield from ((words, KernelFile(path)) for path, words in paths.items() if _text(path).isdigit())


def _rail(folder: Path, alarm: Path) -> str:
    channel = alarm.name.partition("_")[0]
    return _text(folder / f"{channel.replace('curr', 'in')}_label") or channel


def _event_counters(base: Path) -> Iterator[tuple[str, KernelFile]]:
    for folder in _sensors(base):
        for path in sorted(folder.glob("oc*_event_cnt")):
            is_voltage = path.name.startswith("oc1_") and _text(folder / "name") == "soctherm_oc"
            if _text(path).isdigit():
                yield THROTTLED[0] if is_voltage else "over-current", KernelFile(path)


def _sensors(base: Path) -> list[Path]:
    """Every hwmon folder once: by its class, or by its bus where the class has no link to it."""
    folders = (*base.glob("sys/bus/i2c/devices/*/hwmon/hwmon*"), *base.glob("sys/class/hwmon/hwmon*"))
    return [path for _, path in sorted({folder.name: folder for folder in folders}.items())]


def _flag_files(base: Path) -> list[Path]:
    return sorted(base.glob("sys/devices/platform/soc*/*firmware*/get_throttled"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
