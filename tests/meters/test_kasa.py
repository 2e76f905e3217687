"""The Kasa and Tapo meters: python-kasa, where it is installed, against a server that speaks a plug's protocol."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

from testbed.errors import MeterError
from testbed.meters import make
from tests.meters.plugs import KasaFirst


@pytest.fixture
def plug():
    if importlib.util.find_spec("kasa") is None:
        lacking = "python-kasa is not installed (pip install python-kasa)"
        pytest.fail(lacking, pytrace=False) if os.environ.get("CI") else pytest.skip(lacking)
    with KasaFirst() as plug:
        yield plug


@pytest.fixture
def meter(plug):
    meter = make("kasa", {"host": "127.0.0.1", "port": plug.port})
    yield meter
    meter.close()


def test_its_power_is_read(plug, meter):
    meter.open()
    plug.watts = 7.25
    assert meter.read().watts == (7.25,)
    assert meter.rails == meter.total_rails == ("plug",)
    assert not meter.has_counters


def test_it_switches_and_says_when_it_does_not(plug, meter):
    meter.open()
    meter.switch(on=False)
    assert plug.on is False
    plug.mood = "stuck"
    with pytest.raises(MeterError, match="told to switch on, and did not"):
        meter.switch(on=True)


def test_it_switches_without_being_opened(plug, meter):
    meter.switch(on=False)
    assert plug.on is False


def test_a_plug_that_was_away_is_found_again(plug, meter):
    meter.open()
    plug.hang_up()
    assert meter.read().watts == (4.2,)
    meter.close()
    meter.open()
    assert meter.read().watts == (4.2,)


def test_a_plug_that_measures_nothing(plug, meter):
    plug.measures = False
    with pytest.raises(MeterError, match="this model switches, and measures no power"):
        meter.open()


def test_an_outlet_that_there_is_not(plug):
    meter = make("kasa", {"host": "127.0.0.1", "port": plug.port, "outlet": 2})
    with pytest.raises(MeterError, match="it has no outlet 2, but 0"):
        meter.open()
    meter.close()


def test_nobody_there(plug):
    meter = make("kasa", {"host": "127.0.0.1", "port": 1})
    with pytest.raises(MeterError, match=r"kasa 127\.0\.0\.1: Unable to connect"):
        meter.open()
    meter.close()


def test_a_tapo_plug_wants_its_account(plug, monkeypatch):
    monkeypatch.delenv("TAPO_USER", raising=False)
    meter = make("tapo", {"host": "127.0.0.1", "user_env": "TAPO_USER", "password_env": "TAPO_PASSWORD"})
    with pytest.raises(MeterError, match=r"tapo 127\.0\.0\.1: its account .* environment variable TAPO_USER"):
        meter.open()
    meter.close()


@pytest.mark.parametrize("name", ["kasa", "tapo"])
def test_without_the_library_it_is_said_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "kasa", None)
    more = {"user_env": "U", "password_env": "P"} if name == "tapo" else {}
    with pytest.raises(MeterError, match=r"GPL-3.0-or-later.*pip install python-kasa"):
        make(name, {"host": "127.0.0.1", **more}).open()
