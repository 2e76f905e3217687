"""`testbed evaluate RUN`: how good the model of a run is on data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import json_option, runs_option

if TYPE_CHECKING:
    from testbed.evaluation.record import Evaluation, Question
    from testbed.evaluation.subject import Subject

KINDS = ("multiple_choice", "exact_match", "perplexity")
#: Options that only one kind has; of the others they would be ignored in silence.
_OF_KIND = {
    "max_new_tokens": "exact_match",
    "stops": "exact_match",
    "extract": "exact_match",
    "ignore": "exact_match",
    "ignore_case": "exact_match",
    "stride": "perplexity",
}
_WRITTEN = {"kind": "--as", "words": "--data-set", "stops": "--stop"}


@click.command("evaluate")
@click.argument("run", required=False)
@click.option(
    "--model", metavar="FOLDER", help="In place of RUN: the causal language model, or PEFT adapter, in a folder."
)
@click.option("--data", metavar="FILE", help="A .jsonl, .csv or .parquet file, hf:OWNER/NAME, or docstrings.")
@click.option(
    "--as", "kind", type=click.Choice(KINDS), help="What the data are.  [default for classifiers: multiple_choice]"
)
@click.option(
    "--data-set",
    "words",
    multiple=True,
    metavar="NAME=VALUE",
    help="Which column is what: question=COLUMN, choices=COLUMN, answer=COLUMN, text=COLUMN, … (repeatable).",
)
@click.option("--prompt", metavar="TEXT", help=r"What is asked, with columns in braces: 'Q: {question}\nA:'.")
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="At most so many items, drawn at random but always the same."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="exact_match: tokens generated at most.  [default: 64]",
)
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help=r"exact_match: ends the answer.  [default: \n\n]")
@click.option("--extract", metavar="REGEX", help="exact_match: what of the answer is compared.")
@click.option("--ignore", multiple=True, metavar="REGEX", help="exact_match: removed before comparing (repeatable).")
@click.option("--ignore-case", is_flag=True, help="exact_match: capital letters make no difference.")
@click.option(
    "--stride",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="perplexity: from one window to the next.  [default: a window]",
)
@click.option(
    "--length",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Tokens at once.  [default: as many as the model takes]",
)
@click.option("--suite", metavar="NAME,…", help="Tasks of lm-evaluation-harness in place of --data: mmlu,gsm8k.")
@click.option("--suites-folder", type=click.Path(path_type=Path), metavar="DIR", help="Task definitions of your own.")
@click.option("--few-shot", type=click.IntRange(0), metavar="N", help="Suites: solved examples before each question.")
@click.option("--online", is_flag=True, help="Suites: let the harness download what is not in the cache.")
@click.option("--client", type=int, metavar="N", help="The personal model of a client, of methods that have one.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Items that are computed at once.")
@click.option("--accelerator", default="cpu", show_default=True, help="Where it is computed: cpu, or cuda.")
@click.option("--no-base", is_flag=True, help="Leave the untuned base model out.")
@click.option("--list", "listed", is_flag=True, help="Show the evaluations that the run has.")
@json_option
@runs_option
def command(**options: Any) -> None:
    """Evaluate the trained model of RUN, and the untuned base model beside it, on data of your own.

    The result is kept in the run's folder, as evaluations/NAME.json.  RUN is an id as `testbed runs` lists them, the
    beginning of one that no other run shares, or a path.
    """
    _check(options)
    if options["listed"]:
        _show(_stored(options), as_json=options["as_json"])
        return
    from testbed.evaluation import record
    from testbed.evaluation.subject import of_folder, of_run

    subject = (
        of_folder(options["model"], options["accelerator"])
        if options["model"]
        else of_run(options["runs_dir"], options["run"], options["client"], options["accelerator"])
    )
    question = _question(subject, options)
    made = record.evaluate(subject, question, with_base=not options["no_base"], say=_say)
    path = record.keep(subject.folder, made) if subject.folder else None
    _show([made], as_json=options["as_json"])
    if path is not None:
        _say(f"kept as {path}")


def _say(text: str) -> None:
    """On standard error: standard output is for the result."""
    click.echo(text, err=True)


def _check(options: dict[str, Any]) -> None:
    """Raise UsageError for words that do not go together."""
    if bool(options["run"]) == bool(options["model"]):
        raise click.UsageError("name one: a RUN (`testbed runs` lists them), or --model FOLDER")
    if options["model"] and (options["listed"] or options["client"] is not None):
        raise click.UsageError("--list and --client are of runs; a --model has no evaluations kept and no clients")
    if options["listed"]:
        return
    if bool(options["data"]) == bool(options["suite"]):
        raise click.UsageError("name one: --data FILE, or --suite NAME")
    for_data = ("kind", "words", "prompt", *_OF_KIND)
    for_suites = ("suites_folder", "few_shot", "online")
    strange = for_data if options["suite"] else for_suites
    for name in strange:
        if options[name]:
            raise click.UsageError(f"{_written(name)} goes with {'--data' if options['suite'] else '--suite'}")
    for name, kind in _OF_KIND.items():
        if options[name] and options["kind"] != kind:
            raise click.UsageError(f"{_written(name)} goes with --as {kind}")


def _written(name: str) -> str:
    """An option as the user writes it."""
    return _WRITTEN.get(name, f"--{name.replace('_', '-')}")


def _question(subject: Subject, options: dict[str, Any]) -> Question:
    from testbed.evaluation import ask
    from testbed.evaluation.harness import Suites
    from testbed.evaluation.items import Source
    from testbed.options import pairs

    settings = ask.Settings(
        batch_size=options["batch_size"],
        length=options["length"],
        stride=options["stride"],
        new_tokens=options["max_new_tokens"] or 64,
        stops=tuple(map(_unescaped, options["stops"])) or None,
        extract=options["extract"],
        ignore=options["ignore"],
        ignore_case=options["ignore_case"],
    )
    if options["suite"]:
        names = tuple(name.strip() for name in options["suite"].split(",") if name.strip())
        folder, few_shot, limit = options["suites_folder"], options["few_shot"], options["limit"]
        return ask.suites_of(subject, Suites(names, folder, few_shot, limit, options["online"]), settings)
    prompt = None if options["prompt"] is None else _unescaped(options["prompt"])
    source = Source(options["data"], pairs("--data-set", options["words"]), prompt, options["limit"])
    return ask.question_of(subject, options["kind"], source, settings, _say)


def _unescaped(text: str) -> str:
    r"""What a shell cannot easily be given: \n and \t."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _stored(options: dict[str, Any]) -> list[Evaluation]:
    from testbed.evaluation.record import kept
    from testbed.store import RunFolder

    return kept(RunFolder.open(options["runs_dir"], options["run"]))


def _show(evaluations: list[Evaluation], *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from testbed.commands._evaluations import lines_and_tables

    if as_json:
        click.echo(json.dumps([asdict(each) for each in evaluations], indent=2, ensure_ascii=False))
        return
    if not evaluations:
        click.echo("There are no evaluations of this run yet; `testbed evaluate RUN --data FILE --as KIND` makes one.")
    for each in evaluations:
        lines_and_tables(each)
