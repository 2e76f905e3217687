"""What a user relies on: predictions without allocating, parts that add up, the largest choice that fits, real caps."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from methods.fedpruner import FedPruner
from methods.lora import Lora
from testbed.errors import LimitError
from testbed.method import ATTENTION, CAUSAL_LM, SEQUENCE_CLASSIFICATION, Block, Phase, Submodel, Workload
from testbed.model import blocks, tracing
from testbed.model.footprint import Baseline, Coefficients, predict
from testbed.node import limits
from testbed.plan import fit

MIB = 1 << 20
BASELINE = Baseline(165 * MIB, 110 * MIB, 113 * MIB)
NOTHING = Baseline(0)
BARE = Coefficients()


def config(hidden=64, layers=4, vocabulary=256, **more):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        **more,
    }


def shape_of(settings, task=SEQUENCE_CLASSIFICATION, stored="float32"):
    return blocks.describe(settings, task, 4, stored)


def work_of(task=SEQUENCE_CLASSIFICATION, **more):
    return Workload(task=task, labels=4, batch_size=4, length=64, **more)


def lora_bytes(shape, work, keep=None, baseline=NOTHING, fitted=BARE, **settings):
    method = Lora(**settings)
    phases = method.phases(Submodel.first(keep or len(shape)), shape, work)
    return predict(phases, shape, work, baseline, fitted)


def test_parts_add_up_and_are_named():
    shape = shape_of(config())
    footprint = lora_bytes(shape, work_of(), baseline=BASELINE)
    parts = footprint.largest.parts
    assert footprint.bytes == sum(parts.values())
    assert footprint.unreclaimable_bytes == footprint.bytes - BASELINE.library_bytes
    assert {"runtime", "weights", "outside", "adapters", "optimizer", "activations", "libraries"} <= set(parts)
    assert parts["runtime"] == BASELINE.bytes + BASELINE.first_step_bytes


def test_weights_and_optimizer_are_arithmetic():
    shape = shape_of(config())
    parts = lora_bytes(shape, work_of(), keep=3, rank=8).largest.parts
    adapted = sum(8 * (linear.inputs + linear.outputs) for block in shape.blocks[:3] for linear in block)
    assert parts["weights"] == 4 * sum(shape.block_elements[:3])
    assert parts["adapters"] == 4 * adapted
    assert parts["optimizer"] == 2 * 4 * (adapted + 4 * shape.hidden)  # a new head of 4 classes is trained too


def test_every_further_block_costs_the_same():
    shape = shape_of(config(layers=8))
    sizes = [lora_bytes(shape, work_of(), keep=keep).bytes for keep in range(2, 9)]
    steps = {later - earlier for earlier, later in itertools.pairwise(sizes)}
    assert len(steps) == 1
    assert steps.pop() > 4 * shape.block_elements[0]


@pytest.mark.parametrize(
    "settings",
    [
        config(layers=5),
        config(layers=5, model_type="qwen3", head_dim=16),
        config(layers=5, model_type="gemma2", head_dim=16, sliding_window=32),
        {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 256},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 5, "n_head": 4, "vocab_size": 51_000},
    ],
    ids=lambda settings: settings["model_type"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_putting_blocks_together_equals_tracing_all_of_them(settings, checkpointing, monkeypatch):
    """The prediction traces one block of each kind; tracing every block must give the very same peak."""
    from testbed.model import tracing

    shape = shape_of(settings)
    work = work_of(checkpointing=checkpointing)
    composed = lora_bytes(shape, work).bytes
    monkeypatch.setattr(tracing, "kinds", lambda phase, *_: tuple(f"{b.position}" for b in phase.blocks))
    assert composed == lora_bytes(shape, work).bytes


def test_a_kept_part_costs_less_than_its_block():
    shape = shape_of(config())
    method = Lora()
    whole = Submodel.first(3)
    cut = Submodel((*whole.blocks[:2], Block(2, None, (ATTENTION,))))
    sizes = [predict(method.phases(kept, shape, work_of()), shape, work_of(), NOTHING).bytes for kept in (whole, cut)]
    assert sizes[1] < sizes[0] - 4 * shape.part_elements[2]["feed_forward"]


def test_holdings():
    shape = shape_of(config(layers=8, hidden=256))
    work = work_of(checkpointing=True)
    resident, mapped, streamed = (
        lora_bytes(shape, replace(work, holding=holding)).largest for holding in ("resident", "mapped", "streamed")
    )
    block = 4 * shape.block_elements[0]
    assert resident.parts["weights"] == 8 * block
    assert mapped.unreclaimable_bytes == resident.unreclaimable_bytes - 8 * block - resident.parts["outside"]
    assert mapped.parts["mapped weights"] == block
    assert resident.unreclaimable_bytes - 8 * block < streamed.unreclaimable_bytes < resident.unreclaimable_bytes


def test_checkpointing_and_bfloat16_and_vocabulary_matter():
    shape = shape_of(config(layers=8))
    plain = lora_bytes(shape, work_of()).bytes
    assert lora_bytes(shape, work_of(checkpointing=True)).bytes < plain
    assert lora_bytes(shape, work_of(dtype="bfloat16")).bytes < plain
    model = lora_bytes(shape_of(config(vocabulary=50_000), CAUSAL_LM), work_of(CAUSAL_LM)).largest
    assert model.parts["logits"] >= 2.9 * 4 * 64 * 50_000 * 4


def test_a_streamed_probe_holds_one_block_and_saves_nothing():
    shape = shape_of(config(layers=8))
    work = work_of()
    probe = Phase("probe", Submodel.first(8).blocks, 4, 64, backward=False, head=False, streamed=True, kept_bytes=123)
    parts = predict([probe], shape, work, NOTHING, BARE).largest.parts
    assert parts["streamed block"] == 4 * shape.block_elements[0]
    assert parts["method"] == 123
    assert "weights" not in parts
    assert parts.get("activations", 0) <= 4 * 64 * shape.hidden * 4 * 2  # no block's inner values stay


def test_a_prefix_that_its_method_streams_costs_two_blocks_however_long_it_is():
    shape = shape_of(config(layers=8))
    block = 4 * shape.block_elements[0]

    def peak(prefix):
        kept = tuple(Block(p, streamed=p < prefix) for p in range(prefix + 1))
        phase = Phase("train", kept, 4, 64, backward=True, writable=(prefix,))
        return predict([phase], shape, work_of(), NOTHING, BARE).largest

    assert peak(2).parts["weights"] == peak(7).parts["weights"] == block
    assert peak(7).bytes == peak(3).bytes
    forward = Phase("probe", tuple(Block(p, streamed=True) for p in range(8)), 4, 64, backward=False)
    assert predict([forward], shape, work_of(), NOTHING, BARE).largest.parts["streamed block"] == 2 * block


def test_what_a_method_adds_beside_the_model_is_counted():
    shape = shape_of(config())
    phase = Phase("train", Submodel.first(2).blocks, 4, 64, backward=True, trained_elements=1_000_000)
    plain = replace(phase, trained_elements=shape.head_elements)
    more = predict([phase], shape, work_of(), NOTHING).bytes - predict([plain], shape, work_of(), NOTHING).bytes
    assert more >= 3 * 4 * 900_000  # itself and two optimizer slots


def test_writable_base_weights_have_gradients_and_slots():
    shape = shape_of(config())
    phase = Phase("train", Submodel.first(4).blocks, 4, 64, backward=True, writable=(3,))
    parts = predict([phase], shape, work_of(), NOTHING).largest.parts
    assert parts["optimizer"] == 2 * 4 * shape.block_elements[3]


def test_predicting_allocates_nothing_and_traces_a_model_once():
    """A model of 1.1 B parameters, on a machine that need not hold it."""
    large = shape_of(config(2048, 22, 32_000, intermediate_size=5632, num_attention_heads=32))
    work = replace(work_of(), length=512)
    tracemalloc.start()
    lora_bytes(large, work)
    assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    tracemalloc.stop()
    traced = tracing._trace.cache_info().misses
    for keep in range(1, 23):
        lora_bytes(large, work, keep=keep)
    assert tracing._trace.cache_info().misses - traced <= 2


METHODS = (FedPruner(), FedPruner(granularity="part"), FedPruner(selection="even"))


def test_a_gpu_has_its_context_and_its_caching_allocator():
    shape = shape_of(config())
    parts = lora_bytes(shape, work_of(accelerator="cuda"), baseline=Baseline(1, 2, 3, 400 * MIB)).largest.parts
    assert parts["context"] == 400 * MIB
    assert parts["caching"] > 0


def random_draws(count):
    """Methods on a few random models with random batches, each with random budgets around what they may need."""
    draw = random.Random(11)
    for index in range(count // 20):
        shape = shape_of(config(draw.choice([64, 128, 256]), draw.randint(3, 10), draw.choice([512, 8192])))
        work = Workload(labels=4, batch_size=draw.choice([1, 4, 16]), length=draw.choice([64, 77, 128]))
        method = METHODS[index % len(METHODS)]
        sizes = [predict(method.phases(c, shape, work), shape, work, BASELINE).bytes for c in method.choices(shape)]
        for _ in range(20):
            yield method, shape, work, draw.randint(min(sizes) - 2 * MIB, max(sizes) + 2 * MIB)


@pytest.mark.slow
@pytest.mark.beside
def test_the_largest_choice_that_fits_is_chosen():
    """200 draws: what was chosen fits; every larger choice, those that come before it, would not."""
    seen = {"planned": 0, "refused": 0}
    for method, shape, work, budget in random_draws(200):
        planned = fit(method, shape, work, budget, BASELINE)
        choices = list(method.choices(shape))
        chosen = choices.index(planned.submodel) if planned.submodel else len(choices)
        sizes = [predict(method.phases(c, shape, work), shape, work, BASELINE).bytes for c in choices[: chosen + 1]]
        assert all(size > budget for size in sizes[:chosen])
        assert planned.submodel is None or sizes[chosen] <= budget
        seen["planned" if planned.submodel else "refused"] += 1
    assert min(seen.values()) > 5


def test_a_damaged_baseline_cache_is_measured_again_and_then_kept(tmp_path, monkeypatch):
    from testbed.inventory import Budget, Device, HardwareProfile
    from testbed.node import baseline

    asked = []
    monkeypatch.setattr(
        baseline, "measure_here", lambda threads, accelerator: asked.append((threads, accelerator)) or Baseline(7, 8, 9)
    )
    device = Device("one", "emulated", HardwareProfile("p", "P", 1, 1, 1), Budget(1), threads=2)
    assert baseline.device_baseline(device, tmp_path) == Baseline(7, 8, 9)
    next(tmp_path.iterdir()).write_text("{")
    assert baseline.device_baseline(device, tmp_path) == Baseline(7, 8, 9)
    assert baseline.device_baseline(device, tmp_path) == Baseline(7, 8, 9)
    assert asked == [(2, "cpu"), (2, "cpu")]


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.beside
def test_nothing_chosen_runs_out_of_memory_under_its_real_cap(tmp_path):
    """A handful of draws: the choice that just fits survives a cap of exactly its prediction, in a real trainer."""
    try:
        limits.find_parent()
    except LimitError as error:
        pytest.skip(str(error))
    script = Path(__file__).parents[2] / "benchmarks" / "footprint.py"
    done = subprocess.run(
        [sys.executable, script, "--survive", "3", "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3
    assert all(result["survived"] for result in results), results
