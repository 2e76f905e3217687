"""The references of the text methods: they run, their mutations show, and the identities of the papers hold."""

from __future__ import annotations

import pytest
import torch

from tests.reference import chainfed, devft, full_adapters, linear_probe, lora
from tests.reference.model import ATTENTION, FEED_FORWARD, HEAD, NORMS

HIDDEN, INNER, VOCABULARY, CLASSES, BLOCKS = 32, 64, 64, 4, 4
RANK, SCALE, BOTTLENECK = 4, 2.0, 6
RATES = (2e-2, 1e-2, 5e-3)


def normal(seed, *shape, spread=0.1):
    draw = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=draw, dtype=torch.float64)


def inputs_and_outputs(path):
    """(in, out) of a block's linear map."""
    outputs = {"k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "gate_proj": INNER, "up_proj": INNER}
    return INNER if path.endswith("down_proj") else HIDDEN, outputs.get(path.split(".")[-1], HIDDEN)


@pytest.fixture(scope="module")
def weights():
    found = {
        "model.embed_tokens.weight": normal(1, VOCABULARY, HIDDEN, spread=0.5),
        "model.norm.weight": 1.0 + normal(2, HIDDEN),
    }
    for block in range(BLOCKS):
        for index, path in enumerate(ATTENTION + FEED_FORWARD):
            inputs, outputs = inputs_and_outputs(path)
            found[f"model.layers.{block}.{path}.weight"] = normal(100 * block + index + 10, outputs, inputs)
        for index, norm in enumerate(NORMS):
            found[f"model.layers.{block}.{norm}.weight"] = 1.0 + normal(100 * block + index + 20, HIDDEN)
    return found


def lora_state():
    """Factors of which neither is zero, so that every rule on them shows, and a head."""
    state = {HEAD: normal(3, CLASSES, HIDDEN)}
    for block in range(BLOCKS):
        for index, path in enumerate(ATTENTION + FEED_FORWARD):
            inputs, outputs = inputs_and_outputs(path)
            seed = 1000 + 100 * block + 2 * index
            state[f"model.layers.{block}.{path}.lora_A.weight"] = normal(seed, RANK, inputs)
            state[f"model.layers.{block}.{path}.lora_B.weight"] = normal(seed + 1, outputs, RANK)
    return state


def adapter_state():
    state = {HEAD: normal(3, CLASSES, HIDDEN)}
    for block in range(BLOCKS):
        prefix, seed = f"model.layers.{block}.adapter", 2000 + 10 * block
        state[f"{prefix}.down.weight"] = normal(seed, BOTTLENECK, HIDDEN)
        state[f"{prefix}.down.bias"] = normal(seed + 1, BOTTLENECK)
        state[f"{prefix}.up.weight"] = normal(seed + 2, HIDDEN, BOTTLENECK)
        state[f"{prefix}.up.bias"] = normal(seed + 3, HIDDEN)
    return state


def clients(rounds=3, steps=2, size=4, length=8):
    """Two clients of unequal weight."""

    def batch(seed):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCABULARY, (size, length), generator=draw)
        return ids, torch.randint(0, CLASSES, (size,), generator=draw)

    def batches(client):
        return [[batch(100 * client + 10 * r + step) for step in range(steps)] for r in range(rounds)]

    return [(16, batches(0)), (48, batches(1))]


def probes():
    return [batches[0][0][0] for _, batches in clients()]


def chained(weights, state, rounds=2, *, threshold=1.0, window=2, trade_off=0.2, mutation=None):
    return chainfed.run(
        weights, state, clients(), rounds, probes=probes(), threshold=threshold, window=window, trade_off=trade_off,
        learning_rates=RATES, mutation=mutation,
    )  # fmt: skip


def developed(weights, state, stages, rounds_by_stage, *, beta=0.25, mutation=None):
    return devft.run(
        weights, state, clients(), rounds_by_stage, groups_by_stage=stages, beta=beta, scale=SCALE,
        learning_rates=RATES, mutation=mutation,
    )  # fmt: skip


RUNS = {
    "lora": (lora_state, "scale", lambda w, s, m: lora.run(
        w, s, clients(), 2, learning_rates=RATES, scale=SCALE, mutation=m
    )),
    "full_adapters": (adapter_state, "sign", lambda w, s, m: full_adapters.run(
        w, s, clients(), 2, learning_rates=RATES, mutation=m
    )),
    "linear_probe": (lambda: {HEAD: normal(3, CLASSES, HIDDEN)}, "axis", lambda w, s, m: linear_probe.run(
        w, s, clients(), 2, learning_rates=RATES, mutation=m
    )),
    "chainfed": (adapter_state, "sign", lambda w, s, m: chained(w, s, mutation=m)),
    "devft": (lora_state, "sign", lambda w, s, m: developed(w, s, [[[0, 2], [1, 3]], [[0], [1], [2], [3]]], [1, 1],
                                                           mutation=m)),
}  # fmt: skip


def farthest(found, other):
    """The largest relative distance of two states' tensors."""
    return max(float((found[name] - other[name]).norm() / found[name].norm()) for name in found)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=name)


def changed(found, state):
    return {name for name in state if not torch.equal(found[name], state[name])}


def of_blocks(state, *blocks):
    return {name for name in state if name.startswith(tuple(f"model.layers.{block}." for block in blocks))}


@pytest.mark.parametrize("name", RUNS)
def test_a_reference_trains_every_tensor_gives_finite_numbers_and_its_mutation_shows(name, weights):
    state_of, mutation, run = RUNS[name]
    state = state_of()
    found, mutated = run(weights, state, None), run(weights, state, mutation)
    untrained = of_blocks(state, 3) if name == "chainfed" else set()  # two rounds move the window over blocks 0 to 2
    assert changed(found, state) == set(state) - untrained
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert farthest(found, mutated) > 1e-3


def test_chainfed_with_a_window_of_all_blocks_and_no_global_loss_is_full_adapters(weights):
    expected = full_adapters.run(weights, adapter_state(), clients(), 2, learning_rates=RATES)
    close(chained(weights, adapter_state(), window=BLOCKS, trade_off=0.0), expected)
    close(chained(weights, adapter_state(), window=BLOCKS + 3), expected)  # clamped, and nothing lies behind it


def test_chainfed_trains_the_windows_adapters_and_the_head_and_nothing_else(weights):
    state = adapter_state()
    found = chained(weights, state, rounds=1)
    assert changed(found, state) == of_blocks(state, 0, 1) | {HEAD}


def test_chainfeds_later_adapters_have_a_say_in_the_windows_training(weights):
    state = adapter_state()
    other = {**state, "model.layers.3.adapter.up.weight": 3.0 * state["model.layers.3.adapter.up.weight"]}
    window = "model.layers.1.adapter.up.weight"
    assert not torch.equal(chained(weights, state, rounds=1)[window], chained(weights, other, rounds=1)[window])
    alone = [chained(weights, one, rounds=1, trade_off=0.0)[window] for one in (state, other)]
    assert torch.equal(*alone)


@pytest.mark.parametrize(
    ("start", "window", "blocks", "firsts"),
    [(0, 2, 4, [0, 1, 2, 0, 1]), (1, 1, 4, [1, 2, 3, 1]), (2, 3, 4, [2, 2]), (3, 2, 4, [3, 3]), (0, 4, 4, [0, 0])],
)
def test_chainfeds_window_sweeps_from_the_first_tuned_block_to_the_last(start, window, blocks, firsts):
    windows = [chainfed.window_at(t, start, window, blocks) for t in range(len(firsts))]
    assert [one.start for one in windows] == firsts
    assert {len(one) for one in windows} == {min(window, blocks - start)}


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.8, 1), (0.7, 2), (0.1, 3), (1.0, 0), (0.99, 0)]
)  # the means are .98, .75, .5, .4  # fmt: skip
def test_chainfeds_first_tuned_block_is_the_first_whose_weighted_score_is_below_the_threshold(threshold, expected):
    scores = [(3, [0.98, 0.9, 0.5, 0.4]), (3, [0.98, 0.6, 0.5, 0.4])]
    assert chainfed.first_tuned(scores, threshold) == expected


def test_a_threshold_of_one_tunes_all_blocks_even_where_the_first_changes_nothing():
    assert chainfed.first_tuned([(1, [1.0, 0.5])], 1.0) == 0
    assert chainfed.first_tuned([(1, [1.0, 0.5])], 0.999) == 1


def test_chainfeds_scores_are_weighted_by_examples():
    assert chainfed.first_tuned([(1, [0.9, 0.1]), (3, [0.5, 0.1])], 0.65) == 0  # .6, the plain mean would be .7
    assert chainfed.first_tuned([(3, [0.9, 0.1]), (1, [0.5, 0.1])], 0.65) == 1


def test_chainfed_below_its_first_tuned_block_nothing_moves(weights):
    state = adapter_state()
    by_client = [(n, chainfed.scores(weights, state, ids)) for (n, _), ids in zip(clients(), probes(), strict=True)]
    means = [sum(n * one[block] for n, one in by_client) / 64 for block in range(BLOCKS)]
    assert all(0.0 < mean < 1.0 for mean in means)
    assert means[0] > means[1]
    found = chained(weights, state, window=1, threshold=(means[0] + means[1]) / 2)
    assert changed(found, state) == of_blocks(state, 1, 2) | {HEAD}


def test_cka_of_a_representation_with_itself_is_one_whatever_its_scale_rotation_or_shift():
    x = normal(7, 40, 5)
    rotation = torch.linalg.qr(normal(8, 5, 5)).Q
    assert chainfed.cka(x, 3.0 * x @ rotation + 2.0) == pytest.approx(1.0, abs=1e-12)
    assert chainfed.cka(x, normal(9, 40, 5)) < 0.5


def test_devft_with_every_block_its_own_group_is_federated_lora(weights):
    expected = lora.run(weights, lora_state(), clients(), 2, learning_rates=RATES, scale=SCALE)
    close(developed(weights, lora_state(), [[[0], [1], [2], [3]]], [2]), expected)


def test_devfts_fusion_is_the_mean_at_one_by_the_groups_size_and_the_anchor_at_zero(weights):
    name = "mlp.up_proj.weight"
    theta = [weights[f"model.layers.{block}.{name}"] for block in range(BLOCKS)]
    groups = [[0, 1, 3], [2]]
    mean = devft.fused(weights, groups, 1 / 3)
    torch.testing.assert_close(mean[f"model.layers.0.{name}"], (theta[0] + theta[1] + theta[3]) / 3)
    assert torch.equal(mean[f"model.layers.2.{name}"], theta[2])
    assert torch.equal(devft.fused(weights, groups, 0.0)[f"model.layers.0.{name}"], theta[0])
    assert not of_blocks(mean, 1, 3)


def test_devft_gives_a_groups_blocks_the_same_factors_and_its_next_stage_sets_them_apart(weights):
    a = "model.layers.{}.self_attn.q_proj.lora_A.weight"
    shallow = [[0, 2], [1, 3]]
    one = developed(weights, lora_state(), [shallow], [1])
    assert torch.equal(one[a.format(0)], one[a.format(2)])
    assert torch.equal(one[a.format(1)], one[a.format(3)])
    assert not torch.equal(one[a.format(0)], one[a.format(1)])
    both = developed(weights, lora_state(), [shallow, [[0], [1], [2], [3]]], [1, 1])
    assert not torch.equal(both[a.format(0)], both[a.format(2)])


def test_devfts_similarity_is_of_base_weights_and_factors_together(weights):
    state = lora_state()
    found = devft.similarity(weights, state)
    assert torch.allclose(found, found.T)
    assert torch.allclose(found.diagonal(), torch.ones(BLOCKS, dtype=torch.float64))
    held = {**weights, **state}
    vectors = [torch.cat([held[name].flatten() for name in sorted(of_blocks(held, block))]) for block in (0, 2)]
    cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0)
    torch.testing.assert_close(found[0, 2], (cosine + 1) / 2)
    opposite = {**state, **{name: -100.0 * state[name] for name in of_blocks(state, 2)}}
    assert not torch.allclose(devft.similarity(weights, opposite), found)


def test_devfts_groups_are_the_blocks_of_a_block_matrix():
    w = torch.full((5, 5), 0.05, dtype=torch.float64)
    for group in ([0, 3], [1, 4], [2]):
        for i in group:
            w[i, group] = 0.9
    assert devft.grouped(w, 3) == [[0, 3], [1, 4], [2]]
    assert devft.grouped(w, 5) == [[0], [1], [2], [3], [4]]
    assert [len(list(devft.partitions(range(4), count))) for count in range(1, 5)] == [1, 7, 6, 1]
