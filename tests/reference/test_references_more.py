"""The references of the partial-model, router and width methods: they run, their mutations show, and they agree where
two methods are the same.
"""

from __future__ import annotations

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from tests.reference import fedra, fedrolex, heterofl, image_model, lora, progfed, scalefl, smartfed
from tests.reference.image_model import SGD, is_running
from tests.reference.model import ATTENTION, FEED_FORWARD, HEAD, NORMS, logits, with_lora
from tests.reference.steps import Update, combine, cross_entropy

HIDDEN, INNER, VOCABULARY, CLASSES, BLOCKS = 32, 64, 64, 4, 4
SCALE = 2.0
RATES = (2e-2, 1e-2, 1e-2, 5e-3, 5e-3)
WIDTHS, UNITS, SIDE = (8, 12, 16, 16), (1, 2, 1, 1), 32  # of the stages; the stem is as wide as the first
LAMBDAS = ((0.8, 0.1), (0.5, 0.2), (0.3, 0.4), (0.1, 0.6))
LARGE_RATES = (0.05,) * 6
MAPS = tuple(f"model.layers.{block}.{path}" for block in range(BLOCKS) for path in ATTENTION + FEED_FORWARD)


def normal(draw, *shape, spread=0.1):
    return spread * torch.randn(*shape, generator=draw, dtype=torch.float64)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def shape_of(path):
    """(out, in) of a block's linear map."""
    outputs = {"k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "gate_proj": INNER, "up_proj": INNER}
    return outputs.get(path.split(".")[-1], HIDDEN), INNER if path.endswith("down_proj") else HIDDEN


@pytest.fixture(scope="module")
def weights():
    draw = generator(1)
    found = {name + ".weight": normal(draw, *shape_of(name)) for name in MAPS}
    norms = [f"model.layers.{block}.{norm}.weight" for block in range(BLOCKS) for norm in NORMS]
    found |= {name: 1.0 + normal(draw, HIDDEN) for name in [*norms, "model.norm.weight"]}
    return found | {"model.embed_tokens.weight": normal(draw, VOCABULARY, HIDDEN, spread=0.5)}


def lora_tensors(seed, rank, maps=MAPS):
    """Factors of which neither is zero, so that every rule on them shows."""
    draw, found = generator(seed), {}
    for name in maps:
        outputs, inputs = shape_of(name)
        found[f"{name}.lora_A.weight"] = normal(draw, rank, inputs)
        found[f"{name}.lora_B.weight"] = normal(draw, outputs, rank)
    return found


def head():
    return {HEAD: normal(generator(3), CLASSES, HIDDEN)}


def lora_state():
    return {**lora_tensors(2, 4), **head()}


POOL = (
    (lora_tensors(11, 2), 4.0),
    (lora_tensors(12, 3, [name for name in MAPS if "attn" in name]), 9.0),
    (lora_tensors(13, 2), 1.0),
)


def router_state():
    """Routers far from zero, so that no two gates are alike."""
    draw = generator(4)
    routers = {smartfed.router(name): torch.zeros_like(down) for name, (down, _) in smartfed.experts_of(POOL).items()}
    return {**{name: normal(draw, *zeros.shape, spread=0.5) for name, zeros in routers.items()}, **head()}


def texts(rounds=4, steps=2, size=4, length=8):
    """Two clients of unequal weight."""

    def batch(seed):
        draw = generator(seed)
        ids = torch.randint(3, VOCABULARY, (size, length), generator=draw)
        return ids, torch.randint(0, CLASSES, (size,), generator=draw)

    return [(16, batches_of(batch, 0, rounds, steps)), (48, batches_of(batch, 1, rounds, steps))]


def pictures(rounds=6, steps=2, size=6):
    def batch(seed):
        return normal(generator(seed), size, 3, SIDE, SIDE, spread=1.0), torch.arange(size) % CLASSES

    return [(16, batches_of(batch, 0, rounds, steps)), (48, batches_of(batch, 1, rounds, steps))]


def batches_of(batch, client, rounds, steps):
    return [[batch(1000 + 100 * client + 10 * r + step) for step in range(steps)] for r in range(rounds)]


@pytest.fixture(scope="module")
def library_network():
    """A random ResNet in float64, its BatchNorms' gains, shifts and running statistics random too."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=WIDTHS[0], hidden_sizes=list(WIDTHS), depths=list(UNITS), layer_type="basic", num_labels=CLASSES
    )
    network = ResNetForImageClassification(config).double().train()
    for name, tensor in network.state_dict().items():
        if "normalization" in name and tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return network


def tensors_of(network):
    return {n: t.detach().clone() for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def network(library_network):
    return tensors_of(library_network)


def output_modules():
    """By stage: the stand-ins of the later stages, the head where the stage has one of its own, the projection."""
    draw, found = generator(5), {}
    for stage in range(len(WIDTHS)):
        own = {
            f"output.convolutions.{later}.weight": normal(draw, WIDTHS[later], WIDTHS[later - 1], 3, 3)
            for later in range(stage + 1, len(WIDTHS))
        }
        if stage < len(WIDTHS) - 1:
            own["output.head.weight"] = normal(draw, CLASSES, WIDTHS[-1])
            own["output.head.bias"] = normal(draw, CLASSES)
        inputs = WIDTHS[-1]
        for index, outputs in enumerate(scalefl.projection_widths(WIDTHS[-1])):
            own[f"output.projection.{index}.weight"] = normal(draw, outputs, inputs, spread=0.3)
            own[f"output.projection.{index}.bias"] = normal(draw, outputs)
            inputs = outputs
        found[stage] = own
    return found


def drawn(weights, state, rounds=2, *, subsets=(((2, 0), (3, 0, 1)), ((1, 2), (0, 1, 3))), mutation=None):
    return fedra.run(
        weights, state, texts(), rounds, subsets=subsets, scale=SCALE, learning_rates=RATES, mutation=mutation
    )


def grown(weights, state, rounds=2, *, stages=2, mutation=None):
    return progfed.run(
        weights, state, texts(), rounds, stages=stages, scale=SCALE, learning_rates=RATES, mutation=mutation
    )


def routed(weights, state, rounds=2, *, every=1, mutation=None):
    return smartfed.run(
        weights, state, texts(), rounds, pool=POOL, total=3 * len(MAPS), smallest=1, largest=6, recompute_every=every,
        learning_rates=RATES, mutation=mutation,
    )  # fmt: skip


def narrowed(method, network, rounds=4, *, ratios=(0.5, 0.75), mutation=None):
    # A state that replaces what it finds among the weights, as a new classifier does.
    state = {name: 1.1 * tensor for name, tensor in network.items() if name.startswith("classifier")}
    return method.run(network, state, pictures(), rounds, ratios=ratios, learning_rates=LARGE_RATES, mutation=mutation)


def staged(network, rounds=6, *, lambdas=LAMBDAS, mutation=None):
    found = scalefl.run(
        network, output_modules(), pictures(), rounds, lambdas=lambdas, learning_rates=LARGE_RATES, mutation=mutation
    )
    return {(stage, name): tensor for stage, version in found.items() for name, tensor in version.items()}


RUNS = {
    "fedra": ("everyone_counts", lambda w, _, m: drawn(w, lora_state(), mutation=m)),
    "progfed": ("newest_only", lambda w, _, m: grown(w, lora_state(), mutation=m)),
    "smartfed": ("renormalised", lambda w, _, m: routed(w, router_state(), mutation=m)),
    "heterofl": ("everyone_counts", lambda _, n, m: narrowed(heterofl, n, mutation=m)),
    "fedrolex": ("still", lambda _, n, m: narrowed(fedrolex, n, mutation=m)),
    "scalefl": ("less_dependence", lambda _, n, m: staged(n, mutation=m)),
}


def farthest(found, other):
    """The largest relative distance of two states' tensors."""
    return max(float((found[name] - other[name]).norm() / found[name].norm()) for name in found)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12, msg=str(name))


def changed(found, state):
    return {name for name in state if not torch.equal(found[name], state[name])}


@pytest.mark.parametrize("name", RUNS)
def test_a_reference_gives_finite_numbers_and_its_mutation_shows(name, weights, network):
    mutation, run = RUNS[name]
    found, mutated = run(weights, network, None), run(weights, network, mutation)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert all(tensor.dtype == torch.float64 for tensor in found.values())
    assert farthest(found, mutated) > 1e-3


def test_fedra_and_progfed_on_all_blocks_are_federated_lora(weights):
    expected = lora.run(weights, lora_state(), texts(), 2, learning_rates=RATES, scale=SCALE)
    everything = ((3, 1, 0, 2), (0, 1, 2, 3))
    close(drawn(weights, lora_state(), subsets=(everything, everything)), expected)
    close(grown(weights, lora_state(), stages=1), expected)


def test_fedra_leaves_a_layer_that_nobody_drew_alone(weights):
    state = lora_state()
    found = drawn(weights, state, 1, subsets=(((0, 2), (2, 3)),))
    assert changed(found, state) == {name for name in state if not name.startswith("model.layers.1.")}


@pytest.mark.parametrize(
    ("rounds", "stages", "layers", "depths"),
    [(4, 2, 4, [2, 2, 4, 4]), (3, 3, 4, [2, 3, 4]), (4, 4, 4, [1, 2, 3, 4]), (4, 4, 6, [2, 3, 5, 6])],
)
def test_progfed_grows_to_the_whole_depth_in_stages_of_equal_length(rounds, stages, layers, depths):
    assert [progfed.blocks_of_round(t, rounds, stages, layers) for t in range(rounds)] == depths


def test_progfeds_first_stage_neither_trains_nor_runs_the_later_blocks(weights):
    state, later = lora_state(), ("model.layers.2.", "model.layers.3.")
    found = grown(weights, state, 1)
    assert changed(found, state) == {name for name in state if not name.startswith(later)}
    short = {name: tensor for name, tensor in weights.items() if not name.startswith(later)}
    close(progfed.run(short, state, texts(), 1, stages=1, scale=SCALE, learning_rates=RATES), found)


def test_smartfed_with_all_experts_and_equal_gates_is_the_sum_of_the_loras_by_the_size_of_the_pool(weights):
    one = lora_tensors(11, 2)
    experts = smartfed.experts_of([(one, 4.0)])
    zeros = {smartfed.router(name): torch.zeros_like(down) for name, (down, _) in experts.items()}
    linear = smartfed.mixture(experts, dict.fromkeys(experts, 2), renormalised=False)
    ids, _ = texts()[0][1][0][0]
    found = logits({**weights, **head(), **zeros}, ids, range(BLOCKS), linear)
    expected = logits({**weights, **head(), **one}, ids, range(BLOCKS), with_lora(4.0 / 2 / 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_smartfed_chooses_experts_for_each_token_by_itself():
    name = "model.layers.0.self_attn.q_proj"
    down, up = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    linear = smartfed.mixture({name: (down, up)}, {name: 1}, renormalised=False)
    x = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = linear(x, {f"{name}.weight": torch.zeros_like(down), smartfed.router(name): torch.eye(3).double()}, name)
    gates = x.softmax(-1)
    expected = torch.stack(
        [torch.stack([3.0 * gates[0, 0], *x.new_zeros(2)]), 2.0 * gates[1] * x.new_tensor([0, 0, 1])]
    )
    torch.testing.assert_close(found, expected)


def test_smartfeds_quotas_have_a_say_from_the_round_after_they_are_recomputed(weights):
    one = [routed(weights, router_state(), 1, every=every) for every in (1, 2)]
    close(*one)
    two = [routed(weights, router_state(), 2, every=every) for every in (1, 2)]
    assert farthest(*two) > 1e-6


def test_smartfeds_importance_needs_a_router_that_is_not_zero(weights):
    name = smartfed.router(MAPS[0])
    state = {n: t for n, t in router_state().items() if n != name}
    linear = smartfed.mixture(smartfed.experts_of(POOL), dict.fromkeys(MAPS, 3), renormalised=False)
    start = {**state, name: torch.zeros(7, HIDDEN, dtype=torch.float64)}
    _, importances = smartfed.train(weights, start, linear, texts()[0][1][0][:1], 0.01)
    assert importances.pop(MAPS[0]) == 0.0
    assert min(importances.values()) > 0.0


@pytest.mark.parametrize(
    ("importances", "total", "expected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 2.0}, 8, {"a": 2, "b": 2, "c": 4}),
        ({"a": 0.0, "b": 1.0, "c": 1.0}, 8, {"a": 1, "b": 3, "c": 4}),  # b and c tie: one is taken from the first
        (
            {"a": 9.0, "b": 1.0, "c": 0.5},
            9,
            {"a": 5, "b": 2, "c": 2},
        ),  # a is at its bound: one to b, and then c lacks most
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 7, {"a": 3, "b": 2, "c": 2}),  # a tie: one is added to the first
        ({"a": 0.0, "b": 0.0, "c": 0.0}, 6, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_smartfeds_quotas_follow_the_importances_within_bounds_and_add_up(importances, total, expected):
    found = smartfed.quotas_of(importances, {"a": 6, "b": 6, "c": 6}, total, smallest=1, largest=5)
    assert found == expected
    assert sum(found.values()) == total


def test_smartfeds_importances_are_weighted_by_examples_and_averaged_over_the_rounds():
    first = smartfed.moving_average({}, [(1, {"a": 4.0}), (3, {"a": 8.0})])
    assert first == {"a": pytest.approx(7.0)}
    assert smartfed.moving_average(first, [(2, {"a": 17.0})]) == {"a": pytest.approx(8.0)}


def test_the_image_model_is_the_librarys_in_train_mode(library_network, network):
    pixels, _ = pictures()[0][1][0][0]
    before, running = {name: tensor.clone() for name, tensor in library_network.state_dict().items()}, {}
    expected = library_network(pixels).logits
    found = image_model.logits(network, pixels, running)
    after = tensors_of(library_network)
    library_network.load_state_dict(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert set(running) == {name for name in after if is_running(name)}
    for name, tensor in running.items():
        torch.testing.assert_close(tensor, after[name], rtol=0, atol=1e-10)


def test_the_image_models_local_steps_are_those_of_the_librarys_optimiser(library_network, network):
    batches = pictures()[0][1][0]
    before = {name: tensor.clone() for name, tensor in library_network.state_dict().items()}
    optimizer = torch.optim.SGD(library_network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for pixels, labels in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(library_network(pixels).logits, labels).backward()
        optimizer.step()
    expected = tensors_of(library_network)
    library_network.load_state_dict(before)
    trained = [name for name in network if not is_running(name)]
    close_to(image_model.local_steps(network, trained, heterofl.loss, batches, 0.05), expected, 1e-9)


def close_to(found, expected, distance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=distance, msg=name)


@pytest.mark.parametrize("method", [heterofl, fedrolex])
def test_width_methods_at_full_width_are_federated_averaging(method, network):
    state = {name: 1.1 * tensor for name, tensor in network.items() if name.startswith("classifier")}
    now, names = {**network, **state}, [name for name in network if not is_running(name)]
    for r in range(2):
        now = combine(now, [
            Update(examples, image_model.local_steps(now, names, heterofl.loss, batches[r], LARGE_RATES[r]))
            for examples, batches in pictures()
        ])  # fmt: skip
    close_to(narrowed(method, network, 2, ratios=(1.0, 1.0)), now, 1e-9)  # a window that rolls changes sums' order


def test_heterofl_leaves_the_channels_that_nobody_holds_alone(network):
    found = narrowed(heterofl, network, 2, ratios=(0.5, 0.25))
    last = WIDTHS[3] // 2
    name = "resnet.encoder.stages.3.layers.0.layer.1.convolution.weight"
    moved = found[name] != network[name]
    assert bool(moved[:last, :last].all())
    assert not bool(moved[last:].any())
    assert not bool(moved[:, last:].any())
    stem = "resnet.embedder.embedder.convolution.weight"
    moved = found[stem] != network[stem]
    assert moved.flatten(1).all(1).tolist() == [True] * 4 + [False] * 4
    running = "resnet.encoder.stages.3.layers.0.layer.1.normalization.running_mean"
    assert (found[running] != network[running]).tolist() == [True] * last + [False] * last
    assert bool((found["classifier.1.bias"] != 1.1 * network["classifier.1.bias"]).all())


def test_fedrolexs_window_starts_at_the_round_and_wraps_around_each_width():
    assert fedrolex.rolling(0, 8, 0.5) == [0, 1, 2, 3]
    assert fedrolex.rolling(3, 8, 0.75) == [3, 4, 5, 6, 7, 0]
    assert fedrolex.rolling(9, 8, 0.25) == [1, 2]
    assert fedrolex.rolling(9, 12, 0.25) == [9, 10, 11]


def test_fedrolex_trains_in_turn_what_heterofl_never_reaches(network):
    name = "resnet.encoder.stages.0.layers.0.layer.0.normalization.weight"
    found = narrowed(fedrolex, network, 3, ratios=(0.25, 0.5))
    assert (found[name] != network[name]).tolist() == [True] * 6 + [False] * 2


def test_scalefl_trains_the_stage_its_output_module_and_the_last_convolution_before_it(network):
    initial = {stage: scalefl.first_version(network, own, stage) for stage, own in output_modules().items()}
    assert "output.head.weight" in initial[2]
    assert "classifier.1.weight" not in initial[2]
    assert "classifier.1.weight" in initial[3]
    coupling = "resnet.encoder.stages.1.layers.1.layer.1."
    expected = {name for name in initial[2] if name.startswith((coupling, "resnet.encoder.stages.2.", "output."))} - {
        name for name in initial[2] if is_running(name)
    }
    assert set(scalefl.trained_names(initial[2], 2)) == expected
    assert f"{coupling}normalization.bias" in expected
    assert "resnet.embedder.embedder.convolution.weight" in scalefl.trained_names(initial[0], 0)


def test_in_scalefl_the_running_statistics_of_frozen_stages_move_and_their_weights_do_not(network):
    found = staged(network, 3)
    stem = "resnet.embedder.embedder.{}"
    for part, same in (("convolution.weight", True), ("normalization.running_mean", False)):
        name = stem.format(part)
        assert torch.equal(found[1, name], found[2, name]) == same
        assert not torch.equal(found[0, name], network[name])


@pytest.mark.parametrize(
    ("stage", "sources"),
    [(0, {0: 3}), (1, {0: 0, 1: 3}), (2, {0: 1, 1: 1, 2: 3}), (3, {0: 2, 1: 2, 2: 2, 3: 3})],
)
def test_scalefls_versions_are_loaded_as_in_the_papers_table(stage, sources, network):
    modules = output_modules()
    versions = {
        s: {name: torch.full((), float(s)) for name in scalefl.first_version(network, modules[s], s)} for s in range(4)
    }
    loaded = scalefl.coupled(versions, stage)
    assert loaded.keys() == versions[stage].keys()
    for name, tensor in loaded.items():
        assert int(tensor) == sources.get(scalefl.block_of(name), stage), name


def test_the_normalised_hsic_of_a_tensor_with_itself_is_one_and_the_kernel_is_centred():
    x, y = normal(generator(6), 6, 5, spread=3.0), normal(generator(7), 6, 2, spread=3.0)
    assert float(scalefl.nhsic(x, x)) == pytest.approx(1.0, abs=1e-12)
    assert float(scalefl.nhsic(x, y)) == pytest.approx(float(scalefl.nhsic(y, x)), abs=1e-12)
    torch.testing.assert_close(
        scalefl.centred_kernel(x).sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12
    )
    k = torch.exp(-(torch.cdist(x, x) ** 2) / (2 * 25.0 * 5))
    centring = torch.eye(6, dtype=torch.float64) - 1 / 6
    torch.testing.assert_close(scalefl.hsic(x, x), (k @ centring @ k @ centring).trace() / 36)


def test_scalefls_projection_has_the_papers_widths_at_its_own_size():
    assert scalefl.projection_widths(512) == (2056, 1024, 512)
    assert scalefl.projection_widths(16) == (64, 32, 16)


def test_scalefls_label_term_reaches_the_projection_alone_where_it_is_the_only_one_to_use_it(network):
    name = "output.projection.0.weight"
    without = staged(network, 1, lambdas=((0.0, 0.0),) * 4)
    decayed = image_projection_without_gradient(name)
    torch.testing.assert_close(without[0, name], decayed, rtol=0, atol=1e-12)
    assert not torch.allclose(staged(network, 1)[0, name], decayed, rtol=0, atol=1e-9)


def image_projection_without_gradient(name):
    """What weight decay alone makes of it in one round of two steps."""
    tensor, optimizer = output_modules()[0][name], SGD(LARGE_RATES[0])
    for _ in range(2):
        tensor = optimizer.step({name: tensor}, {name: torch.zeros_like(tensor)})[name]
    return tensor


def test_the_cross_entropy_is_the_librarys():
    values, labels = normal(generator(8), 5, CLASSES, spread=2.0), torch.tensor([0, 1, 2, 3, 1])
    expected = torch.nn.functional.cross_entropy(values, labels)
    torch.testing.assert_close(cross_entropy(values, labels), expected, rtol=0, atol=1e-12)
