"""The documentation says what there is: every command, every link, the commands of the README's tables."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from testbed.cli import testbed_command as group

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


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


def _commands(command, context):
    """The command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from _commands(command.get_command(context, name), context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page):
    commands = _commands(group, click.Context(group))
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    text = page.read_text(encoding="utf-8")
    named = {name for line in text.splitlines() if "testbed " in line for name in OPTION.findall(line)}
    assert named <= known, named - known
