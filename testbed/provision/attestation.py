"""Whether a board is still what its image made it: a list of assertions, and what was changed by hand since.

An image that was rendered here tells on the board what it is (/etc/edge-testbed/image.json), and its recipe has the
list of what then holds (attestation.yaml).  A board of another origin is not attested.  What was found at the end of
the first attested visit is the baseline; what differs from it at the beginning of a later visit has drifted: somebody
changed it by hand.  What provisioning changes itself is no drift.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from testbed.byte_text import format_bytes
from testbed.device_images import catalogue
from testbed.device_images.render import IDENTITY
from testbed.provision.part import Answer, Part
from testbed.provision.step import Facts, Note, Problem
from testbed.yaml_file import FileModel, read_file

if TYPE_CHECKING:
    from testbed.inventory import Device

_SSHD, _SSHD_DROP_INS = "/etc/ssh/sshd_config", "/etc/ssh/sshd_config.d/*.conf"
#: The paths are the image's own words: one a line, never taken for options or split.
_SCRIPT = f"""\
[ -r {IDENTITY} ] || exit 0
sed -n 's/^  "\\(\\/[^"]*\\)": "[0-9a-f]*",\\{{0,1\\}}$/\\1/p' {IDENTITY} |
while IFS= read -r path; do sha256sum -- "$path" || echo "missing  $path"; done
echo "packages=$(dpkg-query -W 2>/dev/null | sha256sum | cut -c1-16)"
"""


class AttestationFile(FileModel):
    """A recipe's attestation.yaml."""

    assertions: dict[
        Literal[
            "memory_cgroup", "swap", "clock", "password_login", "root_login", "desktop", "power_mode", "sensors",
            "files",
        ],
        str,
    ] = Field(title="a mapping from what is asserted to what is expected", min_length=1)  # fmt: skip


@dataclass(frozen=True)
class Assertion:
    """One assertion, and what was found; `holds` is None where it could not be told."""

    name: str
    expected: str
    found: str | None
    holds: bool | None


@dataclass(frozen=True)
class Drift:
    """What is another thing than at the last visit, and was not changed by a visit."""

    what: str
    was: str
    now: str


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _parse(answer: Answer) -> dict[str, Any]:
    text = answer.text(IDENTITY)
    try:
        told = json.loads(text or "null")
        image = isinstance(told, dict) and {
            "name": str(told["image"]),
            "recipe": str(told["recipe"]),
            "device": str(told["device"]),
            "digest": hashlib.sha256((text or "").encode()).hexdigest()[:16],
            "files": {str(path): str(digest) for path, digest in told["files"].items()},
            "files_now": _digests(answer.output),
            "packages": answer.values.get("packages") or None,
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        image = False
    return {"image": image or None, "sshd": _sshd(answer.files)}


PART = Part("image", _parse, files=(IDENTITY, _SSHD, _SSHD_DROP_INS), script=_SCRIPT)


def _digests(output: str) -> dict[str, str | None]:
    found = re.findall(r"^([0-9a-f]{64}|missing)  (/.*)$", output, re.MULTILINE)
    return {path: None if digest == "missing" else digest for digest, path in found}


def _sshd(files: Mapping[str, str]) -> dict[str, str | None]:
    """What sshd lets in, by its files: of a word that comes twice the first counts, and drop-ins come where they are
    included.  None where it cannot be told: no file to read, or a Match block that speaks of it.
    """
    if _SSHD not in files:
        return {"passwords": None, "keyboard": None, "root": None}
    lines: list[str] = []
    for line in files[_SSHD].splitlines():
        if re.match(r"\s*include\s+\S*sshd_config\.d/\*\.conf", line, re.IGNORECASE):
            drop_ins = sorted(path for path in files if path.startswith(f"{_SSHD}.d/"))
            lines += [each for path in drop_ins for each in files[path].splitlines()]
        else:
            lines.append(line)
    words = {
        "passwords": (("passwordauthentication",), "yes"),
        "keyboard": (("kbdinteractiveauthentication", "challengeresponseauthentication"), "yes"),
        "root": (("permitrootlogin",), "prohibit-password"),
    }
    return {name: _effective(lines, keys, default) for name, (keys, default) in words.items()}


def _effective(lines: list[str], keys: tuple[str, ...], default: str) -> str | None:
    value, in_match = None, False
    for line in lines:
        key, _, rest = re.sub(r"[\s=]+", " ", line.strip()).partition(" ")
        in_match = in_match or key.lower() == "match"
        if key.lower() in keys:
            if in_match:
                return None
            value = value or rest.strip('" ').lower()
    return value or default


# ── assertions ───────────────────────────────────────────────────────────────────────────────────────────────────────
def attest(facts: Facts, device: Device) -> tuple[Assertion, ...]:
    """Every assertion of the image that the board names; () where it names none, or one that the catalogue lacks."""
    image = facts.get("image")
    known = catalogue.images().get(image["name"]) if image else None
    if known is None:
        return ()
    return tuple(_judged(name, expected, facts, device) for name, expected in _expected(known.recipe).items())


@cache
def _expected(recipe: str) -> Mapping[str, str]:
    path = catalogue.folder() / recipe / "attestation.yaml"
    assertions = read_file(path, AttestationFile, "an attestation").assertions
    return {str(name): expected for name, expected in assertions.items()}


def _judged(name: str, expected: str, facts: Facts, device: Device) -> Assertion:
    if expected == "inventory":
        expected = device.power_mode or "any"
    found = _FOUND[name](facts, device)
    holds = None if found is None else expected in {"any", found}
    return Assertion(name, expected, found, holds)


def _swap(facts: Facts, _: Device) -> str:
    swap = facts["swap"]
    made = [f"{each['name']} ({format_bytes(each['bytes'])})" for each in swap["devices"]]
    return ", ".join(made or swap["sources"]) or "none"


def _password_login(facts: Facts, _: Device) -> str | None:
    ways = [facts["sshd"]["passwords"], facts["sshd"]["keyboard"]]
    if "yes" in ways:
        return "allowed"
    return None if None in ways else "refused"


def _root_login(facts: Facts, _: Device) -> str | None:
    return {"no": "refused", None: None}.get(facts["sshd"]["root"], "allowed")


def _sensors(facts: Facts, device: Device) -> str:
    """Of a Jetson the rails that its profile names; of a Raspberry Pi 5 vcgencmd, which reads the PMIC."""
    rails = [rail.name for rail in device.profile.rails if rail.source.startswith("ina")]
    missing = [name for name in rails if name not in facts["meters"]["rails"]]
    if any(rail.source.startswith("pmic") for rail in device.profile.rails) and not facts["meters"]["vcgencmd"]:
        missing.append("vcgencmd")
    return f"lacks {', '.join(missing)}" if missing else "readable"


def _files(facts: Facts, _: Device) -> str:
    image = facts["image"]
    changed = [path for path, digest in image["files"].items() if image["files_now"].get(path) != digest]
    return f"changed: {', '.join(changed)}" if changed else "unchanged"


_FOUND: Mapping[str, Callable[[Facts, Any], str | None]] = {
    "memory_cgroup": lambda facts, _: facts["memory_cgroup"]["version"] or "off",
    "swap": _swap,
    "clock": lambda facts, _: "synchronised" if facts["clock"]["synchronised"] else "not synchronised",
    "password_login": _password_login,
    "root_login": _root_login,
    "desktop": lambda facts, _: "running" if facts["board"]["desktop"] else "none",
    "power_mode": lambda facts, _: facts["power_mode"],
    "sensors": _sensors,
    "files": _files,
}


class Attestation:
    """The last of the board's steps: what its image promises holds, now that the others have worked."""

    name = "attestation"

    def check(self, facts: Facts, device: Device) -> Problem | Note | None:
        assertions = attest(facts, device)
        if not assertions:
            return None
        broken = [f"{each.name} is {each.found}, not {each.expected}" for each in assertions if each.holds is False]
        untold = [each.name for each in assertions if each.holds is None]
        text = f"{facts['image']['name']}: {sum(each.holds is True for each in assertions)} of {len(assertions)} hold"
        if untold:
            text += f"; {', '.join(untold)} cannot be told"
        return Problem(self.name, "; ".join([text, *broken])) if broken else Note(self.name, text)


# ── drift ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def state_of(facts: Facts, device: Device) -> dict[str, str] | None:
    """What is compared from visit to visit, in words; None for a board that is not attested."""
    assertions = attest(facts, device)
    if not assertions:
        return None
    state = {each.name: each.found for each in assertions if each.name != "clock"}  # it comes and goes by itself
    state |= {
        "kernel": facts["board"]["kernel"],
        "kernel's command line": facts["boot"]["command_line"],
        "list of packages": facts["image"]["packages"],
    }
    return {name: text for name, text in state.items() if text is not None}


def drift(stored: Mapping[str, Any] | None, facts: Facts, device: Device) -> tuple[Drift, ...]:
    """What differs from the baseline of the last sheet; nothing for a board that was made anew since."""
    old = _baseline_of(stored, facts)
    now = state_of(facts, device) or {}
    return tuple(Drift(name, old[name], text) for name, text in now.items() if old.get(name, text) != text)


def record(
    stored: Mapping[str, Any] | None, facts: Facts, device: Device, found: tuple[Drift, ...], *, accept: bool
) -> dict[str, Any] | None:
    """What the sheet keeps: assertions, drift, and the next baseline; None for a board that is not attested.

    What had drifted keeps its old baseline until it is mended or accepted: it is told again.
    """
    state = state_of(facts, device)
    if state is None:
        return None
    old = _baseline_of(stored, facts)
    kept = {} if accept else {each.what: old[each.what] for each in found if state.get(each.what) != old[each.what]}
    return {
        "image": facts["image"]["name"],
        "recipe": facts["image"]["recipe"],
        "identity": facts["image"]["digest"],
        "assertions": [asdict(each) for each in attest(facts, device)],
        "drift": [] if accept else [asdict(each) for each in found if each.what in kept],
        "baseline": {**state, **kept},
    }


def _baseline_of(stored: Mapping[str, Any] | None, facts: Facts) -> Mapping[str, str]:
    before = (stored or {}).get("attestation") or {}
    same = facts.get("image") and before.get("identity") == facts["image"]["digest"]
    return before.get("baseline") or {} if same else {}
