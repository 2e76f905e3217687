"""The Tasmota meter, against a server that answers as the firmware does."""

from __future__ import annotations

import pytest

from testbed.errors import MeterError
from testbed.meters import make
from tests.meters.plugs import Tasmota


@pytest.fixture
def plug():
    with Tasmota() as plug:
        yield plug


def opened(plug, **settings):
    meter = make("tasmota", {"host": plug.host, **settings})
    meter.open()
    return meter


@pytest.mark.parametrize(("told", "watts", "step"), [("26", 26.0, 1.0), ("4.20", 4.2, 0.01), ("0.0", 0.0, 0.1)])
def test_the_power_and_how_fine_it_is_told(plug, told, watts, step):
    plug.power = told
    meter = opened(plug)
    assert meter.read().watts == (watts,)
    assert meter.accuracy[0].step_watts == pytest.approx(step)


def test_another_version_has_another_status(plug):
    plug.status = "Status 10"
    assert opened(plug).read().watts == (26.0,)


def test_a_plug_with_several_relays_tells_a_list(plug):
    plug.power = "[26,3]"
    assert opened(plug, channel=2).read().watts == (3.0,)
    with pytest.raises(MeterError, match="no power of channel 3"):
        opened(plug, channel=3)


def test_it_switches_and_says_when_it_does_not(plug):
    meter = opened(plug)
    meter.switch(on=False)
    assert plug.on is False
    plug.mood = "stuck"
    with pytest.raises(MeterError, match="told to switch ON, and answers"):
        meter.switch(on=True)


def test_the_password_travels_and_stays_out_of_messages(plug, monkeypatch):
    plug.password = "joker"
    with pytest.raises(MeterError, match=r"asks for a password .*password_env"):
        opened(plug)
    monkeypatch.setenv("PLUG", "batman")
    with pytest.raises(MeterError, match="does not take the one") as caught:
        opened(plug, password_env="PLUG")
    assert "batman" not in str(caught.value)
    monkeypatch.setenv("PLUG", "joker")
    meter = opened(plug, password_env="PLUG")
    plug.mood = "broken"
    with pytest.raises(MeterError, match="500") as caught:
        meter.read()
    assert "joker" not in str(caught.value)


def test_a_plug_without_a_meter(plug):
    plug.measures = False
    with pytest.raises(MeterError, match="tells no power of channel 1: this plug measures none"):
        opened(plug)


def test_something_else_answers(plug):
    plug.answer = lambda path, query: (200, [1, 2])
    with pytest.raises(MeterError, match="no Tasmota"):
        opened(plug)
