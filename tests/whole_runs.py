"""Whole runs in a moment: real agents with a trainer that does what it is told, a real method's state and export."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from testbed.environment import describe_environment
from testbed.inventory import MeterChoice
from testbed.job import REST
from testbed.manifest import seal
from testbed.method import SEQUENCE_CLASSIFICATION, Client, Submodel, Workload
from testbed.plugins import make_method
from testbed.prepare import content_store
from testbed.run_record import FINISHED, RunRecord
from testbed.store import RunFolder
from testbed.task import Quality
from tests.drills import device, engine, job
from tests.model import tiny
from tests.run_records import planned

ROUNDS = 2
WORK = Workload(task=SEQUENCE_CLASSIFICATION, labels=tiny.LABELS)
STEADY = "# point: dc_input\n# total_rails: VIN\n# gain: 0.01\nseconds,VIN,PART\n0,5.0,2.0\n30,5.0,2.0\n"
SETTINGS = {"rank": "2", "targets": "q_proj,v_proj"}
STEPS = [
    ["phase", "train"],
    ["allocate", 4 << 20],
    ["take_time", 0.15],
    ["free"],
    ["phase", "merge"],
    ["take_time", 0.05],
]


def work_of_devices(folder: Path, *, capped: bool = False):
    """Results of two rounds, and rests before and after, of one emulated board with a meter that replays 5 W."""
    trace = folder / "steady.csv"
    trace.write_text(STEADY)
    board = replace(device(), meters=(MeterChoice("replay", {"file": str(trace), "repeat": True}),))
    jobs = [replace(job(f"run-r{index}-c0", steps=STEPS, update={"a": [300]}), round=index) for index in range(ROUNDS)]
    rests = [
        replace(job(f"run-rest-{when}", seconds=0.2), kind=REST, round=at)
        for when, at in (("before", -1), ("after", 2))
    ]
    with engine(folder, board, capped=capped) as running:
        sent = [rests[0], *jobs, rests[1]]
        results = [result for each in sent for result, _ in running.run([("board", each, None)])]
    assert all(result.finished for result in results), results
    # The drill's trainer says what a method's would: a loss, and so many examples.
    return [
        replace(each, examples=7, scalars={"loss": 1.5 - each.round}) if each.kind != REST else each for each in results
    ]


def base_model(folder: Path):
    """A small Llama, without any head of the task, as a folder of its own."""
    return tiny.save(tiny.make("llama", SEQUENCE_CLASSIFICATION).base_model, folder)


def record_of(base, *, seed: int = 0, **config) -> RunRecord:
    client = {**planned(0, "board", 64, 40, 4), "submodel": asdict(Submodel.first(len(base.shape)))}
    settings = asdict(make_method("lora", SETTINGS))
    plan = {
        "clients": [client],
        "model": {"name": str(base.folder), "outside": base.outside, "blocks": list(base.blocks)},
        "work": asdict(WORK),
    }
    config = {
        "method": "lora",
        "settings": settings,
        "model": str(base.folder),
        "task": SEQUENCE_CLASSIFICATION,
        "data": {"name": "docstrings"},
        "data_hash": "d0c5",
        "classes": ["a", "b", "c"],
        "shards": ["5a5a"],
        "rounds": ROUNDS,
        "seed": seed,
        "capped": True,
        "reference": {"majority": 0.4, "bag_of_words": 0.8, "no_fine_tuning": None},
        **config,
    }
    board = asdict(replace(device(), budget=replace(device().budget, memory_bytes=64 << 20)))
    inventory = {"source": "lab.yaml", "devices": [{**board, "tags": []}]}
    return RunRecord(plan, config, inventory, describe_environment(base.outside, "d0c5"))


def make_run(
    runs_dir: Path, name: str, model: Path, results, *, sealed: bool = True, seed: int = 0, **config
) -> RunFolder:
    """A finished run of LoRA over these results, whose state and export are the method's own."""
    base = tiny.BaseModel.open(model, content_store(), SEQUENCE_CLASSIFICATION, tiny.LABELS)
    folder = RunFolder.create(runs_dir, name, record_of(base, seed=seed, **config))
    method = make_method("lora", SETTINGS)
    state = method.start(base, WORK, [Client(0, "board", 7, Submodel.first(len(base.shape)))], seed, ROUNDS)
    folder.record_initial_state(state)
    folder.record_reference(no_fine_tuning=0.3)
    generator = torch.Generator().manual_seed(seed)
    trained = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.tensors.items()}
    state = replace(state, tensors=trained)
    for result in results:
        folder.record_result(result)
    for index in range(ROUNDS):
        folder.record_round(
            index, seconds=1.0 + index, learning_rate=0.002, participants=1, finished=1, deployed_bytes=10,
            train_loss=1.5 - index, quality=Quality(1.1 - index / 10, 0.5 + index / 10, 400),
        )  # fmt: skip
        folder.save_checkpoint(state, index + 1, {})
    method.export(state, base, WORK, folder.path / "export")
    folder.record_final_state(state)
    folder.set_status(FINISHED)
    if sealed:
        assert seal(folder)
    return folder
