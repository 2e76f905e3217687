"""The documentation says what there is: every command, every link, the commands of the README's tables."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from testbed.cli import testbed_command as group

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/methods-interface.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links), links


def test_every_command_is_in_the_readme_and_has_help():
    context = click.Context(group)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in group.list_commands(context):
        assert f"testbed {name}" in readme
        command = group.get_command(context, name)
        assert command is not None
        assert command.help


def test_every_option_that_the_readme_names_exists():
    context = click.Context(group)
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= known | {"--write"}, named - known
