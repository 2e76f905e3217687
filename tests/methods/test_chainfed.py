"""ChainFed: which adapters are trained when, through which loss, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from methods.chainfed import ChainFed, Window, _ending_with, first_tuned, window_at
from methods.full_adapters import FullAdapters
from testbed.config import load_inventory
from testbed.errors import PlanError, UsageError, WireError
from testbed.evaluate import evaluate
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Block, Phase, Submodel, Workload
from testbed.model.blocks import describe
from testbed.model.bottleneck import adapter_tensors, both_losses, fill_adapters, mount_adapters, mount_branch
from testbed.model.combine import state_hash
from testbed.model.footprint import Baseline, Coefficients, predict
from testbed.model.surgery import block_list
from testbed.plan import make_plan
from testbed.rounds import federate
from testbed.task import Batch, Shard
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import BLOCKS, CLASSES, WORK, base_model, clients_of, planted, run_of
from tests.model import tiny
from tests.reference import chainfed
from tests.reference.driver import data_of, finished, float64_run, largest_difference, rates_of, started, weights_of

SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}
FIXED = {"bottleneck": 4, "window_by": "fixed"}


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A finished run of a probe and four windows (1-2, 2-3 and both again), and the state that it began with."""
    torch.set_num_threads(1)  # fixtures of a module come before those of a test
    run = float64_run(ChainFed(threshold=0.5, **FIXED), tmp_path_factory.mktemp("probed"), rounds=5, steps=1)
    weights, start = weights_of(run), started(run)
    scores = [(n, chainfed.scores(weights, start.tensors, batches[0][0][0])) for n, batches in data_of(run)]
    means = [sum(n * own[block] for n, own in scores) / sum(n for n, _ in scores) for block in range(BLOCKS)]
    run.method._method = ChainFed(threshold=(means[0] + means[1]) / 2, **FIXED)
    assert min(means[0], 1.0) > means[1]
    return run, start, finished(run)


def expected(probed, mutation=None):
    run, start, _ = probed
    clients, rates = data_of(run), rates_of(run)
    return chainfed.run(
        weights_of(run), start.tensors, [(examples, batches[1:]) for examples, batches in clients],
        run.config.rounds - 1, probes=[batches[0][0][0] for _, batches in clients], threshold=run.method.threshold,
        window=2, trade_off=0.2, learning_rates=rates[1:], mutation=mutation,
    )  # fmt: skip


def test_a_probe_and_four_windows_give_what_the_reference_gives(probed):
    run, _, found = probed
    assert found.scalars["start"] == 1
    assert largest_difference(found.tensors, expected(probed)) < 1e-5
    positions = [(job.kind, job.submodel.positions) for job in run.engine.jobs if job.client == 0]
    assert positions == [
        ("probe", (0, 1, 2, 3)), ("train", (0, 1, 2)), ("train", (0, 1, 2, 3)), ("train", (0, 1, 2)),
        ("train", (0, 1, 2, 3)),
    ]  # fmt: skip


def test_a_reference_that_subtracts_the_global_loss_is_told_apart(probed):
    assert largest_difference(probed[2].tensors, expected(probed, mutation="sign")) > 1e-3


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("settings", [{}, {"window_by": "fixed", "window": 9, "global_weight": 0.0}])
def test_a_window_of_all_blocks_is_full_adapters_bit_for_bit(settings, tmp_path):
    chained = federate(run_of(ChainFed(threshold=1.0, **settings), tmp_path / "chained", **SHORT))
    full = federate(run_of(FullAdapters(), tmp_path / "full", **SHORT))
    assert state_hash(chained.tensors, {}) == state_hash(full.tensors, {})


@dataclass(frozen=True)
class Resident(ChainFed):
    """The same with every block in memory all the time."""

    def order(self, state, base, clients, round_index):
        orders = super().order(state, base, clients, round_index)
        return [replace(order, tensors={**order.tensors, "first": torch.tensor(_first(order))}) for order in orders]

    def work(self, workplace):
        from testbed.node.training import local_steps, update_of

        tensors = dict(workplace.tensors)
        first = int(tensors.pop("first"))
        built = workplace.build(Submodel(tuple(replace(b, streamed=False) for b in workplace.job.submodel.blocks)))
        window = Window(self.bottleneck, first, len(built.shape) - len(built.submodel.blocks), 0.2)
        window.mount(built)
        fill_adapters(built, tensors)
        return update_of(workplace, built.trainable(), local_steps(workplace, built, loss=window.loss))


def _first(order):
    return sum(block.streamed for block in order.submodel.blocks)


def test_blocks_that_are_streamed_give_the_same_as_blocks_that_stay_bit_for_bit(tmp_path):
    streamed = federate(run_of(ChainFed(threshold=1.0, **FIXED), tmp_path / "streamed", **{**SHORT, "rounds": 3}))
    resident = federate(run_of(Resident(threshold=1.0, **FIXED), tmp_path / "resident", **{**SHORT, "rounds": 3}))
    assert state_hash(streamed.tensors, {}) == state_hash(resident.tensors, {})


def test_without_a_weight_there_is_no_branch(tmp_path):
    method = ChainFed(threshold=1.0, global_weight=0.0, **FIXED)
    shape = base_model(tmp_path).shape
    assert not any(phase.outfit.later for phase in method.phases(next(method.choices(shape)), shape, WORK))
    alone = federate(run_of(method, tmp_path / "alone", rounds=1, **SHORT))
    joined = federate(run_of(ChainFed(threshold=1.0, **FIXED), tmp_path / "joined", rounds=1, **SHORT))
    assert state_hash(alone.tensors, {}) != state_hash(joined.tensors, {})


# ── the branch, whatever the architecture ────────────────────────────────────────────────────────────────────────────
ARCHITECTURES = [("llama", CAUSAL_LM), ("gemma2", SEQUENCE_CLASSIFICATION), ("gpt2", SEQUENCE_CLASSIFICATION)]
ARCHITECTURES += [(name, SEQUENCE_CLASSIFICATION) for name in ("bert", "roberta", "distilbert")]


@pytest.mark.parametrize(("architecture", "task"), ARCHITECTURES)
def test_the_branch_is_the_model_whose_later_blocks_are_their_adapters_alone(architecture, task, tmp_path):
    tiny.save(tiny.make(architecture, task), tmp_path / "model")
    base = tiny.open_base(tmp_path / "model", task)
    tensors = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        for seed, (name, tensor) in enumerate(adapter_tensors(base.shape, 3, 0).items())
    }
    inputs = tiny.batch()
    labels = inputs["input_ids"] if task == CAUSAL_LM else torch.tensor([0, 2, 1])
    batch = Batch(**inputs, labels=labels)

    built = tiny.built_from(base, tiny.of(0, 1))
    built.model.eval()
    mount_adapters(built, 3, [1])
    mount_branch(built, 3, [2, 3])
    fill_adapters(built, tensors)
    blocks = list(block_list(built))
    local, overall = both_losses(built, batch)

    whole = tiny.built_from(base)
    whole.model.eval()
    mount_adapters(whole, 3)
    fill_adapters(whole, tensors)
    for position in (2, 3):
        block_list(whole)[position] = Alone(block_list(whole)[position].adapter)
    torch.testing.assert_close(overall, whole.loss(batch), rtol=1e-5, atol=1e-6)
    assert abs((local - overall).item()) > 1e-3
    torch.testing.assert_close(local, built.loss(batch), rtol=0, atol=0)
    assert list(block_list(built)) == blocks
    trained = {name for name in built.trainable() if "adapter" in name}
    assert trained == {name for name in tensors if name.startswith(f"{base.shape.block_prefix}.1.")}


class Alone(torch.nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, hidden, *_, **__):
        return self.adapter(hidden)


# ── FOAT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_probe_sends_similarities_and_nothing_else_and_the_state_keeps_the_first_tuned_block(tmp_path):
    run = run_of(ChainFed(bottleneck=4), tmp_path, rounds=1, **SHORT)
    before, after = started(run), federate(run)
    results = run.folder.results()
    assert [result.kind for result in results] == ["probe", "probe"]
    assert all(not result.tensors and len(result.scalars["scores"]) == BLOCKS for result in results)
    assert state_hash(before.tensors, {}) == state_hash(after.tensors, {})
    scores = [(result.examples, result.scalars["scores"]) for result in results]
    assert after.scalars["start"] == chainfed.first_tuned(scores, 0.8)
    assert after.scalars["turn"] == 0


def test_padding_has_no_part_in_similarities_and_samples_limits_the_tokens(tmp_path):
    run = run_of(ChainFed(bottleneck=4), tmp_path / "plain", rounds=1, clients=1)
    longer = run_of(ChainFed(bottleneck=4), tmp_path / "padded", rounds=1, clients=1)
    few = run_of(ChainFed(bottleneck=4, samples=9), tmp_path / "few", rounds=1, clients=1)
    examples = planted(16, "padded")
    for one, texts in ((run, examples), (few, examples), (longer, [*examples, long_text()])):
        path = one.store.folder / "other.partial"
        Shard.of(texts, SEQUENCE_CLASSIFICATION, CLASSES).save(path)
        one.shards = [one.store.put_file(path)]
        one.work = replace(one.work, batch_size=len(texts), length=24)
    found = [federate(one) and one.folder.results()[0].scalars["scores"] for one in (run, longer, few)]
    assert found[0] == pytest.approx(found[1], abs=0.05)
    assert found[0] != found[1]
    assert found[0] != pytest.approx(found[2], abs=1e-3)


def long_text():
    [example] = planted(1, "long")
    return replace(example, ids=[*example.ids[:-1], *([30] * 8), 2])


@pytest.mark.parametrize("scores", [None, [0.5], [0.5] * 3 + [float("nan")], [0.5] * 3 + ["0.5"]])
def test_a_probe_without_a_number_for_every_block_is_refused(scores, tmp_path):
    run = run_of(ChainFed(bottleneck=4), tmp_path)

    class Update:
        client, examples, names = 3, 1, ()
        scalars = {} if scores is None else {"scores": scores}

    with pytest.raises(WireError, match="client 3: its probe gave no similarity for each of the 4 blocks"):
        run.method.verify(started(run), Update())


@pytest.mark.parametrize(
    ("scores", "threshold"), [([(3, [0.9, 0.1]), (1, [0.5, 0.1])], 0.65), ([(1, [0.9, 0.9]), (1, [0.95, 0.85])], 0.8)]
)
def test_the_first_tuned_block_is_the_references(scores, threshold):
    assert first_tuned(scores, threshold) == chainfed.first_tuned(scores, threshold)


# ── DLCT ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("start", "size", "blocks"), [(0, 2, 4), (1, 1, 4), (2, 3, 4), (3, 2, 4), (0, 4, 4), (0, 1, 1)]
)
def test_windows_are_the_references(start, size, blocks):
    for turn in range(7):
        assert window_at(turn, start, size, blocks) == chainfed.window_at(turn, start, size, blocks)


def test_a_round_moves_the_adapters_of_its_window_and_the_head_only(tmp_path):
    run = run_of(ChainFed(threshold=1.0, **FIXED), tmp_path, **{**SHORT, "rounds": 2})
    before = started(run)
    federate(run)
    sent = [{spec.name for spec in result.tensors} for result in run.folder.results() if result.client == 0]
    for first, names in enumerate(sent):
        window = tuple(f"model.layers.{position}." for position in (first, first + 1))
        assert names == {name for name in before.tensors if name.startswith((*window, "score."))}
    assert [job.submodel for job in run.engine.jobs if job.client == 0] == [
        run.base.fill_in(Submodel((Block(0), Block(1)))),
        run.base.fill_in(Submodel((Block(0, streamed=True), Block(1), Block(2)))),
    ]


def test_a_round_without_a_result_does_not_move_the_window(tmp_path):
    run = run_of(ChainFed(threshold=1.0, **FIXED), tmp_path, **{**SHORT, "rounds": 3})
    working = run.engine._do

    def first_round_fails(job, payload):
        run.engine.absent = {0, 1} if job.round == 0 else set()
        return working(job, payload)

    run.engine._do = first_round_fails
    assert federate(run).scalars["turn"] == 2
    assert [len(job.submodel.blocks) for job in run.engine.jobs if job.client == 0] == [2, 2, 3]


def sized(run, *sizes):
    """The run with windows of these sizes for its clients."""
    choices = {sum(not b.streamed for b in choice.blocks): choice for choice in run.method.choices(run.base.shape)}
    clients = (replace(own, submodel=choices[size]) for own, size in zip(run.plan.clients, sizes, strict=True))
    run.plan = replace(run.plan, clients=tuple(clients))
    return run


@pytest.mark.parametrize(
    ("window_by", "windows"),
    [("lowest", [[(0, 2), (0, 2)], [(1, 3), (1, 3)], [(2, 4), (2, 4)]]),
     ("device", [[(0, 3), (0, 2)], [(1, 4), (1, 3)], [(2, 4), (2, 4)]])],
)  # fmt: skip
def test_the_window_is_the_lowest_devices_or_each_devices_own(window_by, windows, tmp_path):
    method = ChainFed(bottleneck=4, threshold=1.0, window_by=window_by)
    run = sized(run_of(method, tmp_path, **{**SHORT, "rounds": 3}), 3, 2)
    federate(run)
    jobs = {(job.round, job.client): (_first(job), len(job.submodel.blocks)) for job in run.engine.jobs}
    assert [[jobs[index, client] for client in (0, 1)] for index in range(3)] == windows
    predicted = {phase.name for phase in method.phases(run.plan.clients[0].submodel, run.base.shape, WORK)}
    assert set(run.engine.phases) <= predicted


def test_a_client_that_was_refitted_trains_a_shorter_window(tmp_path):
    run = sized(run_of(ChainFed(bottleneck=4, threshold=1.0), tmp_path, clients=2), 3, 3)
    state = started(run)
    orders = run.method.order(state, run.base, clients_of(sized(run, 1, 3)), 0)
    assert [(_first(order), len(order.submodel.blocks)) for order in orders] == [(0, 1), (0, 3)]


def test_choices_are_every_window_or_the_one_that_was_asked_for(tmp_path):
    shape = base_model(tmp_path).shape
    streamed = [[block.streamed for block in choice.blocks] for choice in ChainFed().choices(shape)]
    assert streamed == [[True] * below + [False] * (BLOCKS - below) for below in range(BLOCKS)]
    [choice] = ChainFed(window=3, window_by="fixed").choices(shape)
    assert [block.streamed for block in choice.blocks] == [True, False, False, False]


def test_learns_with_windows_of_two_blocks(tmp_path):
    run = run_of(ChainFed(window_by="fixed"), tmp_path, clients=2, rounds=6, steps=8, evaluate_every=100)
    before = evaluate(run.method, run.base, started(run), run.work, run.held_out).accuracy
    after = evaluate(run.method, run.base, federate(run), run.work, run.held_out).accuracy
    assert after >= max(before, 1 / CLASSES) + 0.15


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────
HIDDEN, NARROW = 64, 8
LONG = Workload(SEQUENCE_CLASSIFICATION, CLASSES, batch_size=8, length=64)
ADAPTER = 4 * (2 * HIDDEN * NARROW + HIDDEN + NARROW)
GELU_INPUT = 4 * 8 * 64 * NARROW


def shape_of(blocks):
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": HIDDEN, "intermediate_size": 160,
        "num_hidden_layers": blocks, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    return describe(config, LONG.task, LONG.labels)


def needs(phases, shape):
    footprint = predict(phases, shape, LONG, Baseline(0), Coefficients())
    return {phase.name: phase.bytes for phase in footprint.phases}


@pytest.mark.parametrize("size", [1, 3, 7])
def test_what_is_predicted_for_a_window_holds_whichever_window_it_is(size):
    """Every window traced as it is: real positions, and every adapter of its branch."""
    blocks = 8
    shape, method = shape_of(blocks), ChainFed(bottleneck=NARROW)
    choice = next(choice for choice in method.choices(shape) if _resident(choice) == size)
    predicted = needs(method.phases(choice, shape, LONG), shape)
    for first in sorted({0, min(2, blocks - size), blocks - size - 1, blocks - size}):
        stop = first + size
        exact = Phase(
            "exact", tuple(Block(position, streamed=position < first) for position in range(stop)), 8, 64,
            backward=True, outfit=Window(NARROW, first, blocks - stop, 0.2), trained_elements=shape.head_elements,
        )  # fmt: skip
        [found] = needs([exact], shape).values()
        bound = predicted["window" if stop < blocks else "last window"]
        assert found <= bound
        if first in (blocks - size - 1, blocks - size):  # these decide
            assert bound - found <= (blocks - size) * GELU_INPUT


def _resident(choice):
    return sum(not block.streamed for block in choice.blocks)


def test_the_peak_grows_with_depth_by_adapters_alone_those_of_blocks_that_are_not_there_included():
    shallow, deep = (
        needs(method.phases(next(method.choices(shape)), shape, LONG), shape)
        for method in [ChainFed(bottleneck=NARROW, window_by="fixed")]
        for shape in (shape_of(8), shape_of(20))
    )
    assert deep["last window"] - shallow["last window"] == 12 * ADAPTER
    assert deep["window"] - shallow["window"] == 12 * (ADAPTER + GELU_INPUT)
    assert deep["probe"] == shallow["probe"]


def test_the_last_window_of_all_blocks_takes_what_full_adapters_take():
    shape = shape_of(8)
    method, full = ChainFed(bottleneck=NARROW), FullAdapters(bottleneck=NARROW)
    own = needs(method.phases(next(method.choices(shape)), shape, LONG), shape)
    assert own["last window"] == needs(full.phases(Submodel.first(8), shape, LONG), shape)["train"]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_global_weight_follows_the_architecture_unless_it_is_given(tmp_path):
    llama = base_model(tmp_path).shape
    weights = [method._weight(shape) for method in (ChainFed(), ChainFed(global_weight=0.7))
               for shape in (llama, replace(llama, architecture="bert"))]  # fmt: skip
    assert weights == [0.2, 0.1, 0.7, 0.7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window"),
        ({"samples": 1}, "samples"),
        ({"threshold": 0.0}, "threshold"),
        ({"global_weight": -0.1}, "global_weight"),
        ({"bottleneck": 0}, "bottleneck=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        ChainFed(**settings).check(base_model(tmp_path).shape, WORK)


def test_devices_agree_on_the_lowest_ones_window_and_the_plan_predicts_that(tmp_path):
    shape = base_model(tmp_path).shape
    fitted = (_ending_with(BLOCKS, 4), _ending_with(BLOCKS, 2), _ending_with(BLOCKS, 3))
    assert ChainFed().agree(fitted) == [_ending_with(BLOCKS, 2)] * 3
    assert ChainFed(window_by="device").agree(fitted) == fitted
    budgets = {"large": 1 << 30, "small": least_budget(ChainFed(), shape)}
    (tmp_path / "lab.yaml").write_text(emulated(budgets))
    baselines = dict.fromkeys(budgets, Baseline(100 << 20, 0))
    plan = make_plan(ChainFed(), shape, WORK, load_inventory(tmp_path / "lab.yaml"), [48, 48], [], baselines)
    large, small = plan.clients
    assert large.submodel == small.submodel
    assert large.predicted_bytes == small.predicted_bytes <= budgets["small"]

    (tmp_path / "lab.yaml").write_text(emulated({"large": 1 << 20, "small": 1 << 20}))
    with pytest.raises(PlanError, match="no device can take part"):
        make_plan(ChainFed(), shape, WORK, load_inventory(tmp_path / "lab.yaml"), [48, 48], [], baselines)


def least_budget(method, shape):
    """What the smallest choice is predicted to need."""
    *_, smallest = method.choices(shape)
    return predict(method.phases(smallest, shape, WORK), shape, WORK, Baseline(100 << 20, 0)).bytes


def emulated(budgets):
    text = "defaults: {kind: emulated, profile: raspberry_pi_5_4gb}\ndevices:\n"
    return text + "".join(f'  {name}: {{budget: {{memory: "{memory} B"}}}}\n' for name, memory in budgets.items())
