"""DevFT: which blocks are grouped, what a fused block is, and where its adapters go."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
import torch

from methods import _fusion
from methods._fusion import cosine_similarity, fused_block, fused_tensor
from methods.devft import DevFT
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.method import SEQUENCE_CLASSIFICATION
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.combine import state_hash
from testbed.model.tensorfile import put_tensors
from testbed.model.tracing import LiveBytes
from testbed.package_data import PACKAGE
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, run_of
from tests.reference import devft
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def begun(run, index=0):
    return run.method.begin(started(run), run.base, index)


def relative(run, state, position):
    """What a block's adapters are in a state, by their names inside the block."""
    prefix = f"{run.base.shape.block_prefix}.{position}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}


# ── against the reference ────────────────────────────────────────────────────────────────────────────────────────────
def compared(tmp_path, mutation=None, **settings):
    """How far two stages (2 blocks, then all 4) of the method are from the reference's, on the method's groups."""
    run = float64_run(DevFT(rank=2, capacities=(2, 4), **settings), tmp_path)
    groups = begun(run).scalars["groups"]
    assert max(map(len, groups)) > 1
    expected = devft.run(
        weights_of(run), started(run).tensors, data_of(run), (1, 1), groups_by_stage=(groups, [[0], [1], [2], [3]]),
        beta=run.method.beta, scale=16.0, learning_rates=rates_of(run), mutation=mutation,
    )  # fmt: skip
    return largest_difference(finished(run).tensors, expected)


@pytest.mark.parametrize("settings", [{}, {"grouping": "even", "beta": 0.3}])
def test_two_stages_give_what_the_reference_gives(settings, tmp_path):
    # Fused base weights are kept in the base model's float32; the reference's are float64.
    assert compared(tmp_path, **settings) < 1e-5


def test_a_reference_that_subtracts_the_differences_is_told_apart(tmp_path):
    assert compared(tmp_path, mutation="sign") > 1e-3


def test_similarities_and_groups_are_those_of_the_reference(tmp_path):
    run = float64_run(DevFT(rank=2), tmp_path)
    state = started(run)
    found = run.method._similarity(state, run.base)
    expected = devft.similarity(weights_of(run), state.tensors)
    assert torch.allclose(found, expected, atol=1e-12)
    for count in (2, 3):
        method = DevFT(rank=2, capacities=(count, 4))
        groups = method.begin(method.start(run.base, WORK, [], 0, 2), run.base, 0).scalars["groups"]
        assert groups == devft.grouped(expected, count)


# ── grouping ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_blocks_of_like_weights_are_grouped_whether_or_not_they_are_neighbours(tmp_path):
    run = run_of(DevFT(rank=2, capacities=(2, 4)), tmp_path)
    draw = torch.Generator().manual_seed(0)
    kinds = [run.base.tensors(content) for content in run.base.blocks[:2]]
    contents = [
        run.base.put({name: t + 0.01 * torch.randn(t.shape, generator=draw) for name, t in kinds[position % 2].items()})
        for position in range(4)
    ]
    run.base = replace(run.base, blocks=tuple(contents))
    assert begun(run).scalars["groups"] == [[0, 2], [1, 3]]


def test_the_newest_adapters_are_part_of_the_similarity(tmp_path):
    run = run_of(DevFT(rank=2), tmp_path)
    state = started(run)
    large = {name: 100 * torch.ones_like(t) if ".1." in name else t for name, t in state.tensors.items()}
    before, after = (run.method._similarity(s, run.base) for s in (state, replace(state, tensors=large)))
    assert not torch.allclose(before[1, 2:], after[1, 2:], atol=1e-3)
    assert torch.allclose(before[2, 3], after[2, 3])


@pytest.mark.parametrize("shift", ["half", "clip"])
def test_nearly_orthogonal_blocks_end_in_one_large_group_whose_anchor_is_lost(shift, tmp_path):
    base = BaseModel.open(PACKAGE / "quickstart", ContentStore(tmp_path), SEQUENCE_CLASSIFICATION, 4)
    method = DevFT(rank=2, capacities=(2, 12), similarity_shift=shift)
    state = method.begin(method.start(base, WORK, [], 0, 2), base, 0)
    assert sorted(map(len, state.scalars["groups"])) == [1, 11]
    assert method._shares(11)[0] == pytest.approx(0.0)
    paths = [base.store.path(content) for content in base.blocks]
    apart = cosine_similarity(paths, [{}] * 12)[~torch.eye(12, dtype=torch.bool)]
    assert 0.015 < apart.min() < apart.max() < 0.035


@pytest.mark.parametrize("shift", ["half", "clip"])
def test_opposite_blocks_have_no_similarity_and_equal_ones_have_all(shift, tmp_path):
    run = run_of(DevFT(rank=2, similarity_shift=shift), tmp_path)
    own = run.base.tensors(run.base.blocks[0])
    opposite = run.base.put({name: -tensor for name, tensor in own.items()})
    run.base = replace(run.base, blocks=(run.base.blocks[0], run.base.blocks[0], opposite, opposite))
    state = replace(started(run), tensors={})
    found = run.method._similarity(state, run.base)
    assert torch.allclose(found, torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).double())


def test_even_groups_are_neighbours_and_random_ones_hang_on_the_seed_alone(tmp_path):
    base = base_model(tmp_path)

    def groups(grouping, seed):
        method = DevFT(rank=2, capacities=(2, 4), grouping=grouping)
        return method.begin(method.start(base, WORK, [], seed, 2), base, 0).scalars["groups"]

    assert groups("even", 0) == [[0, 1], [2, 3]]
    drawn = [groups("random", seed) for seed in range(8)]
    assert all(sorted(position for group in found for position in group) == [0, 1, 2, 3] for found in drawn)
    assert drawn[5] == groups("random", 5)
    assert len({str(found) for found in drawn}) > 1


# ── fusion ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def files(tmp_path, count=3, shape=(64, 8), dtype=torch.float32):
    store, draw = ContentStore(tmp_path / "store"), torch.Generator().manual_seed(0)
    blocks = [
        {name: torch.randn(shape, generator=draw).to(dtype) for name in ("a.weight", "b.weight")} for _ in range(count)
    ]
    return [store.path(put_tensors(store, block)) for block in blocks], blocks


@pytest.mark.parametrize("fusion", ["differential", "mean", "anchor", "sum"])
def test_a_group_of_one_is_itself_whatever_the_fusion(fusion, tmp_path):
    assert DevFT(fusion=fusion)._shares(1) == [1.0]
    paths, [block] = files(tmp_path, count=1)
    fused = fused_block(paths, DevFT(fusion=fusion)._shares(1))
    assert all(torch.equal(fused[name], block[name]) for name in block)


def test_beta_of_one_over_the_groups_size_is_the_mean(tmp_path):
    paths, blocks = files(tmp_path, count=4)
    fused, mean = (fused_block(paths, method._shares(4)) for method in (DevFT(beta=0.25), DevFT(fusion="mean")))
    for name in fused:
        assert torch.allclose(fused[name], mean[name], atol=1e-7)
        assert torch.allclose(fused[name], torch.stack([block[name] for block in blocks]).mean(0), atol=1e-6)


def test_the_ablations_are_the_anchor_alone_and_the_plain_sum(tmp_path):
    paths, blocks = files(tmp_path)
    anchor, plain = (fused_block(paths, DevFT(fusion=fusion)._shares(3)) for fusion in ("anchor", "sum"))
    for name in anchor:
        assert torch.equal(anchor[name], blocks[0][name])
        assert torch.allclose(plain[name], blocks[0][name] + blocks[1][name] + blocks[2][name], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_neither_a_fused_block_nor_a_similarity(dtype, tmp_path, monkeypatch):
    paths, blocks = files(tmp_path, dtype=dtype)
    adapters = [{"a.lora_A.weight": block["a.weight"][:2].float()} for block in blocks]
    whole = fused_block(paths, [0.8, 0.1, 0.1]), cosine_similarity(paths, adapters)
    monkeypatch.setattr(_fusion, "SLICE_BYTES", 8 * 3 * 7)  # 7 values of each of 3 blocks; 512 is no multiple of it
    sliced = fused_block(paths, [0.8, 0.1, 0.1]), cosine_similarity(paths, adapters)
    assert all(torch.equal(whole[0][name], sliced[0][name]) for name in whole[0])
    assert torch.allclose(whole[1], sliced[1], atol=1e-12)
    assert all(tensor.dtype == dtype for tensor in sliced[0].values())
    flat = torch.stack([
        torch.cat([t.double().flatten() for t in [*block.values(), *own.values()]])
        for block, own in zip(blocks, adapters, strict=True)
    ])  # fmt: skip
    assert torch.allclose(whole[1], torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1))


def peak_bytes(compute):
    """Tensors' bytes at their highest, and those of all else that Python allocates (what was read from files)."""
    tracemalloc.start()
    try:
        with LiveBytes(lambda size: size) as tensors:
            compute()
        return tensors.section().peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_grouping_holds_slices_and_fusing_one_block_beside_them_never_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(_fusion, "SLICE_BYTES", 1 << 20)
    paths, blocks = files(tmp_path, count=12, shape=(1024, 512))
    block_bytes = sum(tensor.nbytes for tensor in blocks[0].values())
    del blocks
    compared = peak_bytes(lambda: cosine_similarity(paths, [{}] * 12))
    fused = peak_bytes(lambda: fused_block(paths, DevFT()._shares(12)))
    assert block_bytes == 4 << 20
    assert 1 << 20 < compared < block_bytes, "of twelve blocks, less than one"
    assert block_bytes < fused < 2 * block_bytes


def test_adapters_are_fused_as_base_weights_are(tmp_path):
    paths, blocks = files(tmp_path)
    shares = DevFT()._shares(3)
    assert torch.equal(
        fused_tensor([block["a.weight"] for block in blocks], shares), fused_block(paths, shares)["a.weight"]
    )


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_one_stage_of_the_whole_model_is_vanilla_federated_lora_bit_for_bit(tmp_path):
    grown = federate(run_of(DevFT(rank=4, capacities=(4,)), tmp_path / "grown", **SHORT))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain", **SHORT))
    assert state_hash(grown.tensors, {}) == state_hash(plain.tensors, {})


def test_the_last_stage_is_the_base_model_itself(tmp_path):
    run = run_of(DevFT(rank=2), tmp_path, rounds=3, **SHORT)
    federate(run)
    last = [job for job in run.engine.jobs if job.round == 2]
    assert {tuple(block.content for block in job.submodel.blocks) for job in last} == {run.base.blocks}


def test_a_stage_trains_fused_blocks_in_the_order_of_their_anchors_and_all_of_a_group_learn_the_same(tmp_path):
    # Nobody can hold the second stage, so that the state at the end is that of the first.
    run = run_of(DevFT(rank=2, capacities=(2, 4), grouping="even"), tmp_path, keep=2, **SHORT)
    before, after = begun(run), federate(run)
    [submodel] = {job.submodel for job in run.engine.jobs}
    assert submodel.positions == (0, 2)
    assert not {block.content for block in submodel.blocks} & set(run.base.blocks)
    for anchor, other in ((0, 1), (2, 3)):
        trained, copied = relative(run, after, anchor), relative(run, after, other)
        assert all(torch.equal(trained[name], copied[name]) for name in trained)
        assert any(not torch.equal(trained[name], tensor) for name, tensor in relative(run, before, anchor).items())


def test_the_state_is_the_transferred_global_model_as_soon_as_a_stage_begins(tmp_path):
    run = run_of(DevFT(rank=2, capacities=(2, 4), grouping="even"), tmp_path)
    start, state = started(run), begun(run)
    for name, tensor in relative(run, state, 0).items():
        first, second = relative(run, start, 0)[name], relative(run, start, 1)[name]
        assert torch.allclose(tensor, first + 0.1 * (second - first), atol=1e-7)
        assert torch.equal(tensor, relative(run, state, 1)[name])
    [snapshot] = run.method.snapshots(state, run.base)
    assert run.base.fill_in(snapshot.submodel).blocks == run.base.fill_in(snapshot.submodel.first(4)).blocks


def test_a_stage_is_made_once_and_made_again_where_its_blocks_are_gone(tmp_path):
    run = run_of(DevFT(rank=2, capacities=(2, 4)), tmp_path, rounds=4)
    state = begun(run)
    assert run.method.begin(state, run.base, 1).scalars == state.scalars
    [made] = [content for content in state.scalars["blocks"] if content not in run.base.blocks]
    path = run.base.store.path(made)
    before = path.stat().st_mtime_ns
    assert run.method.begin(state, run.base, 1).scalars == state.scalars
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert run.method.begin(state, run.base, 1).scalars == state.scalars
    assert run.base.store.has(made)


def test_a_client_that_cannot_hold_a_stage_is_left_out_of_it(tmp_path):
    run = run_of(DevFT(rank=2), tmp_path, rounds=3, keep=2, **SHORT)
    federate(run)
    assert [job.round for job in run.engine.jobs] == [0, 0, 1, 1]
    assert [len(job.submodel.blocks) for job in run.engine.jobs] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("blocks", "stages", "depths"),
    [(12, 4, (2, 3, 6, 12)), (32, 4, (4, 8, 16, 32)), (40, 4, (5, 10, 20, 40)), (4, 4, (1, 2, 4)), (1, 4, (1,))],
)
def test_capacities_are_the_depth_halved(blocks, stages, depths):
    assert DevFT(stages=stages).depths(blocks) == depths


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacities": (2, 3)}, "of which the last is the model's 4"),
        ({"capacities": (2, 2, 4)}, "strictly increasing"),
        ({"capacities": (0, 4)}, "at least 1"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"rounds_per_stage": (1, 2)}, "expected 3 numbers"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        DevFT(**settings).check(base_model(tmp_path).shape, WORK)


def test_a_model_whose_blocks_differ_is_refused(tmp_path):
    shape = base_model(tmp_path).shape
    uneven = replace(shape, block_elements=(*shape.block_elements[:-1], 1))
    with pytest.raises(UsageError, match="not all of one shape"):
        DevFT().check(uneven, WORK)
