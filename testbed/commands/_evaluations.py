"""How an evaluation looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from testbed.commands._table import show, table
from testbed.quantities import DASH, number_text

if TYPE_CHECKING:
    from testbed.evaluation.figures import Figure
    from testbed.evaluation.record import Evaluation

_HEADINGS = ("figure", "tuned", "95 %", "± s.e.", "base model", "95 %", "difference", "95 %", "items")


def lines_and_tables(evaluation: Evaluation) -> None:
    """Print what was asked, the figures of both models with their intervals, and what a reader must know."""
    click.echo(_heading(evaluation))
    rows = [_row(evaluation, name) for name in evaluation.figures]
    show(table(_HEADINGS, rows, numbers=set(_HEADINGS) - {"figure"}))
    for name, value in evaluation.reference.items():
        click.echo(f"{name.replace('_', ' ')}: {number_text(value)}")
    for name in dict.fromkeys((*evaluation.notes, *evaluation.base_notes)):
        of_base = "" if evaluation.base is None else f", base model {evaluation.base_notes.get(name, 0)}"
        click.echo(f"{name.replace('_', ' ')}: tuned {evaluation.notes.get(name, 0)}{of_base}")
    if evaluation.model.get("evaluated_on_devices"):
        click.echo("this method's models are put together on their devices: here is what the server alone has")
    click.echo(f"defined: {evaluation.definition['words']}")


def _heading(evaluation: Evaluation) -> str:
    model = evaluation.model
    whose = model.get("run") or model.get("model")
    client = "" if model.get("client") is None else f", client {model['client']}"
    trained = f" after round {model['round']}{client}" if model.get("run") else ""
    data = evaluation.data
    items = f", {data['items']} of {data['available']} items" if "items" in data else ""
    return f"{whose}{trained}: {evaluation.kind} on {data['name']}{items}"


def _row(evaluation: Evaluation, name: str) -> tuple[str, ...]:
    ours = evaluation.figures[name]
    theirs = (evaluation.base or {}).get(name)
    between = (evaluation.difference or {}).get(name)
    signed = DASH if between is None or between.value is None else f"{between.value:+.3f}"
    return (
        name.replace("_", " ") if " " not in name else name,
        number_text(ours.value),
        _interval(ours),
        number_text(ours.standard_error),
        number_text(theirs.value if theirs else None),
        _interval(theirs),
        signed,
        _interval(between, sign="+"),
        str(ours.count),
    )


def _interval(figure: Figure | None, sign: str = "") -> str:
    if figure is None or figure.low is None or figure.high is None:
        return DASH
    return f"{figure.low:{sign}.3f} to {figure.high:{sign}.3f}"
