"""What a run may declare that devices undergo: how it is said, whom it is for, when it happens, and what is refused."""

import itertools

import pytest

from testbed.disturbances import CALM, parse, parse_options
from testbed.errors import UsageError
from testbed.job import Job
from testbed.run import RunConfig
from tests import drills
from tests.drills import MIB, device

EVERYTHING = {
    "dropout": {"probability": 0.3},
    "straggler": [{"slowdown": 3, "devices": ["a"]}, {"slowdown": 2.5}],
    "slow_link": {"rate": "1.5 Mbit/s", "delay": "50 ms", "share": 0.5},
    "background_load": {"processes": 2, "memory": "16 MiB", "probability": 0.25},
    "thermal_limit": {"after": "90 s", "slowdown": 4},
}


def places(devices=4, each=2):
    return [(client, device(f"device-{client % devices}")) for client in range(devices * each)]


# ── how it is said ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_declared_can_be_written_down_and_read_again():
    declared = parse(EVERYTHING)
    assert parse(declared.to_json()) == declared
    assert parse(declared.to_json()).to_json() == declared.to_json()
    assert declared.to_json()["thermal_limit"] == {"after": "1.5 min", "slowdown": 4}


def test_the_short_and_the_long_form_and_the_command_line_say_the_same():
    long = parse({"straggler": {"slowdown": 3, "devices": ["pi-4", "jetson"]}, "dropout": {"probability": 0.3}})
    assert parse_options(["straggler = 3 @ pi-4, jetson", "dropout=0.3"]) == long
    assert parse({"dropout": 0.3}) == parse_options(["dropout=0.3"])
    assert parse_options(["slow-link=1 Mbit/s, delay=50 ms"]) == parse(
        {"slow_link": {"rate": "1000 kbit/s", "delay": "0.05 s"}}
    )


def test_nothing_declared_is_nothing_everywhere():
    assert parse(None).to_json() == parse({}).to_json() == parse_options([]).to_json() == {}
    assert CALM.for_job(0, 0) == parse({}).settle(0, places()).for_job(0, 0) == {}
    assert "disturbances" not in drills.job().to_json()
    assert RunConfig("lora").disturbances == {}


def test_values_go_to_a_job_in_base_units():
    weather = parse({**EVERYTHING, "straggler": 3, "slow_link": {"rate": "1.5 Mbit/s", "delay": "50 ms"}})
    undergone = weather.settle(0, places()).for_job(0, 0)
    assert undergone["slow_link"] == {"bytes_per_second": 187500.0, "delay_seconds": 0.05}
    assert undergone["straggler"] == {"slowdown": 3}
    assert undergone["thermal_limit"] == {"after_seconds": 90.0, "slowdown": 4}
    sent = Job.from_json({**drills.job().to_json(), "disturbances": undergone})
    assert sent.disturbances == undergone


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"drop_out": 0.3}, ["disturbances.drop_out", "dropout"]),
        ({"dropout": 30}, ["disturbances.dropout.probability", "up to 1", "30"]),
        ({"dropout": None}, ["disturbances.dropout", "probability is missing"]),
        ({"dropout": {"probability": True}}, ["probability", "True"]),
        ({"dropout": []}, ["disturbances.dropout.probability", "[]"]),
        ({"straggler": 1}, ["straggler.slowdown", "above 1"]),
        ({"straggler": {"slowdown": "nan"}}, ["straggler.slowdown", "nan"]),
        ({"straggler": {"slowdown": 3, "device": ["a"]}}, ["straggler.device", '"devices"']),
        ({"straggler": {"slowdown": 3, "devices": []}}, ["straggler.devices", "names, tags or profiles"]),
        ({"straggler": {"slowdown": 3, "devices": {"a": 1}}}, ["straggler.devices"]),
        ({"straggler": {"slowdown": 3, "share": 2}}, ["straggler.share", "up to 1"]),
        ({"slow_link": "5"}, ["slow_link.rate", "1 Mbit/s"]),
        ({"slow_link": {"rate": "1 MB/s"}}, ["slow_link.rate", "'1 MB/s'"]),
        ({"slow_link": {"rate": "1 Mbit/s", "delay": 50}}, ["slow_link.delay", "50 ms"]),
        ({"slow_link": {"delay": "50 ms"}}, ["slow_link", "rate is missing"]),
        ({"background_load": 1.5}, ["background_load.processes", "whole number"]),
        ({"background_load": {"processes": 1, "memory": 64}}, ["background_load.memory", "64 MiB"]),
        ({"thermal_limit": "20"}, ["thermal_limit.after", "20 s"]),
        (["dropout"], ["disturbances", "a mapping"]),
    ],
)
def test_what_is_said_wrong_is_named(declared, words):
    with pytest.raises(UsageError) as raised:
        parse(declared)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("text", ["dropout", "dropout=", "dropout=0.3@", "stragler=3", "slow_link=1 Mbit/s,50 ms"])
def test_an_option_that_is_said_wrong_is_repeated(text):
    with pytest.raises(UsageError) as raised:
        parse_options([text])
    assert f"--disturb {text}: " in str(raised.value)


# ── whom, and when ────────────────────────────────────────────────────────────────────────────────────────────────────
def everybody_dropped(weather, rounds=50, clients=8):
    return {(index, client) for index in range(rounds) for client in range(clients) if weather.for_job(index, client)}


def test_the_same_seed_gives_the_same_weather_and_another_one_another():
    few = parse({"dropout": 0.3})
    first = everybody_dropped(few.settle(7, places()))
    assert first == everybody_dropped(few.settle(7, places()))
    assert first != everybody_dropped(few.settle(8, places()))
    assert 0.2 < len(first) / 400 < 0.4


def test_whom_a_small_probability_or_share_disturbs_a_larger_one_does_too():
    dropped = [everybody_dropped(parse({"dropout": p}).settle(0, places())) for p in (0.1, 0.3, 0.6, 1)]
    assert all(small < large for small, large in itertools.pairwise(dropped))
    shares = [parse({"straggler": {"slowdown": 3, "share": s}}).settle(0, places()) for s in (0.25, 0.5, 1)]
    slow = [{client for _, client in everybody_dropped(weather, rounds=1)} for weather in shares]
    assert [len(clients) for clients in slow] == [2, 4, 8]
    assert slow[0] < slow[1] < slow[2]


def test_one_disturbance_does_not_change_the_draws_of_another():
    alone = parse({"dropout": 0.3}).settle(0, places())
    beside = parse({"straggler": 3, "dropout": 0.3}).settle(0, places())
    for index in range(20):
        assert beside.for_job(index, 1).get("dropout") == alone.for_job(index, 1).get("dropout")


def test_a_word_chooses_devices_and_the_first_rule_that_fits_holds():
    weather = parse({"straggler": [{"slowdown": 3, "devices": ["device-1"]}, {"slowdown": 2}]}).settle(0, places())
    slowdowns = [weather.for_job(0, client)["straggler"]["slowdown"] for client in range(8)]
    assert slowdowns == [2, 3, 2, 2, 2, 3, 2, 2]
    assert weather.slowed == {"device-0", "device-1", "device-2", "device-3"}
    assert parse({"slow_link": "1 Mbit/s"}).settle(0, places()).slowed == frozenset()


def test_the_plan_says_who_undergoes_what_in_which_rounds():
    weather = parse({"dropout": 0.3, "straggler": {"slowdown": 3, "devices": ["device-1"]}}).settle(0, places())
    dropout, straggler = weather.lines(4)
    assert straggler == "disturbed by straggler, slowdown 3: client-1, client-5 on device-1 in every round"
    told = weather.to_json(4)
    expected = {str(c): [r for r in range(4) if "dropout" in weather.for_job(r, c)] for c in range(8)}
    assert told[0]["clients"] == expected
    assert told[1] | {"clients": None} == {
        "kind": "straggler", "slowdown": 3, "devices": ["device-1"], "clients": None,
    }  # fmt: skip
    first = next(client for client, rounds in expected.items() if len(rounds) == 1)
    assert f"client-{first} on device-{int(first) % 4} in round {expected[first][0] + 1}" in dropout


# ── what is refused before anything begins ────────────────────────────────────────────────────────────────────────────
def refused(declared, *devices, capped=True):
    with pytest.raises(UsageError) as raised:
        parse(declared).settle(0, list(enumerate(devices))).check(devices, capped=capped)
    return str(raised.value)


def test_a_word_that_fits_no_device_is_refused_with_those_that_there_are():
    assert "'orin'" in refused({"straggler": {"slowdown": 3, "devices": ["orin"]}}, device("nano"))


def test_memory_that_leaves_nothing_of_the_budget_is_refused():
    told = refused({"background_load": {"processes": 1, "memory": "64 MiB"}}, device("nano", 64 * MIB))
    assert told == "background_load on device nano: memory 64 MiB leaves nothing of its budget of 64 MiB"


def test_memory_inside_a_budget_is_refused_where_nothing_is_held_to_its_budget():
    load = {"background_load": {"processes": 1, "memory": "1 MiB"}}
    assert "--no-cap" in refused(load, device("nano"), capped=False)
    parse({"background_load": 1}).settle(0, [(0, device("nano"))]).check([device("nano")], capped=False)


def test_an_accelerator_cannot_be_held_back_and_so_is_refused():
    from dataclasses import replace

    orin = replace(device("orin"), accelerator="cuda")
    assert "straggler on device orin" in refused({"straggler": 3}, orin)
    assert "accelerator" in refused({"thermal_limit": "20 s"}, orin)
