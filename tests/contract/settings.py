"""Settings that some methods need on the tests' tiny model, where their default is something made for another one."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path

from testbed.method import SEQUENCE_CLASSIFICATION, Workload
from testbed.model import initial
from testbed.model.adapters import LoraShape, export_peft, lora_tensors
from tests.contract.harness import CLASSES, base_model


def settings_of(name):
    """What a method is given beside its defaults."""
    return {
        "smartfed": lambda: {"pool": str(pool())},
        "fedkseed": lambda: {"seeds": 64},  # the model is rebuilt direction by direction, in every job
        "fwdllm": lambda: {"rank": 2, "candidates": 2},  # directions are made tensor by tensor, again and again
        "fedprompt": lambda: {"tokens": 8},  # with the texts' 16 tokens no more than the model has positions for
    }.get(name, dict)()


def in_contract(name, kind):
    """The method's class, or one like it whose defaults are what it needs here."""
    fields = [(setting, type(value), value) for setting, value in settings_of(name).items()]
    return make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True) if fields else kind


def words_of(name):
    """The settings on a command line."""
    return [word for setting, value in settings_of(name).items() for word in ("--set", f"{setting}={value}")]


@cache
def pool():
    """Two adapters of rank 4 with random factors, for the tests' model; they are gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix="adapters-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_pool(folder / "pool", base_model(folder))


def make_pool(folder, base):
    """Two adapters for a model; the folder again."""
    for seed in (1, 2):
        write_adapter(folder / f"random-{seed}", base, LoraShape(4, ("q_proj", "v_proj")), seed)
    return folder


def write_adapter(folder, base, lora, seed, alpha=8.0):
    """A PEFT adapter whose B is random too; gives its factors."""
    factors = {
        name: initial.uniform(tensor.shape, 0.5, seed, name) if "lora_B" in name else tensor
        for name, tensor in lora_tensors(base.shape, lora, seed).items()
    }
    export_peft(folder, base, factors, lora, alpha, 0.0, Workload(SEQUENCE_CLASSIFICATION, CLASSES))
    return factors
