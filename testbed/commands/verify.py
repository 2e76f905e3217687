"""`testbed verify`: a run's figures derived again, and what of them does not hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import json_option, runs_option

if TYPE_CHECKING:
    from testbed.verification.checks import Check, Verification

_FAILED = 1
#: Of one check on the terminal; --json has all of them.
_MOST_LINES = 8
_WORD_COLUMNS, _VERDICT_COLUMNS = 12, 19


@click.command("verify")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--no-data", is_flag=True, help="Leave the data set out, which takes seconds to read and to hash.")
@json_option
@runs_option
def command(runs: tuple[str, ...], no_data: bool, as_json: bool, runs_dir: Path) -> int:
    """Derive every figure of each RUN again from its raw samples, and say what does not hold.

    A RUN is an id as `testbed runs` lists them, the beginning of one that no other run shares, a path, or an
    experiment's file or name with all of its runs.  The exit code is 0 when nothing was found that does not hold, and
    1 otherwise; what cannot be checked is told with the reason, and is no failure.
    """
    from testbed.commands._chosen import chosen_folders
    from testbed.verification.run import verify

    made = []
    for folder in chosen_folders(runs, runs_dir):
        verification = verify(folder, data=not no_data)
        made.append(verification)
        if not as_json:
            _show(verification)
    if as_json:
        click.echo(json.dumps([_plain(each) for each in made], indent=2, ensure_ascii=False))
    return 0 if all(each.holds for each in made) else _FAILED


def _plain(verification: Verification) -> dict[str, Any]:
    return {**asdict(verification), "verdict": verification.verdict}


def _show(verification: Verification) -> None:
    click.echo(f"run {verification.run} ({verification.state}): {verification.verdict}")
    for check in verification.checks:
        click.echo(f"  {check.name:<{_WORD_COLUMNS}}{check.verdict:<{_VERDICT_COLUMNS}}{check.found}")
        for line in _lines(check):
            click.echo(f"  {'':<{_WORD_COLUMNS}}{line}")


def _lines(check: Check) -> list[str]:
    return [*_some(check.failures, "- "), *_some(check.notes, "note: ")]


def _some(texts: Sequence[str], mark: str) -> list[str]:
    more = len(texts) - _MOST_LINES
    lines = [f"{mark}{text}" for text in texts[:_MOST_LINES]]
    return [*lines, f"{mark}and {more} more (--json lists them)"] if more > 0 else lines
