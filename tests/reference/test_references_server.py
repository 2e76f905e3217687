"""The server's optimizers and clipping, against a reference that was written from the papers' formulas."""

from __future__ import annotations

import pytest

from methods.lora import Lora
from tests.reference import server
from tests.reference.driver import (
    data_of,
    finished,
    float64_run,
    largest_difference,
    rates_of,
    started,
    weights_of,
)

RULES = [
    pytest.param("fedavgm", {"server_rate": 0.7, "server_momentum": 0.8}, id="fedavgm"),
    pytest.param("fedadam", {"server_rate": 0.02}, id="fedadam"),
    pytest.param("fedyogi", {"server_rate": 0.02, "server_floor": 1e-2}, id="fedyogi"),
]


def both(tmp_path, mutation=None, **settings):
    """What the project and what the reference make of three rounds."""
    run = float64_run(Lora(rank=2, alpha=4.0, **settings), tmp_path, rounds=3)
    method, start = run.method, started(run)
    expected = server.run(
        weights_of(run), start.tensors, data_of(run), 3, learning_rates=rates_of(run), scale=2.0,
        rule=method.server, rate=method.server_rate or 1.0, momentum=method.server_momentum,
        decay=method.server_decay, floor=method.server_floor, clip=method.clip, mutation=mutation,
    )  # fmt: skip
    return finished(run).tensors, expected


@pytest.mark.parametrize(("rule", "settings"), [pytest.param("average", {}, id="average"), *RULES])
def test_the_servers_step_is_the_papers(rule, settings, tmp_path):
    assert largest_difference(*both(tmp_path, server=rule, **settings)) < 1e-5


@pytest.mark.parametrize(("rule", "settings"), RULES)
def test_a_step_away_from_the_mean_would_show(rule, settings, tmp_path):
    assert largest_difference(*both(tmp_path, "sign", server=rule, **settings)) > 1e-3


def test_clipped_updates_count_alike_whatever_their_examples(tmp_path):
    assert largest_difference(*both(tmp_path, clip=0.1)) < 1e-5


def test_a_wrong_way_to_clip_would_show(tmp_path, monkeypatch):
    from tests.contract import harness

    shards = iter([16, 48])
    whole = harness.shard_of
    monkeypatch.setattr(harness, "shard_of", lambda task, _, seed: whole(task, next(shards, 200), seed))
    found, expected = both(tmp_path, "examples", clip=0.1)
    assert largest_difference(found, expected) > 1e-4
