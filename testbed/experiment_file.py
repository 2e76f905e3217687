"""An experiment's YAML file, read and checked: which methods, on which devices, models and data, with which seeds.

name: two methods
seeds: [0, 1, 2]
inventories: [default, lab.yaml]        # paths are relative to this file
models: [default, ./llama]
data: [docstrings, {name: reviews.csv, text: body, label: stars}]
methods:
  lora: {}
  fedpruner: {set: {granularity: part}, run: {rounds: 10}}
  fedpruner at random: {method: fedpruner, set: {selection: random}}
run: {rounds: 20, steps: 10}            # options of run-method, with underscores
"""

from __future__ import annotations

import typing
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from testbed.config import published
from testbed.method import HOLDINGS
from testbed.options import COLUMNS
from testbed.plugins import type_text
from testbed.run import RunConfig
from testbed.task import TASKS
from testbed.yaml_file import FileModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

#: An inventory, a model or data that the file leaves to run-method.
DEFAULT = "default"
#: What the file says in a place of its own, or in the words of the command line.
_ELSEWHERE = frozenset({"method", "settings", "model", "data", "seed", "partition", "capped"})
_CHOICES: dict[str, Any] = {
    "task": Literal[TASKS],
    "schedule": Literal["cosine", "constant"],
    "dtype": Literal["float32", "bfloat16"],
    "holding": Literal[HOLDINGS],
}


def _number(value: object) -> object:
    """YAML 1.1 reads 2e-3 as text: it is a number for whoever wrote it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _option(name: str, hint: Any) -> Any:
    """Type and field of one of RunConfig's settings, as the file may hold it."""
    kind = _CHOICES.get(name, hint)
    if float in (kind, *typing.get_args(kind)):
        kind = Annotated[kind, BeforeValidator(_number)]
    return kind | None, Field(default=None, title=type_text(_CHOICES.get(name, hint)))


def _run_options() -> dict[str, Any]:
    """RunConfig is the list: a setting that it gains can stand in a file at once."""
    hints = typing.get_type_hints(RunConfig)
    known = (field.name for field in fields(RunConfig) if field.name not in _ELSEWHERE)
    return {
        **{name: _option(name, hints[name]) for name in known},
        "partition": (str | None, Field(default=None, title="iid, dirichlet:ALPHA, label:CLASSES or natural")),
        "no_cap": (bool | None, Field(default=None, title="true or false")),
    }


def _share_or_name(value: object) -> object:
    """Checked here and not as a union, which would complain once for each of its types."""
    if isinstance(value, bool) or not isinstance(value, float | int | str | None):
        raise ValueError("a number or text")  # noqa: TRY004 -- pydantic gathers ValueErrors
    return value


ShareOrName = Annotated[
    Any, AfterValidator(_share_or_name), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]

if TYPE_CHECKING:
    RunOptions = FileModel
else:
    RunOptions = create_model("RunOptions", __base__=FileModel, **_run_options())


class DataEntry(FileModel):
    """A data set: its name alone, or with options as --data-set has them."""

    name: str = Field(
        default=DEFAULT,
        title='a name such as docstrings, a file such as reviews.csv, or "default"',
        description="As --data has it; what has a slash, or is a .jsonl, .csv or .parquet file, is a path.",
    )
    text: str | None = Field(default=None, title="the name of a column")
    label: str | None = Field(default=None, title="the name of a column")
    id: str | None = Field(default=None, title="the name of a column")
    instruction: str | None = Field(default=None, title="the name of a column")
    input: str | None = Field(default=None, title="the name of a column")
    response: str | None = Field(default=None, title="the name of a column")
    template: str | None = Field(default=None, title="the name of a template such as alpaca")
    held_out: ShareOrName = Field(default=None, title="a share between 0 and 1, a file, or the name of a split")
    per_class: int | None = Field(default=None, ge=1, title="a whole number from 1")
    limit: int | None = Field(default=None, ge=1, title="a whole number from 1")
    held_out_limit: int | None = Field(default=None, ge=1, title="a whole number from 1")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(core))]}

    @property
    def columns(self) -> dict[str, str]:
        """Our word → the data's column, for the words that were given."""
        return {word: getattr(self, word) for word in COLUMNS if getattr(self, word) is not None}


class MethodEntry(FileModel):
    """A method as it takes part: its settings, and options of run-method that hold for it alone."""

    method: str | None = Field(
        default=None,
        title="the name of a method such as lora",
        description="Where the label is not the method's name.",
    )
    set: dict[str, Any] = Field(
        default={}, title="a mapping such as {rank: 16}", description="The method's settings, as --set has them."
    )
    run: RunOptions = Field(
        default_factory=RunOptions,
        title="a mapping such as {rounds: 10}",
        description="Options of run-method; they go before those of the experiment.",
    )


def _each_once(values: Sequence[Any]) -> Sequence[Any]:
    if len(set(values)) < len(values):
        raise ValueError("a list with nothing twice")
    return values


class ExperimentFile(FileModel):
    """A matrix of runs: every method with every seed, on all data, models and inventories."""

    name: str = Field(min_length=1, title="a name", description="What the experiment is called.")
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_each_once)] = Field(
        default=[0], min_length=1, title="a list of different whole numbers from 0"
    )
    inventories: list[str] = Field(
        default=[DEFAULT],
        min_length=1,
        title='a list of inventory files, or "default"',
        description="Relative to this file; default: the four emulated devices that come along.",
    )
    models: list[str] = Field(
        default=[DEFAULT],
        min_length=1,
        title='a list of models, or "default"',
        description="As --model has them; what has a slash is a folder, relative to this file; default: the task's.",
    )
    data: list[DataEntry] = Field(
        default=[DataEntry()],
        min_length=1,
        title="a list of data sets: names, or mappings such as {name: reviews.csv, text: body}",
        description="Default: the task's.",
    )
    methods: dict[Annotated[str, Field(min_length=1)], MethodEntry] = Field(
        min_length=1,
        title="a mapping from each method to its settings, such as {lora: {}}",
        description="By the method's name, or by a label of your own with the key `method`.",
    )
    run: RunOptions = Field(
        default_factory=RunOptions,
        title="a mapping such as {rounds: 20}",
        description="Options of run-method that hold for every method.",
    )


def experiment_schema() -> dict[str, Any]:
    """The published schema of an experiment (experiments/schema.json), for editors."""
    return published("Experiment of the testbed", ExperimentFile)
