"""The page of the commands: every command with its arguments, options and defaults, from click."""

from __future__ import annotations

from collections.abc import Iterator

import click

from testbed.cli import FAILED, INTERRUPTED, WRONG_USE, testbed_command
from testbed_docs.markdown import code, paragraphs, plain, table


def commands_page() -> str:
    """Every command, in the order of its name."""
    found = list(_commands(testbed_command, click.Context(testbed_command, info_name="testbed")))
    head = [
        "# Commands",
        "`testbed COMMAND --help` says the same in a terminal. Paths are relative to where the command is typed.",
        table(("command", "does"), [(f"[`{name}`](#{_anchor(name)})", plain(_first(it))) for name, it, _ in found]),
        "## Exit codes",
        table(("code", "means"), _exit_codes()),
    ]
    return "\n\n".join([*head, *(_section(*each) for each in found)])


def _exit_codes() -> list[tuple[str, str]]:
    return [
        (code(0), "all went well"),
        (code(FAILED), "a device or a job failed, or a file is wrong"),
        (code(WRONG_USE), "the command was used wrongly"),
        (code(INTERRUPTED), "interrupted with Ctrl-C"),
    ]


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Name as it is typed, command and context, of all that is no group."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
        else:
            yield inner.command_path, command, inner


def _section(name: str, command: click.Command, context: click.Context) -> str:
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    options = [each for each in command.get_params(context) if isinstance(each, click.Option) and not each.hidden]
    rows = [
        (
            ", ".join(code(way) for way in (*each.opts, *each.secondary_opts)),
            _takes(each, context),
            _about(each, context),
        )
        for each in options
    ]
    return "\n\n".join(
        [
            f"## {name} {{#{_anchor(name)}}}",
            f"```text\n{usage}\n```",
            paragraphs((command.help or "").replace("\b\n", "")),
            table(("option", "takes", "meaning"), rows),
        ]
    )


def _takes(option: click.Option, context: click.Context) -> str:
    return "–" if option.is_flag or option.count else code(option.make_metavar(context))


def _about(option: click.Option, context: click.Context) -> str:
    about = plain(option.help or "")
    default = option.get_default(context, call=False)
    stated = option.show_default and default is not None and not callable(default)
    return f"{about} Default: {code(default)}." if stated else about


def _first(command: click.Command) -> str:
    """The first sentence of its help."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def _anchor(name: str) -> str:
    return name.removeprefix("testbed ").replace(" ", "-")
