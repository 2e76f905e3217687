"""One job of any method on a model of random weights: what its server half orders, run in a fresh trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from footprint_cases import CLASSES, MODELS, Case
from footprint_job import measure_job, payload_of, write_model, write_shard

from testbed.job import Job
from testbed.method import IMAGE_CLASSIFICATION, Client, Method, Submodel

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.model.footprint import Baseline, Footprint

LABELS = 8


@dataclass(frozen=True)
class MethodCase:
    """A method's job in one of its rounds, for a client that was given the choice with `keep` blocks.

    keep   blocks of the choice (None: the largest one)
    width  share of its channels that the choice has
    round  the round whose job it is, out of `rounds`
    state  scalars of the method's state before that round, where they are not those of its start
    """

    method: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep: int | None = None
    width: float = 1.0
    round: int = 0
    rounds: int = 1
    state: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 8
    length: int = 128
    task: str = CLASSES
    dtype: str = "float32"
    stored: str = "float32"
    checkpointing: bool = False

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def base(self) -> Case:
        """The same model and workload, as the cases of `lora` have them."""
        return Case(
            self.model,
            0,
            self.batch,
            self.length,
            self.task,
            self.dtype,
            checkpointing=self.checkpointing,
            stored=self.stored,
        )

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in {**self.settings, **self.state}.items()]
        kept = "all" if self.keep is None else str(self.keep)
        wide = "" if self.width == 1 else f", width {self.width:g}"
        return (
            f"{self.method} {' '.join(words)} on {self.model}, keep {kept}{wide}, round {self.round} of {self.rounds}"
        )


def method_of(case: MethodCase, base: BaseModel) -> Method:
    """SmartFed composes adapters: two random ones for the case's own model."""
    from testbed.plugins import restore_method

    pool = {"pool": str(_random_pool(case, base))} if case.method == "smartfed" else {}
    return restore_method(case.method, {**case.settings, **pool})


def _random_pool(case: MethodCase, base: BaseModel) -> Path:
    from testbed.model.adapters import LoraShape, export_peft, lora_tensors

    pool = base.folder / f"pool-{case.model}"
    lora = LoraShape(4, ("query", "value") if case.model.startswith("bert") else ("q_proj", "v_proj"))
    for seed in (1, 2):
        if not (pool / str(seed)).is_dir():
            export_peft(pool / str(seed), base, lora_tensors(base.shape, lora, seed), lora, 8.0, 0.0, case.base.work)
    return pool


def choice_of(case: MethodCase, base: BaseModel) -> Submodel:
    """The largest of the method's choices that is as deep and as wide as the case says."""
    choices = method_of(case, base).choices(base.shape)
    return next(c for c in choices if c.width == case.width and case.keep in (None, len(c.blocks)))


def base_of(case: MethodCase, folder: Path) -> BaseModel:
    """The random model of a case as methods see a base model."""
    from testbed.model import blocks, checkpoint
    from testbed.model.content import ContentStore

    if case.task == IMAGE_CLASSIFICATION:  # of an image model the configuration is enough: its weights are drawn
        source = folder / case.model
        source.mkdir(exist_ok=True)
        (source / "config.json").write_text(json.dumps(MODELS[case.model]))
        return checkpoint.BaseModel.open(source, ContentStore(folder), case.task, LABELS)
    content = write_model(case.base, folder)
    config = MODELS[case.model]
    skeleton = blocks.skeleton(config, case.task, LABELS, "float32")
    new = blocks.head_names(skeleton, blocks.find(skeleton), case.task)
    head = {names[0]: shape for names, shape in checkpoint.wanted(skeleton) if names[0] in new}
    return checkpoint.BaseModel(
        folder,
        ContentStore(folder),
        case.task,
        LABELS,
        config,
        blocks.shape_of(skeleton, config, case.stored, head),
        tuple(content["blocks"]),
        content["outside"],
        content["config"],
        head,
    )


def predict_case(case: MethodCase, folder: Path, baseline: Baseline) -> Footprint:
    """What the plan predicts, phase by phase."""
    from testbed.model.footprint import predict

    base, work = base_of(case, folder), case.base.work
    return predict(method_of(case, base).phases(choice_of(case, base), base.shape, work), base.shape, work, baseline)


def write_job(case: MethodCase, folder: Path) -> Path:
    """What the method's server half orders in the round, as a job file with its payload beside it."""
    from testbed.updates import write_tensors

    base = base_of(case, folder)
    method = method_of(case, base)
    client = Client(0, "here", case.batch, choice_of(case, base))
    state = method.start(base, case.base.work, [client], 0, case.rounds)
    state = method.begin(replace(state, scalars={**state.scalars, **case.state}), base, case.round)
    [order] = method.order(state, base, [client], case.round)
    job = Job(
        id="case", run="benchmark", round=case.round, client=0, kind=order.kind, method=case.method,
        settings=dict(asdict(method)), config=base.config_hash, outside=base.outside,
        submodel=base.fill_in(order.submodel), shard=write_shard(case.base, folder), work=case.base.work, steps=2,
        learning_rate=1e-3, seed=1, scalars=order.scalars, further=order.contents, reads_base=order.reads_base,
    )  # fmt: skip
    path = folder / f"method-job-{os.getpid()}.json"
    path.write_text(json.dumps(job.to_json()))
    payload_of(path).unlink(missing_ok=True)
    if order.tensors:
        write_tensors(order.tensors, payload_of(path))
    return path


def measured_phases(case: MethodCase, folder: Path) -> dict[str, Any]:
    """Phase → its peaks (`lower_bytes`, `estimate_bytes`, …), of the phases that the footprint predicts."""
    path = write_job(case, folder)
    try:
        phases = measure_job(path, folder, str(case))["phases"]
    finally:
        path.unlink()
        payload_of(path).unlink(missing_ok=True)
    return {phase["name"]: phase["peak"] for phase in phases if phase["name"] not in ("load", "send")}
