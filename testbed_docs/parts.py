"""The pages of what is one file each: methods with their settings and evidence, meters, device kinds, profiles."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import testbed.devices
import testbed.meters
from testbed.byte_text import format_bytes
from testbed.commands.methods import prose, settings_of, summary, value_text
from testbed.config import load_profile
from testbed.meters import meter_class
from testbed.method import FAMILIES, Method
from testbed.package_data import data_folder
from testbed.plugins import all_methods, type_text
from testbed_docs.markdown import code, docstring, paragraphs, plain, table

_METHODS = """\
`testbed methods` lists them, `testbed methods NAME` prints what stands here of one. A setting is given with `--set
NAME=VALUE`, or under `set` in an [experiment file](experiment-file.md). What was measured of each is in [the
methods, family by family](../methods/README.md)."""
_METERS = """\
What [the page on meters](../meters.md) compares, one by one: how each is selected, what it reads, and from which
document a figure comes. This is the head of its file in `testbed/meters`. `point` can be said of every one, where it
measures something else than it says itself."""
_KINDS = """\
`kind:` in the inventory says which code drives a device. This is the head of its file in `testbed/devices`; what all
of them have in common is in the [inventory file](inventory.md)."""
_PROFILES = """\
The catalogue of `inventory/profiles`. *Usable* is what Linux sees of the memory; *unverified* names the fields whose
value rests on no cited source. The sources stand in each file. A profile of your own is `profiles/NAME.yaml` beside
your inventory: [adding a board](../how-to/add-a-board.md)."""


def methods_page() -> str:
    """Every method by its family, as `testbed methods NAME` tells it."""
    found = all_methods()
    families = [*FAMILIES, *sorted({method.family for method in found.values()} - set(FAMILIES))]
    parts = [
        "# Methods",
        _METHODS,
    ]
    for family in families:
        members = [(name, method) for name, method in found.items() if method.family == family]
        parts += [f"## {family}"] * bool(members) + [_method(*each) for each in members]
    return "\n\n".join(parts)


def _method(name: str, method: type[Method]) -> str:
    rows = [
        (code(each["name"]), code(value_text(each["default"])), plain(each["type"]), plain(each["about"]))
        for each in settings_of(method)
    ]
    needs = [
        ("memory of a client", method.memory),
        ("travels each round", method.traffic),
        ("learns from", method.data),
        ("tasks", ", ".join(sorted(method.tasks))),
    ]
    return "\n\n".join(
        [
            f"### {name} {{#{name}}}",
            plain(summary(method)),
            paragraphs(prose(method)),
            table(("", ""), [(title, plain(text)) for title, text in needs]),
            table(("setting", "default", "takes", "meaning"), rows),
        ]
    )


def meters_page() -> str:
    """Every meter: the head of its file, what it is, and its settings."""
    parts = [
        "# Meters",
        _METERS,
    ]
    for module in _modules(testbed.meters):
        name = module.__name__.rpartition(".")[2]
        kind = meter_class(name)
        facts = [
            ("read", f"by the {'agent on the board' if kind.where == testbed.meters.BOARD else 'controller'}"),
            ("point", code(kind.point)),
            ("a switch too", "yes" if kind.can_switch else "no"),
            ("read live", "no, after the run" if kind.retrospective else "yes"),
        ]
        parts += [f"## {name}", docstring(module), table(("", ""), facts), _settings(kind)]
    return "\n\n".join(parts)


def _settings(kind: type[testbed.meters.Meter]) -> str:
    """What the constructor takes."""
    found = [each for each in inspect.signature(kind).parameters.values() if each.kind is not each.VAR_KEYWORD]
    if not found:
        return "It has no settings of its own."
    hints = inspect.get_annotations(kind.__init__, eval_str=True)
    rows = [
        (
            code(each.name),
            plain(type_text(hints[each.name])),
            "required" if each.default is each.empty else code(value_text(each.default)),
        )
        for each in found
    ]
    return table(("setting", "takes", "default"), rows)


def kinds_page() -> str:
    """Every device kind, by the head of its file."""
    parts = [
        "# Device kinds",
        _KINDS,
    ]
    for module in _modules(testbed.devices):
        parts += [f"## {module.__name__.rpartition('.')[2]}", docstring(module)]
    return "\n\n".join(parts)


def profiles_page() -> str:
    """Every hardware profile of the catalogue."""
    head = (
        "profile",
        "board",
        "memory",
        "usable",
        "cores",
        "accelerator",
        "sensors at",
        "cgroup",
        "Python",
        "unverified",
    )
    rows = []
    for file in sorted((data_folder("inventory") / "profiles").glob("*.yaml")):
        board = load_profile(file)
        rows.append(
            (
                code(board.name), plain(board.title), format_bytes(board.memory_bytes),
                format_bytes(board.usable_memory_bytes), board.cores, board.accelerator or "–",
                code(board.measurement_point or ""), board.cgroup_default, board.python,
                ", ".join(map(code, board.unverified)) or "–",
            )
        )  # fmt: skip
    return "\n\n".join(
        [
            "# Hardware profiles",
            _PROFILES,
            table(head, rows),
        ]
    )


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(module.name)
