"""Runs as the round loop leaves them, made without any training: weights are random."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from testbed.method import CAUSAL_LM, Client, State, Submodel, Workload
from testbed.model.checkpoint import BaseModel
from testbed.plugins import make_method
from testbed.prepare import QUICKSTART, content_store, model_folder
from testbed.run_record import RunRecord
from testbed.store import RunFolder

CONTEXT = 128


def make_model(folder: Path) -> Path:
    """A small random Llama with the tokenizer of the model that comes along."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, pad_token_id=0, eos_token_id=2, bos_token_id=None,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder(QUICKSTART) / name, folder)
    return folder


def make_run(
    lab: Path, run_id: str, method: str = "lora", task: str = CAUSAL_LM, classes: tuple[str, ...] = ()
) -> RunFolder:
    """A run of two rounds whose tensors are far enough from their start to change what the model says."""
    made = make_method(method, {})
    work = Workload(task, max(2, len(classes)), length=32)
    base = BaseModel.open(lab / "model", content_store(), task, work.labels)
    client = Client(0, "one", 100, Submodel.first(len(base.shape)))
    state = moved(made.start(base, work, [client], seed=0, rounds=2))
    plan = {
        "clients": [],
        "model": {"name": "model", "blocks": list(base.blocks), "outside": base.outside},
        "work": dataclasses.asdict(work),
    }
    config = {
        "method": method,
        "settings": dataclasses.asdict(made),
        "model": str(lab / "model"),
        "task": task,
        "classes": list(classes),
        "data": {"name": "data.jsonl"},
        "rounds": 2,
        "seed": 0,
    }
    folder = RunFolder.create(lab / "runs", run_id, RunRecord(plan, config, {"devices": []}, {"packages": {}}))
    folder.save_checkpoint(state, 2)
    made.export(state, base, work, folder.path / "export")
    return folder


def moved(state: State, by: float = 0.05) -> State:
    """The state with noise on every tensor."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: each + by * torch.randn(each.shape, generator=generator) for name, each in state.tensors.items()}
    return dataclasses.replace(state, tensors=tensors)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
