"""The documentation says what there is: every command, every link, every option; what it tells to type can be typed.

That its commands work is shown by tests/test_documented_commands.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess

import click
import pytest

from testbed.cli import testbed_command as group
from tests.pages import PAGES, ROOT, commands_of, inline_commands

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
EVERY_PAGE = pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)


def parse(words):
    """Find the command and let click read its words; raises UsageError for what it does not take."""
    command, context = group, click.Context(group, info_name="testbed")
    words = list(words)
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            break
        name = words.pop(0)
        below = command.get_command(context, name)
        assert below is not None, f"there is no command {name}"
        command, context = below, click.Context(below, info_name=name, parent=context)
    command.make_parser(context).parse_args(words)


@EVERY_PAGE
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists() and "reference/" not in link]
    assert not broken  # the pages of the reference are made with the site, whose build checks links to them


def test_every_command_is_in_the_readme_and_has_help():
    context = click.Context(group)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in group.list_commands(context):
        assert f"testbed {name}" in readme
        command = group.get_command(context, name)
        assert command is not None
        assert command.help


@EVERY_PAGE
def test_every_command_can_be_typed_as_it_stands(page):
    for typed in commands_of(page):
        parse(typed.words)
    for text in inline_commands(page):
        parse(shlex.split(re.sub(r"[\[\]…]| or ", " ", text)))


@EVERY_PAGE
def test_every_target_of_make_exists(page):
    for typed in commands_of(page, "make"):
        done = subprocess.run(
            ["make", "--dry-run", *typed.words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "No rule to make target" not in done.stderr


@EVERY_PAGE
def test_every_script_exists_and_knows_its_options(page):
    for typed in commands_of(page, "python"):
        script, *words = typed.words
        if script != "-m":
            source = (ROOT / script).read_text(encoding="utf-8")
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


@EVERY_PAGE
def test_every_option_that_a_page_names_exists(page):
    known = {option for command in every_command(group, click.Context(group)) for option in options_of(command)}
    text = page.read_text(encoding="utf-8")
    named = {name for line in text.splitlines() if "testbed " in line for name in OPTION.findall(line)}
    assert named <= known, named - known


def options_of(command):
    return [option for parameter in command.params for option in parameter.opts]


def every_command(command, context):
    """The command and all below it."""
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from every_command(command.get_command(context, name), context)
