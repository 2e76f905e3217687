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
vary: {partition: [iid, "dirichlet:0.3"]}          # … every method with each of these
reference: lora                         # what the others are compared with; by default the first method
order_seed: 7                           # draws the order within the blocks of a seed; by default 0
protocol: {quality_under_budget: {seconds: 120}}   # or cost_to_target: {accuracy: 0.6}, or robustness: {…}
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
#: Options that are mappings themselves; what they may hold, their own parsers say.
MAPPINGS = {
    "until": 'a mapping such as {accuracy: 0.6, bytes: "50 MiB"}',
    "disturbances": "a mapping such as {dropout: 0.3}",
}
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
    if name in MAPPINGS:
        return dict[str, Any] | None, Field(default=None, title=MAPPINGS[name])
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


def _each_once(values: Sequence[Any]) -> Sequence[Any]:
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError("a list with nothing twice")
    return values


def _varied(kind: Any, title: str | None) -> Any:
    """Type and field of one of the options as an axis: a list of what it may be."""
    each: Any = typing.get_args(kind)[0]
    several: Any = Annotated[list.__class_getitem__(each), Field(min_length=1), AfterValidator(_each_once)]
    return several | None, Field(default=None, title=f"a list of different values, each {title}")


def _vary_options() -> dict[str, Any]:
    """Every option that is no mapping: what ends or disturbs a run is an axis of its own (`protocol`)."""
    options = _run_options().items()
    return {name: _varied(kind, field.title) for name, (kind, field) in options if name not in MAPPINGS}


if TYPE_CHECKING:
    RunOptions = FileModel
    VaryOptions = FileModel
else:
    RunOptions = create_model("RunOptions", __base__=FileModel, **_run_options())
    VaryOptions = create_model("VaryOptions", __base__=FileModel, **_vary_options())


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


Amount = Annotated[float, BeforeValidator(_number), Field(gt=0)]


class BudgetEntry(FileModel):
    """What a run may spend: the first of them that runs out ends it."""

    seconds: Amount | None = Field(default=None, title="a number of seconds above 0")
    joules: Amount | None = Field(default=None, title="a number of joules above 0")
    bytes: str | None = Field(default=None, title='bytes such as "50 MiB"')

    @model_validator(mode="after")
    def _any(self) -> BudgetEntry:
        if not self.model_dump(exclude_none=True):
            raise ValueError("any of seconds, joules and bytes")
        return self


class TargetEntry(FileModel):
    """What a run is to reach."""

    accuracy: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)] = Field(title="a share above 0 and up to 1")


class ProtocolEntry(FileModel):
    """How methods are judged, other than by where they stand after so many rounds."""

    quality_under_budget: BudgetEntry | None = Field(
        default=None,
        title="a mapping with any of seconds, joules and bytes, such as {seconds: 120}",
        description="Runs end when it is spent; what counts is the last evaluated round within.",
    )
    cost_to_target: TargetEntry | None = Field(
        default=None,
        title="a mapping such as {accuracy: 0.6}",
        description="Runs end when it is reached; what counts is what that took.",
    )
    robustness: dict[Annotated[str, Field(min_length=1)], dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        title="a mapping from names of your own to disturbances, such as {stragglers: {straggler: 3}}",
        description="Every run is done once clean, and once under each of these.",
    )

    @model_validator(mode="after")
    def _any(self) -> ProtocolEntry:
        if not self.model_dump(exclude_none=True):
            raise ValueError("any of quality_under_budget, cost_to_target and robustness")
        return self


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
    vary: VaryOptions = Field(
        default_factory=VaryOptions,
        title='a mapping from options to lists, such as {partition: [iid, "dirichlet:0.3"]}',
        description="Options of run-method with each of which everything is done: one more axis for every option.",
    )
    reference: str | None = Field(
        default=None,
        title="the label of a method",
        description="What the others are compared with, seed by seed; by default the first.",
    )
    order_seed: int = Field(
        default=0,
        ge=0,
        title="a whole number from 0",
        description="Draws the order in which the runs of a seed are done; no part of what tells them apart.",
    )
    protocol: ProtocolEntry | None = Field(
        default=None,
        title="a mapping such as {cost_to_target: {accuracy: 0.6}}",
        description="How methods are judged (docs/experiments.md); by default by where they stand in the end.",
    )


def experiment_schema() -> dict[str, Any]:
    """The published schema of an experiment (experiments/schema.json), for editors."""
    return published("Experiment of the testbed", ExperimentFile)
