"""`testbed methods`: which methods there are, grouped by what they do, and what each needs; one of them in full."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import json_option
from testbed.method import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.method import Method

Kind = type["Method"]
#: In a docstring: a setting at the line's beginning, two spaces or more, and what it is.
_SETTING = re.compile(r"^(\w+) {2,}(\S.*)$")


@click.command("methods")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> int:
    """List the methods that run-method knows, as the field groups them; with NAME, one of them with its settings."""
    from testbed.plugins import find_method, sound_methods

    found, broken = sound_methods() if name is None else ({name: find_method(name)}, [])
    if as_json:
        click.echo(json.dumps([_as_json(each, kind) for each, kind in found.items()], indent=2, ensure_ascii=False))
    elif name is None:
        _print_list(found)
    else:
        _print_one(name, found[name])
    for error in broken:
        click.echo(f"testbed: {error}", err=True)
    return int(bool(broken))


def _as_json(name: str, method: Kind) -> dict[str, Any]:
    return {
        "name": name,
        "family": method.family,
        "tasks": sorted(method.tasks),
        "memory": method.memory,
        "traffic": method.traffic,
        "data": method.data,
        "summary": summary(method),
        "settings": {setting.pop("name"): setting for setting in settings_of(method)},
    }


def settings_of(method: Kind) -> list[dict[str, Any]]:
    """A method's own settings first, then those that it shares with others."""
    from testbed.plugins import setting_types, type_text

    kinds, told = setting_types(method), setting_texts(method)
    shared = {
        setting.name for base in method.__bases__ if hasattr(base, "__dataclass_fields__") for setting in fields(base)
    }
    return [
        {
            "name": setting.name,
            "type": type_text(kinds[setting.name]),
            "default": setting.default,
            "about": told.get(setting.name, ""),
        }
        for setting in sorted(fields(method), key=lambda setting: setting.name in shared)
    ]


def setting_texts(method: Kind) -> dict[str, str]:
    """What the class and those it derives from say of their settings, in their docstrings, each in one line."""
    found: dict[str, str] = {}
    for kind in method.__mro__:
        last = None
        for line in (inspect.cleandoc(vars(kind).get("__doc__") or "")).splitlines():
            if match := _SETTING.match(line):
                last = match[1] if match[1] not in found else None
                if last:
                    found[last] = match[2]
            elif last and line.startswith("  "):
                found[last] += f" {line.strip()}"
            else:
                last = None
    return found


def prose(method: Kind) -> str:
    """The class docstring without its lines on settings."""
    kept, inside = [], False
    for line in inspect.cleandoc(method.__doc__ or "").splitlines():
        inside = bool(_SETTING.match(line)) or (inside and line.startswith("  "))
        if not inside:
            kept.append(line)
    return "\n".join(kept).strip()


def summary(method: Kind) -> str:
    """The first line of the method's file: its name in the field, and what it does."""
    module = inspect.getmodule(method)
    return inspect.cleandoc((module and module.__doc__) or method.__doc__ or "").partition("\n")[0]


def _print_list(methods: Mapping[str, Kind]) -> None:
    from testbed.commands._table import show, table

    families = [*FAMILIES, *sorted({method.family for method in methods.values()} - set(FAMILIES))]
    rows = []
    for family in families:
        members = [(name, method) for name, method in methods.items() if method.family == family]
        if members:
            rows.append((family or "others", "", "", "", ""))
            rows += [
                (f"  {name}", method.memory, method.traffic, method.data, summary(method)) for name, method in members
            ]
    show(table(("method", "memory of a client", "travels each round", "learns from", "what it does"), rows))
    click.echo("\nsettings and evidence of one: testbed methods NAME; run it: testbed run-method NAME")


def _print_one(name: str, method: Kind) -> None:
    from testbed.commands._table import show, table

    click.echo(f"{name} ({method.family})\n")
    click.echo(prose(method) + "\n")
    needs = {"memory": method.memory, "travels each round": method.traffic, "learns from": method.data}
    for heading, need in needs.items():
        click.echo(f"{heading + ':':20}{need}")
    click.echo(f"{'tasks:':20}{', '.join(sorted(method.tasks))}")
    click.echo()
    rows = [(each["name"], value_text(each["default"]), each["type"], each["about"]) for each in settings_of(method)]
    show(table(("setting", "default", "takes", "meaning (--set NAME=VALUE)"), rows))


def value_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
