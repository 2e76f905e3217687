"""LoRA of unlike ranks, and LoRA that is corrected or prepared: two rounds give what the references give."""

from __future__ import annotations

import pytest
import torch

from methods.flexlora import FlexLora
from methods.flora import Flora
from methods.hetlora import HetLora
from methods.lora_fair import LoraFair
from methods.slora import SLora
from tests.reference import flexlora, flora, hetlora, lora_fair, slora
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of
from tests.reference.model import HEAD

RANKS = (3, 2)
ALPHA = 32.0


def common(run):
    """What every reference is given."""
    return weights_of(run), started(run).tensors, data_of(run), run.config.rounds


def products(tensors):
    """B A of every map, and everything that is no factor: what does not depend on how a product is divided."""
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    found = {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}
    return found | {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}


def compared_flora(folder, mutation):
    run = float64_run(Flora(ranks=RANKS), folder)
    state, end = started(run), finished(run)
    begun = [run.method.begin(state, run.base, index).tensors for index in range(run.config.rounds)]
    drawn = [
        {name.removesuffix(".lora_A.weight"): a.double() for name, a in one.items() if name.endswith("lora_A.weight")}
        for one in begun
    ]
    expected = flora.run(
        *common(run), drawn=drawn, ranks=RANKS, alpha=ALPHA, learning_rates=rates_of(run), mutation=mutation
    )
    merged = {**weights_of(run), HEAD: end.tensors[HEAD]}
    for content in end.scalars["stacks"]:
        for name, product in products(run.base.tensors(content)).items():
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + product
    return largest_difference(merged, expected)


def compared_hetlora(folder, mutation):
    """A penalty so large that the second round prunes."""
    run = float64_run(HetLora(ranks=RANKS, penalty=0.5, decay=0.8), folder)
    end = finished(run)
    expected, ranks = hetlora.run(
        *common(run), ranks=RANKS, scale=ALPHA / 3, penalty=0.5, decay=0.8, learning_rates=rates_of(run),
        mutation=mutation,
    )  # fmt: skip
    if mutation is None:
        assert end.scalars["ranks"] == {"0": ranks[0], "1": ranks[1]}
        assert ranks != list(RANKS), "nobody pruned"
    return largest_difference(end.tensors, expected)


def compared_flexlora(folder, mutation):
    run = float64_run(FlexLora(ranks=RANKS), folder)
    expected = flexlora.run(*common(run), ranks=RANKS, scale=ALPHA / 3, learning_rates=rates_of(run), mutation=mutation)
    return largest_difference(products(finished(run).tensors), products(expected))


def compared_lora_fair(folder, mutation):
    """At a smaller scale than the others: Adam's first steps enlarge what the rotary tables have in float32 only."""
    run = float64_run(LoraFair(rank=2, alpha=8.0), folder)
    expected = lora_fair.run(*common(run), scale=4.0, ridge=0.01, learning_rates=rates_of(run), mutation=mutation)
    return largest_difference(finished(run).tensors, expected)


def compared_slora(folder, mutation):
    run = float64_run(SLora(rank=2), folder, rounds=3)
    [snapshot] = run.method.snapshots(started(run), run.base)
    elements = {
        name.removesuffix(".sparse_at"): tensor
        for name, tensor in snapshot.tensors.items()
        if name.endswith(".sparse_at")
    }
    expected = slora.run(
        *common(run), sparse_rounds=1, elements=elements, rank=2, scale=ALPHA / 2, learning_rates=rates_of(run),
        mutation=mutation,
    )  # fmt: skip
    found = {name: tensor for name, tensor in finished(run).tensors.items() if not name.endswith(".sparse")}
    return largest_difference(products(found), products(expected))


COMPARED = {
    "flora": (compared_flora, "noise"),
    "hetlora": (compared_hetlora, "holders"),
    "flexlora": (compared_flexlora, "factors"),
    "lora_fair": (compared_lora_fair, "sign"),
    "slora": (compared_slora, "scale"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_the_rounds_give_what_the_reference_gives(name, tmp_path):
    compared, _ = COMPARED[name]
    assert compared(tmp_path, None) < 1e-5


@pytest.mark.parametrize("name", COMPARED)
def test_a_reference_that_is_wrong_on_purpose_is_told_apart(name, tmp_path):
    compared, mutation = COMPARED[name]
    assert compared(tmp_path, mutation) > 1e-3


def test_the_sparse_stage_alone_gives_what_the_reference_gives(tmp_path):
    run = float64_run(SLora(rank=2, sparse_share=0.5), tmp_path, rounds=1)
    [snapshot] = run.method.snapshots(started(run), run.base)
    places = {name: tensor for name, tensor in snapshot.tensors.items() if name.endswith(".sparse_at")}
    expected = slora.run(
        *common(run), sparse_rounds=1, rank=2, scale=ALPHA / 2, learning_rates=rates_of(run),
        elements={name.removesuffix(".sparse_at"): tensor for name, tensor in places.items()},
    )  # fmt: skip
    found = {name: tensor for name, tensor in finished(run).tensors.items() if ".lora_" not in name}
    assert largest_difference(found, expected) < 1e-5
    assert all(bool((tensor != 0).any()) for name, tensor in found.items())
    assert all(torch.equal(where, where.unique()) for where in places.values())
