"""What is read on a board that is recorded, and the one script that reads it.

The script changes nothing on the board: it works in a folder of its own below /tmp, which it removes, and its output is
one archive.  What identifies the board (`private`) travels with it, so that it can be taken out of the rest; it is
never written anywhere on this machine.  Where there is no room for all of it, the script gives up: what is missing in
`private` would stay in the recording.
"""

from __future__ import annotations

import base64
import io
import shlex
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from testbed.errors import DeviceError

#: Files that are kept, by the shell's patterns; each up to 64 KiB, as far as it can be read.
FILES = (
    "/boot/extlinux/extlinux.conf",
    "/boot/firmware/cmdline.txt",
    "/boot/firmware/config.txt",
    "/etc/nv_tegra_release",
    "/etc/nvfancontrol.conf",
    "/etc/nvpmodel.conf",
    "/etc/os-release",
    "/etc/rpi-issue",
    "/etc/rpi/swap.conf",
    "/etc/rpi/swap.conf.d/*.conf",
    "/proc/cmdline",
    "/proc/meminfo",
    "/proc/swaps",
    "/sys/block/zram*/comp_algorithm",
    "/sys/block/zram*/disksize",
    "/sys/bus/i2c/devices/*-00*/hwmon/hwmon*/*",
    "/sys/bus/i2c/devices/*-00*/iio:device*/*",
    "/sys/bus/i2c/devices/*-00*/name",
    "/sys/bus/iio/devices/iio:device*/*",
    "/sys/class/devfreq/*/available_frequencies",
    "/sys/class/devfreq/*/*_freq",
    "/sys/class/devfreq/*/governor",
    "/sys/class/hwmon/hwmon*/*",
    "/sys/class/thermal/cooling_device*/cur_state",
    "/sys/class/thermal/cooling_device*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/thermal/thermal_zone*/trip_point_*",
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/devices/gpu.0/*_pg_mask",
    "/sys/devices/platform/gpu.0/*_pg_mask",
    "/sys/devices/pwm-fan/target_pwm",
    "/sys/devices/system/cpu/cpu[0-9]*/online",
    "/sys/devices/system/cpu/cpufreq/policy*/*",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
    "/sys/devices/system/cpu/present",
    "/sys/firmware/devicetree/base/compatible",
    "/sys/firmware/devicetree/base/model",
    "/sys/kernel/nvpmodel_*_cap/*",
    "/var/lib/nvpmodel/status",
)
#: Commands whose answers are kept: seconds that one may take, and its words.
_UNITS = (
    "chrony dev-zram0.swap dphys-swapfile gdm jtop nvfancontrol nvpmodel nvzramconfig ssh systemd-timesyncd zramswap"
)
COMMANDS: tuple[tuple[int, tuple[str, ...]], ...] = (
    *((5, ("uname", flag)) for flag in ("-m", "-p", "-r", "-v")),
    (5, ("getconf", "GNU_LIBC_VERSION")),
    (5, ("getconf", "PAGE_SIZE")),
    (5, ("python3", "--version")),
    (10, ("nvpmodel", "-q")),
    (10, ("nvpmodel", "-q", "--verbose")),
    (10, ("nvpmodel", "-p", "--verbose")),
    (10, ("jetson_clocks", "--show")),
    (2, ("tegrastats", "--interval", "500")),
    *((5, ("vcgencmd", *words.split())) for words in (
        "commands", "get_mem arm", "get_mem gpu", "get_throttled", "measure_clock arm", "measure_temp", "measure_volts",
        "measure_volts core", "pmic_read_adc", "version",
    )),
    (5, ("chronyc", "-c", "tracking")),
    (5, ("chronyc", "-n", "tracking")),
    (5, ("chronyc", "-n", "sources")),
    (5, ("timedatectl", "show")),
    (5, ("timedatectl", "show", "-p", "NTPSynchronized")),
    (5, ("systemctl", "get-default")),
    *((5, ("systemctl", verb, unit)) for unit in _UNITS.split() for verb in ("is-active", "is-enabled")),
)  # fmt: skip
#: Commands that print for ever: ended by their time is as it should be.
STREAMS = frozenset({"tegrastats"})
#: By kind of `testbed.record_privacy`: how the board is asked for it.
_PRIVATE = {
    "host names": "uname -n; cat /etc/hostname; hostname -f; hostname -s",
    "machine ids": "cat /etc/machine-id /var/lib/dbus/machine-id /proc/sys/kernel/random/boot_id",
    "serial numbers": (
        "tr -d '\\000' </sys/firmware/devicetree/base/serial-number; echo; cat /sys/class/dmi/id/*_serial; "
        "sed -n 's/^Serial[[:space:]]*: //p' /proc/cpuinfo; cat /sys/block/*/device/serial /sys/block/*/device/cid"
    ),
    "hardware addresses": "cat /sys/class/net/*/address /sys/class/bluetooth/*/address",
    "user names": (
        'id -un; echo "$SUDO_USER"; awk -F: \'$3 >= 1000 && $3 < 60000 { print $1; sub(/,.*/, "", $5); print $5 }\' '
        "/etc/passwd"
    ),
    "network names": (
        "iwgetid -r; sed -n 's/^ssid=//p' /etc/NetworkManager/system-connections/*; "
        "sed -n 's/^[[:space:]]*ssid=\"\\(.*\\)\"/\\1/p' /etc/wpa_supplicant/*.conf"
    ),
}
_SCRIPT = """\
LC_ALL=C; PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin; export LC_ALL PATH
umask 077
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
no_room() {{ echo "there is no room in ${{T%/*}}" >&2; exit 1; }}
mkdir "$T/files" "$T/said" "$T/private" || no_room
limit() {{ if command -v timeout >/dev/null; then timeout "$@"; else shift; "$@"; fi; }}
keep() {{
  [ -f "$1" ] && [ -r "$1" ] || return 0
  mkdir -p "$T/files${{1%/*}}"
  limit 2 head -c 65536 "$1" >"$T/files$1" 2>/dev/null || rm -f "$T/files$1"
}}
ask() {{
  number=$1 seconds=$2; shift 2
  program=$(command -v "$1") || return 0
  mkdir "$T/said/$number" && echo "$program" >"$T/said/$number/program" || no_room
  limit "$seconds" "$@" >"$T/said/$number/output" 2>"$T/said/$number/errors" </dev/null
  echo $? >"$T/said/$number/code" || no_room
}}
for file in {files}; do keep "$file"; done
for link in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
  [ -L "$link" ] && echo "$link $(readlink "$link")" >>"$T/links"
done
{commands}
{private}
echo >>"$T/links" && echo >"$T/end" || no_room
cd "$T" && tar -cf - private links files said end | gzip | base64
"""


@dataclass(frozen=True)
class Said:
    """What a program answered; `program` is where it is on the board."""

    command: tuple[str, ...]
    program: str
    output: str
    errors: str
    exit_code: int


@dataclass(frozen=True)
class Raw:
    """A board as it was read, with everything private still in it."""

    files: dict[str, str]  # by their paths on the board
    links: dict[str, str]
    said: tuple[Said, ...]
    private: dict[str, list[str]]  # words by kind


def script() -> str:
    """The POSIX-sh script; what it prints is for `unpacked`."""
    return _SCRIPT.format(
        files=" ".join(FILES),  # unquoted: they are the shell's patterns, and have no spaces
        commands="\n".join(
            f"ask {number} {seconds} {shlex.join(words)}" for number, (seconds, words) in enumerate(COMMANDS)
        ),
        private="\n".join(
            f'{{ {asked}; }} 2>/dev/null >"$T/private/{number}"; echo >>"$T/private/{number}" || no_room'
            for number, asked in enumerate(_PRIVATE.values())
        ),
    )


def unpacked(answer: str, device: str) -> Raw:
    """What the script found; raises DeviceError when the answer is none."""
    try:
        return _raw(dict(_entries(base64.b64decode("".join(answer.split()), validate=True))))
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        reason = str(error)
    except KeyError as error:
        reason = f"{error.args[0]} is not in it"
    raise DeviceError(f"{device}: its answer cannot be read: {reason}; record it again")


def _raw(entries: dict[str, str]) -> Raw:
    """Raises KeyError or ValueError where something is missing that the script always writes."""
    if "end" not in entries:
        raise ValueError("it breaks off")
    return Raw(
        files={path.removeprefix("files"): text for path, text in entries.items() if path.startswith("files/")},
        links=dict(line.split(" ", 1) for line in entries["links"].splitlines() if line),
        said=tuple(_said(entries)),
        private={kind: entries[f"private/{number}"].splitlines() for number, kind in enumerate(_PRIVATE)},
    )


def _entries(archive: bytes) -> Iterator[tuple[str, str]]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and ".." not in member.name.split("/"):
                yield member.name.removeprefix("./"), content.read().decode("utf-8", "surrogateescape")


def _said(entries: dict[str, str]) -> Iterator[Said]:
    for number, (_, command) in enumerate(COMMANDS):
        folder = f"said/{number}"
        if f"{folder}/program" in entries:
            code = int(entries[f"{folder}/code"])
            yield Said(
                command,
                entries[f"{folder}/program"].strip(),
                entries[f"{folder}/output"],
                entries[f"{folder}/errors"],
                0 if command[0] in STREAMS and code == 124 else code,
            )
