"""FedPruner: what it keeps, and what it is the same as."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.fedpruner import FedPruner
from methods.lora import Lora
from testbed.errors import UsageError
from testbed.method import ATTENTION, FEED_FORWARD, PARTS, Block, Part
from testbed.model.combine import state_hash
from testbed.rounds import federate
from tests.contract.harness import BLOCKS, WORK, base_model, run_of


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("settings", [{}, {"granularity": "part"}, {"selection": "random"}, {"selection": "last"}])
def test_keeping_every_block_is_vanilla_federated_lora_bit_for_bit(settings, tmp_path):
    pruned = federate(run_of(FedPruner(rank=4, **settings), tmp_path / "pruned"))
    plain = federate(run_of(Lora(rank=4), tmp_path / "plain"))
    assert state_hash(pruned.tensors, {}) == state_hash(plain.tensors, {})


@pytest.mark.parametrize(
    ("selection", "kept"), [("first", (0, 1)), ("last", (2, 3)), ("even", (0, 2))], ids=["first", "last", "even"]
)
def test_the_ablations_keep_the_blocks_their_name_says(selection, kept, tmp_path):
    run = run_of(FedPruner(selection=selection), tmp_path, rounds=1, keep=2)
    federate(run)
    assert {job.submodel.positions for job in run.engine.jobs} == {kept}
    assert "probe" not in run.engine.phases


def test_random_selection_differs_between_clients_and_rounds(tmp_path):
    run = run_of(FedPruner(selection="random"), tmp_path, rounds=3, keep=2)
    federate(run)
    assert len({job.submodel.positions for job in run.engine.jobs}) > 2
    assert all(len(job.submodel.blocks) == 2 for job in run.engine.jobs)


@pytest.mark.parametrize("importance", ["block_influence", "leave_one_out", "adapter_norm"])
@pytest.mark.parametrize("granularity", ["block", "part"])
def test_every_importance_selects_as_many_units_as_the_budget_admits(importance, granularity, tmp_path):
    method = FedPruner(rank=2, importance=importance, granularity=granularity)
    run = run_of(method, tmp_path, rounds=2, clients=2, steps=1, keep=2)
    state = federate(run)
    kept = state.scalars["kept"]
    counts = method._counts(run.plan.clients[0].submodel)
    for client in ("0", "1"):
        assert {tuple(unit): len(positions) for unit, positions in kept[client]["kept"]} == counts
    assert all(result.outcome == "finished" for result in run.folder.results())


def test_a_client_sends_the_adapters_of_its_kept_blocks_only_and_the_others_keep_their_value(tmp_path):
    run = run_of(FedPruner(rank=2), tmp_path, rounds=1, clients=1, keep=1)
    start = run.method.start(run.base, run.work, [], run.config.seed, 1)
    state = federate(run)
    [[_, [position]]] = state.scalars["kept"]["0"]["kept"]
    for name, tensor in state.tensors.items():
        inside = name.startswith(f"model.layers.{position}.") or not name.startswith("model.layers.")
        moved = not torch.equal(tensor, start.tensors[name])
        assert moved is inside or "lora_A" in name, name


def test_probe_every_asks_for_a_new_selection_only_when_it_is_due(tmp_path):
    run = run_of(FedPruner(rank=2, probe_every=2), tmp_path, rounds=4, clients=1, keep=2)
    federate(run)
    assert [job.kind for job in run.engine.jobs] == ["probe and train", "train", "probe and train", "train"]
    assert len(run.engine.jobs[1].submodel.blocks) == 2


def test_choices_come_largest_first_and_part_granularity_offers_every_pair(tmp_path):
    shape = base_model(tmp_path).shape
    assert [len(choice.blocks) for choice in FedPruner().choices(shape)] == list(range(BLOCKS, 0, -1))
    pairs = list(FedPruner(granularity="part").choices(shape))
    elements = [sum(shape.part_elements[b.position][part] for b in pair.blocks for part in b.parts) for pair in pairs]
    assert len(pairs) == BLOCKS**2
    assert elements == sorted(elements, reverse=True)


def test_a_pruned_part_is_not_in_the_update(tmp_path):
    method = FedPruner(rank=2, granularity="part", selection="first")
    run = run_of(method, tmp_path, rounds=1, clients=1)
    uneven = next(
        choice
        for choice in method.choices(run.base.shape)
        if method._counts(choice) == {(ATTENTION,): 1, (FEED_FORWARD,): 3}
    )
    run.plan = replace(run.plan, clients=(replace(run.plan.clients[0], submodel=uneven),))
    federate(run)
    [result] = run.folder.results()
    blocks = run.engine.jobs[0].submodel.blocks
    assert [block.parts for block in blocks] == [PARTS, (FEED_FORWARD,), (FEED_FORWARD,)]
    assert not [spec.name for spec in result.tensors if "layers.1.self_attn" in spec.name]
    assert [spec.name for spec in result.tensors if "layers.1.mlp" in spec.name]


def test_the_update_of_a_wrong_position_would_be_refused(tmp_path):
    run = run_of(FedPruner(rank=2), tmp_path, rounds=1)
    state = run.method.start(run.base, run.work, [], 0, 1)

    class Update:
        client, examples, scalars, names = 0, 1, {}, ("model.layers.9.mlp.up_proj.lora_A.weight",)

        def read(self, name):
            return Part(torch.zeros(2, 32))

    with pytest.raises(Exception, match="no tensor of this run's state"):
        run.method.verify(state, Update())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank=0"), ({"targets": ("nowhere",)}, "'nowhere' is no linear map"), ({"samples": 1}, "samples")],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        FedPruner(**settings).check(base_model(tmp_path).shape, WORK)


def test_block_is_a_description_and_says_whether_it_is_whole():
    assert Block(0).whole
    assert not Block(0, parts=(ATTENTION,)).whole
