"""The pages of the YAML files: every key of inventory, profile and experiment, from the models that read them."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import click
from pydantic import BaseModel

from testbed import config
from testbed.commands.run_method import command as run_method
from testbed.config import InventoryFile, ProfileFile
from testbed.experiments import file as experiment_file
from testbed.experiments.file import ExperimentFile, RunOptions
from testbed_docs.markdown import code, paragraphs, plain, table

if typing.TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_EDITORS = """\
An unknown key is refused with the nearest right one, and a wrong value with what was expected. Editors that know YAML
schemas complete the keys and check the values as you type, with `# yaml-language-server: $schema=PATH` in the first
line, the path being that of"""
_PROFILES = "`profiles/NAME.yaml` beside the inventory, or one of [those that come along](profiles.md)."


def inventory_page() -> str:
    """The inventory file, and the file of a hardware profile."""
    return "\n\n".join(
        [
            "# Inventory file",
            _opening(config),
            f"{_EDITORS} `inventory/schema.json`.",
            *_tables(InventoryFile, "The file"),
            "## Hardware profile",
            _PROFILES,
            _keys(ProfileFile),
        ]
    )


def experiment_page() -> str:
    """The experiment file."""
    return "\n\n".join(
        [
            "# Experiment file",
            _opening(experiment_file),
            f"{_EDITORS} `experiments/schema.json`.",
            *_tables(ExperimentFile, "The file"),
        ]
    )


def _opening(module: object) -> str:
    """The module's docstring shows the file; its first paragraph is for the code's readers."""
    example = (module.__doc__ or "").partition("\n\n")[2].strip()
    return f"```yaml\n{example}\n```"


def _tables(model: type[BaseModel], title: str) -> Iterator[str]:
    """One table for the model, and one for every model in it."""
    seen: dict[type[BaseModel], str] = {model: title}
    waiting = [model]
    while waiting:
        current = waiting.pop(0)
        yield f"## {seen[current]}"
        if current is not model and _own_words(current):
            yield paragraphs(_own_words(current))
        yield _keys(current)
        for name, field in current.model_fields.items():
            for inner in _models_in(field.annotation):
                if inner not in seen:
                    seen[inner] = f"{seen[current]}: {name}" if current is not model else name
                    waiting.append(inner)


def _own_words(model: type[BaseModel]) -> str:
    """Its docstring, and not that of what it derives from."""
    return vars(model).get("__doc__") or ""


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _keys(model: type[BaseModel]) -> str:
    """A row for every key.  What the model leaves to run-method, run-method says."""
    options = {option.name or "": option for option in run_method.params if isinstance(option, click.Option)}
    of_runs = model.model_fields.keys() <= RunOptions.model_fields.keys()
    rows = []
    for name, field in model.model_fields.items():
        option = options.get(name) if of_runs else None
        default = code(option.default) if option and option.show_default and model is RunOptions else _default(field)
        about = field.description or (option and option.help) or ""
        rows.append((code(field.alias or name), plain(field.title or ""), default, plain(about)))
    return table(("key", "expects", "default", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = None if field.default_factory is not None else field.default
    if default is None or isinstance(default, BaseModel) or default in ([], {}):
        return "–"
    if isinstance(default, list) and all(isinstance(each, BaseModel) for each in default):
        return "–"
    return code(default)
