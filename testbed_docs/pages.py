"""The pages of the reference by their names: each is a function that gives its Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from testbed import errors
from testbed.exporter import families
from testbed_docs.commands import commands_page
from testbed_docs.files import experiment_page, inventory_page
from testbed_docs.markdown import code, paragraphs, plain, table
from testbed_docs.parts import kinds_page, meters_page, methods_page, profiles_page

_ERRORS = """\
Whatever goes wrong in a way that was thought of is one message: the state, what was asked, and the way out. A
command that is used wrongly (`UsageError`) exits with 2, every other of these with 1. In Python they are classes of
`testbed.errors`, so that a script can tell them apart. A job that fails on a device is none of them: it is a result
with its outcome and its cause."""


def errors_page() -> str:
    """The tree of errors, as the code has it."""
    rows = [(f"{'&emsp;' * depth}{code(kind.__name__)}", plain(kind.__doc__ or "")) for kind, depth in _tree()]
    return "\n\n".join(
        [
            "# Errors",
            _ERRORS,
            table(("error", "is raised for"), rows),
        ]
    )


def _tree(kind: type[Exception] = errors.TestbedError, depth: int = 0) -> Iterator[tuple[type[Exception], int]]:
    yield kind, depth
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _tree(below, depth + 1)


def metrics_page() -> str:
    """Every family of Prometheus metrics."""
    groups = {
        "Devices": families.DEVICE_FAMILIES,
        "The run under way": families.RUN_FAMILIES,
        "Runs of the store": families.RESULT_FAMILIES,
    }
    parts = ["# Metrics", paragraphs((families.__doc__ or "").partition("\n\n")[2])]
    for title, group in groups.items():
        rows = [
            (code(each.name), " ".join(each.labels) or "–", each.kind, each.unit or "–", plain(each.about))
            for each in group
        ]
        parts += [f"## {title}", table(("name", "labels", "type", "unit", "meaning"), rows)]
    return "\n\n".join(parts)


PAGES: Mapping[str, Callable[[], str]] = {
    "commands": commands_page,
    "inventory": inventory_page,
    "experiment-file": experiment_page,
    "methods": methods_page,
    "meters": meters_page,
    "device-kinds": kinds_page,
    "profiles": profiles_page,
    "errors": errors_page,
    "metrics": metrics_page,
}
