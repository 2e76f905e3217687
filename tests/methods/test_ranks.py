"""LoRA of unlike ranks: what a client is sent and sends, what is refused, and ranks that never die."""

from __future__ import annotations

import pytest
import torch

from methods._ranks import cut_to, leading, living, rank_in
from methods.flexlora import FlexLora
from methods.flora import Flora
from methods.hetlora import HetLora
from testbed.errors import UsageError, WireError
from testbed.method import Part
from testbed.rounds import federate
from tests.contract.conftest import cheap_collection, one_thread  # noqa: F401 -- fixtures
from tests.contract.harness import WORK, base_model, clients_of, run_of
from tests.reference.driver import started

SHORT = {"clients": 3, "rounds": 1, "steps": 1, "evaluate_every": 100}
KINDS = (Flora, HetLora, FlexLora)
A, B = (f"model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_sends_the_first_rows_and_columns_of_its_own_rank(kind, tmp_path):
    run = run_of(kind(ranks=(6, 2), **({"penalty": 0.0} if kind is HetLora else {})), tmp_path, **SHORT)
    federate(run)
    sent = {
        (result.client, spec.name): spec.ranges
        for result in run.folder.results()
        for spec in result.tensors
        if spec.name in (A, B)
    }
    for client, rank in enumerate((6, 2, 6)):  # the ranks go on from their beginning
        assert sent[client, A] == ((0, rank), (0, 32))
        assert sent[client, B] == ((0, 32), (0, rank))


@pytest.mark.parametrize("kind", [HetLora, FlexLora])
def test_a_client_is_sent_its_own_rank_and_equal_ranks_are_sent_alike(kind, tmp_path):
    run = run_of(kind(ranks=(6, 2)), tmp_path, **SHORT)
    state = started(run)
    orders = run.method.order(state, run.base, clients_of(run), 0)
    assert [rank_in(order.tensors) for order in orders] == [6, 2, 6]
    assert orders[0].tensors is orders[2].tensors
    assert torch.equal(orders[1].tensors[A], state.tensors[A][:2])
    assert torch.equal(orders[1].tensors["score.weight"], state.tensors["score.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_the_largest_rank_are_what_the_footprint_expects(kind, tmp_path):
    shape = base_model(tmp_path).shape
    [phase] = kind(ranks=(2, 6)).phases(next(kind().choices(shape)), shape, WORK)
    assert phase.outfit.rank == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": ()}, "setting ranks=: expected"),
        ({"ranks": (4, 0)}, "setting ranks=4,0: expected one or more numbers of at least 1"),
        ({"rank": 8}, "setting rank=8: here clients have the ranks 16,8,4"),
        ({"targets": ("nowhere",)}, "targets=nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_the_plan(kind, settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        kind(**settings).check(base_model(tmp_path).shape, WORK)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_rank_may_be_said_twice(kind, tmp_path):
    kind(rank=16).check(base_model(tmp_path).shape, WORK)


@pytest.mark.parametrize("kind", [Flora, FlexLora])
def test_a_server_that_averages_no_factors_takes_no_steps_along_them(kind, tmp_path):
    with pytest.raises(UsageError, match="settings server and clip"):
        kind(server="fedadam").check(base_model(tmp_path).shape, WORK)


class Sent:
    """An update in memory."""

    def __init__(self, parts):
        self.client, self.examples, self.scalars, self.names = 3, 1, {}, tuple(parts)
        self.read = parts.__getitem__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop(A), "it did not send"),
        (lambda parts: parts.update({A: leading(parts[A].tensor[:1])}), "not of the first ranks"),
        (lambda parts: parts.update({A: Part(parts[A].tensor[:2], ((1, 3), (0, 32)))}), "not of the first ranks"),
        (lambda parts: parts.update({A: Part(parts[A].tensor[:2].T)}), "expected a piece"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(change, message, tmp_path):
    run = run_of(FlexLora(ranks=(4,)), tmp_path)
    state = started(run)
    parts = {name: leading(tensor) for name, tensor in cut_to(state.tensors, 2).items()}
    run.method.verify(state, Sent(parts))
    change(parts)
    with pytest.raises(WireError, match=message):
        run.method.verify(state, Sent(parts))


def test_a_rank_without_a_product_keeps_its_row_of_a():
    a, b, before = torch.ones(3, 4), torch.ones(5, 3), torch.full((3, 4), 7.0)
    a[1], b[:, 1] = 0.0, 1e-9
    found_a, found_b = living(a, b, before)
    assert torch.equal(found_a[1], before[1])
    assert not found_b[:, 1].any()
    assert torch.equal(found_a[::2], a[::2])
    untouched, zero = living(a, torch.zeros(5, 3), before)
    assert torch.equal(untouched, before)
    assert not zero.any()
