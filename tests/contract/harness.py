"""The round loop on a planted task, its jobs done serially in this process: what the contract is tested on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testbed.errors import TestbedError
from testbed.job import FAILED, FINISHED, UNREACHABLE, Result, TensorSpec
from testbed.method import IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Client, Submodel, Workload
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.held import HeldWeights
from testbed.node.workplace import Workplace
from testbed.rounds import Run
from testbed.run import PLANNED, ClientPlan, Plan, RunConfig
from testbed.run_record import RunRecord
from testbed.store import RunFolder
from testbed.task import Example, Shard
from testbed.updates import write_tensors

_STEPS = {
    "steps": 4,
    "batch_size": 16,
    "length": 16,
    "learning_rate": 2e-2,
    "final_learning_rate": 5e-3,
    "evaluate_every": 1,
}
CLASSES = 4
VOCABULARY = 64
BLOCKS = 4
WORK = Workload(SEQUENCE_CLASSIFICATION, CLASSES, batch_size=16, length=16)
IMAGES = Workload(IMAGE_CLASSIFICATION, CLASSES, batch_size=16)
SIDE = 16
TILE = 4
RESNET = {
    "model_type": "resnet", "image_size": SIDE, "num_channels": 3, "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16], "depths": [1] * BLOCKS, "layer_type": "basic", "hidden_act": "relu",
    "downsample_in_first_stage": False,
}  # fmt: skip


def work_of(method) -> Workload:
    """What a method's own task is here."""
    return IMAGES if method.default_task == IMAGE_CLASSIFICATION else WORK


def base_model(folder: Path, seed: int = 0, task: str = SEQUENCE_CLASSIFICATION) -> BaseModel:
    """A random 4-block Llama, saved and split as any base model is; of images, a ResNet of 4 stages without weights."""
    if task == IMAGE_CLASSIFICATION:
        return image_model(folder, RESNET)
    source = folder / "model"
    if not source.exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(source)
    return BaseModel.open(source, ContentStore(folder / "content"), SEQUENCE_CLASSIFICATION, CLASSES)


def image_model(folder: Path, config) -> BaseModel:
    """An image model of which there is only the configuration, its initial weights drawn."""
    source = folder / "images"
    source.mkdir(parents=True, exist_ok=True)
    if not (source / "config.json").exists():
        (source / "config.json").write_text(json.dumps(config))
    return BaseModel.open(source, ContentStore(folder / "content"), IMAGE_CLASSIFICATION, CLASSES)


def planted(count: int, seed: str) -> list[Example]:
    """Random tokens of which every third belongs to the class's own four: a bag of words tells the class."""
    draw = Random(seed)
    examples = []
    for index in range(count):
        label = index % CLASSES
        own = range(8 + 4 * label, 12 + 4 * label)
        ids = [draw.choice(own) if draw.random() < 0.35 else draw.randrange(24, VOCABULARY) for _ in range(15)]
        examples.append(Example([*ids, 2], label=label))
    return examples


def planted_images(count: int, seed: str) -> list[Example]:
    """Noise, to which the class's own small pattern is added all over the image."""
    draw = np.random.default_rng(list(seed.encode()))
    tiles = np.random.default_rng(0).integers(0, 2, (CLASSES, 3, TILE, TILE), np.uint8) * 60
    examples = []
    for index in range(count):
        label = index % CLASSES
        noise = draw.integers(0, 190, (3, SIDE, SIDE), np.uint8)
        examples.append(Example(label=label, pixels=noise + np.tile(tiles[label], (1, SIDE // TILE, SIDE // TILE))))
    return examples


def shard_of(task: str, count: int, seed: str) -> Shard:
    """Planted examples of a task."""
    examples = planted_images(count, seed) if task == IMAGE_CLASSIFICATION else planted(count, seed)
    return Shard.of(examples, task, CLASSES)


@dataclass
class SerialRunner:
    """Does every job here and now: the same Workplace, the same files, no agent and no processes."""

    method: object
    base: BaseModel
    folder: Path
    absent: set[int] = field(default_factory=set)  # clients that cannot be reached
    jobs: list = field(default_factory=list)
    phases: list = field(default_factory=list)
    weights: HeldWeights = field(default_factory=HeldWeights)
    deployed_bytes: int = 0

    def run(self, jobs):
        for _, job, payload in jobs:
            self.jobs.append(job)
            yield self._do(job, payload)

    def _do(self, job, payload):
        result = Result(job.id, job.client, job.round, FINISHED, device="here", kind=job.kind)
        if job.client in self.absent:
            return replace(result, outcome=UNREACHABLE, error="no answer"), None
        state = self.folder / "state" / str(job.client)
        workplace = Workplace(job, self.base.store.folder, payload, state, self.weights, self)
        try:
            update = self.method.work(workplace)
        except TestbedError as error:
            return replace(result, outcome=FAILED, error=str(error)), None
        finally:
            workplace.release()
        return self._sent(result, job, update, state)

    def _sent(self, result, job, update, state):
        from testbed.node.trainer import dtype_word, keep_state

        tensors = {name: part.tensor.detach().contiguous() for name, part in update.tensors.items()}
        path = write_tensors(tensors, self.folder / "updates" / f"{job.id}.safetensors")
        specs = tuple(
            TensorSpec(name, dtype_word(tensors[name]), tuple(tensors[name].shape), update.tensors[name].ranges)
            for name in sorted(tensors)
        )
        kept = keep_state(update, state)
        return replace(result, examples=update.examples, scalars=dict(update.scalars), tensors=specs, state=kept), path

    def phase(self, name):
        self.phases.append(name)

    def progress(self, **figures):
        pass


class Silent:
    """A watcher that watches nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def run_of(method, folder: Path, *, clients=4, rounds=2, seed=0, keep=None, held_out=200, **config) -> Run:
    """A run of the method's own task, ready to federate.

    Every client trains `keep` blocks (None: the method's largest choice).
    """
    task = method.default_task
    base = base_model(folder, task=task)
    shards = [shard_of(task, 48, f"{seed}/{client}") for client in range(clients)]
    choices = list(method.choices(base.shape))
    submodel = choices[0] if keep is None else next(c for c in choices if len(c.blocks) == keep)
    plan = Plan(tuple(
        ClientPlan(c, "here", len(shards[c]), 1 << 30, PLANNED, submodel) for c in range(clients)
    ))  # fmt: skip
    settings = RunConfig(
        method="under test", settings=dataclasses.asdict(method), rounds=rounds, seed=seed,
        **{**_STEPS, **config},
    )  # fmt: skip
    runs = folder / "runs"
    record = RunRecord({"clients": []}, {"method": "under test"}, {}, {})
    return Run(
        folder=RunFolder.create(runs, f"run-{len(list(runs.glob('*')))}", record),
        config=settings,
        plan=plan,
        method=method,
        base=base,
        store=base.store,
        work=work_of(method),
        shards=[_stored(base.store, shard) for shard in shards],
        held_out=shard_of(task, held_out, f"{seed}/held out"),
        baselines={},
        engine=SerialRunner(method, base, folder / f"node-{type(method).__name__}-{seed}"),
        watcher=Silent(),
    )


def given(run: Run, submodels: list[Submodel]) -> Run:
    """The same run with a submodel of its own for each client."""
    clients = [replace(plan, submodel=own) for plan, own in zip(run.plan.clients, submodels, strict=True)]
    return replace(run, plan=Plan(tuple(clients)))


def clients_of(run: Run) -> list[Client]:
    return [client.client() for client in run.plan.taking_part]


def _stored(store, shard):
    path = store.folder / "shard.partial"
    shard.save(path)
    return store.put_file(path)
