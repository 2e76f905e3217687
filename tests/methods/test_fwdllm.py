"""FwdLLM: what a client sends, when the server steps and how far, what it keeps to itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from methods.fwdllm import FwdLLM, _Direction
from testbed.errors import UsageError, WireError
from testbed.evaluate import mounted
from testbed.method import Part, Submodel
from testbed.model.footprint import Baseline, predict
from testbed.node.training import step_seed
from testbed.rounds import federate
from testbed.task import Shard, batch_indices
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, clients_of, run_of
from tests.reference.driver import float64_run, started

SMALL = {"rank": 2, "candidates": 2}
SHORT = {"clients": 2, "steps": 1, "evaluate_every": 100}


def answers(state, *seeds, examples=(1, 1)):
    """One client's gradient for each seed: all tensors of random numbers."""

    def one(client, seed):
        draw = torch.Generator().manual_seed(seed)
        sent = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in state.tensors.items()}
        return SimpleNamespace(
            client=client, examples=examples[client], scalars={}, names=tuple(sent), read=lambda name: Part(sent[name])
        )

    return [one(client, seed) for client, seed in enumerate(seeds)]


def asked(run, state, index):
    """How many perturbations the clients of the next round are asked for."""
    begun = run.method.begin(state, run.base, index)
    [number] = {order.scalars["perturbations"] for order in run.method.order(begun, run.base, clients_of(run), index)}
    return begun, number


def test_where_gradients_disagree_the_server_keeps_them_asks_for_more_and_steps_at_last(tmp_path):
    run = run_of(FwdLLM(**SMALL, variance_limit=1e-3, perturbations=3, patience=2), tmp_path, clients=2, rounds=4)
    state = first = started(run)
    numbers = []
    for index in range(3):
        state, number = asked(run, state, index)
        numbers.append(number)
        assert all(torch.equal(state.tensors[name], first.tensors[name]) for name in first.tensors)
        state = run.method.combine(state, run.base, answers(state, 10 * index, 10 * index + 1))
    assert numbers == [3, 6, 12]
    assert all(not torch.equal(state.tensors[name], first.tensors[name]) for name in first.tensors)
    assert asked(run, state, 3)[1] == 3
    assert set(state.server) == {f"gradient.{name}" for name in state.tensors}


def test_a_step_is_down_the_mean_by_examples_of_all_updates_since_the_last(tmp_path):
    method = FwdLLM(**SMALL, variance_limit=1e-3, patience=1, server_rate=0.5, warmup=0.0, decay=False)
    run = run_of(method, tmp_path, clients=2)
    state = first = started(run)
    sent = [answers(state, *seeds, examples=(1, 3)) for seeds in ((1, 2), (3, 4))]
    for index, received in enumerate(sent):
        state = run.method.combine(run.method.begin(state, run.base, index), run.base, received)
    for name, before in first.tensors.items():
        mean = sum(update.examples * update.read(name).tensor for received in sent for update in received) / 8
        torch.testing.assert_close(state.tensors[name], before - 0.5 * mean)
        torch.testing.assert_close(state.server[f"gradient.{name}"], mean)


@pytest.mark.parametrize(("seeds", "steps"), [((1,), True), ((1, 1), True), ((1, 2), False)])
def test_it_steps_with_one_update_or_with_two_that_agree_and_not_with_two_that_do_not(seeds, steps, tmp_path):
    run = run_of(FwdLLM(**SMALL, variance_limit=0.5), tmp_path, clients=2)
    state = run.method.begin(started(run), run.base, 0)
    after = run.method.combine(state, run.base, answers(state, *seeds))
    assert any(not torch.equal(after.tensors[name], state.tensors[name]) for name in state.tensors) is steps


def test_the_rate_rises_then_falls(tmp_path):
    method = FwdLLM(server_rate=1.0, warmup=0.4)
    assert [round(method.rate(index, 5), 6) for index in range(5)] == [0.5, 1.0, 1.0, 0.666667, 0.333333]
    assert [FwdLLM(server_rate=1.0, warmup=0.4, decay=False).rate(index, 5) for index in range(5)] == [0.5, 1, 1, 1, 1]
    assert FwdLLM(server_rate=1.0).rate(0, 1) == 1.0


def test_the_direction_taken_is_the_candidate_nearest_to_the_last_gradient():
    job = SimpleNamespace(seed=0, round=1, client=0)
    every = [_Direction(1, number) for number in range(4)]
    like = {"a": torch.zeros(6, 5), "b": torch.zeros(7)}
    last = {name: tensor.clone() for name, tensor in like.items()}
    every[2].add_to(last, 0.1)
    assert max(every, key=lambda one: one.along(last)) == every[2]
    method = FwdLLM(candidates=4)
    assert method._direction(SimpleNamespace(job=job), 0, 3, {}).number == 12
    chosen = method._direction(SimpleNamespace(job=job), 0, 3, last)
    assert chosen.number == max(range(12, 16), key=lambda n: _Direction(chosen.seed, n).along(last))


def test_the_forward_gradient_is_the_gradient_along_its_directions(tmp_path):
    """One direction, one step: what is sent is v · (∇L · v), up to the curvature."""
    run = float64_run(FwdLLM(rank=2, h=1e-5), tmp_path, rounds=1, steps=1, clients=1)
    seen = {}

    def keep(state, base, received):
        seen.update({name: received[0].read(name).tensor for name in received[0].names})
        return state

    run.method.combine = keep
    federate(run)
    [job] = run.engine.jobs
    built = mounted(run.method, run.base, job.submodel, started(run).tensors, run.work)
    built.model.eval()
    shard = Shard.open(run.store.path(job.shard))
    built.loss(shard.batch(batch_indices(len(shard), 16, 0, 0, 0, 0), 16, 0)).backward()
    direction = _Direction(step_seed(0, 0, 0, 0), 0)
    slopes = {name: parameter.grad for name, parameter in built.trainable().items()}
    v = {name: torch.zeros_like(gradient) for name, gradient in slopes.items()}
    direction.add_to(v, 1.0)
    slope = sum(float((slopes[name] * v[name]).sum()) for name in v)
    for name, sent in seen.items():
        torch.testing.assert_close(sent, slope * v[name], rtol=1e-2, atol=0.0)


def test_the_last_gradient_travels_down_and_the_sums_never_do(tmp_path):
    run = run_of(FwdLLM(**SMALL, variance_limit=1e-9, patience=3), tmp_path, rounds=2, **SHORT)
    state = federate(run)
    assert {name.split(".")[0] for name in state.server} == {"even", "odd"}
    [order, _] = run.method.order(state, run.base, clients_of(run), 2)
    assert set(order.tensors) == set(state.tensors)
    run = run_of(FwdLLM(**SMALL, variance_limit=1e9), tmp_path, rounds=1, **SHORT)
    state = federate(run)
    [order, _] = run.method.order(state, run.base, clients_of(run), 1)
    assert set(order.tensors) == {prefix + name for name in state.tensors for prefix in ("", "gradient.")}


def test_it_takes_the_weights_of_inference_two_gradients_and_a_direction(tmp_path):
    shape, method = base_model(tmp_path).shape, FwdLLM(rank=4)
    [phase] = method.phases(Submodel.first(len(shape)), shape, WORK)
    parts = predict([phase], shape, WORK, Baseline(0)).phases[0].parts
    trained = sum(tensor.numel() for tensor in started(run_of(method, tmp_path)).tensors.values())
    assert parts["method"] == 4 * (2 * trained + 4 * 64)
    assert not {"optimizer", "gradients"} & set(parts)


@pytest.mark.parametrize("change", [{"names": ()}, {"read": lambda name: Part(torch.zeros(1, 1), ((0, 1), (0, 1)))}])
def test_an_update_that_lacks_a_gradient_or_sends_a_piece_of_it_is_refused(change, tmp_path):
    run = run_of(FwdLLM(**SMALL), tmp_path)
    state = started(run)
    [update] = answers(state, 1)
    with pytest.raises(WireError, match=r"client 0: it did not send the gradient of the whole of model\.layers\.0"):
        run.method.verify(state, SimpleNamespace(**{**vars(update), **change}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "setting candidates=0: expected at least 1"),
        ({"perturbations": 0}, "setting perturbations=0: expected at least 1"),
        ({"patience": -1}, "setting patience=-1: expected at least 0"),
        ({"h": 0.0}, "setting h=0.0: expected more than 0"),
        ({"variance_limit": 0.0}, "setting variance_limit=0.0: expected more than 0"),
        ({"warmup": 1.5}, "setting warmup=1.5: expected a number from 0 to 1"),
        ({"server": "fedadam"}, "this method's server does not average"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        FwdLLM(**settings).check(base_model(tmp_path).shape, WORK)
