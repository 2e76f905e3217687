"""The Shelly meter and the HTTP below it, against servers that behave as the two generations do."""

from __future__ import annotations

import pytest

from testbed.errors import MeterError, UsageError
from testbed.meters import _http, make
from tests.meters.plugs import ShellyFirst, ShellySecond

PLUGS = {1: ShellyFirst, 2: ShellySecond}


@pytest.fixture(params=PLUGS)
def plug(request):
    with PLUGS[request.param]() as plug:
        yield plug


def opened(plug, **settings):
    meter = make("shelly", {"host": plug.host, **settings})
    meter.open()
    return meter


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_http, "_TIMEOUT_SECONDS", 0.05)


def test_the_generation_is_asked_and_its_power_read(plug):
    meter = opened(plug)
    plug.watts = 7.5
    assert meter.read().watts == (7.5,)
    assert meter.rails == meter.total_rails == ("relay:0" if isinstance(plug, ShellyFirst) else "switch:0",)
    assert (meter.point, meter.where) == ("wall_ac", "controller")
    assert plug.asked[0] == "/shelly"


def test_a_generation_that_is_stated_is_not_asked(plug):
    opened(plug, generation=1 if isinstance(plug, ShellyFirst) else 3)
    assert "/shelly" not in plug.asked


def test_the_counter_of_the_second_generation_is_in_joules():
    with ShellySecond() as plug:
        meter = opened(plug)
        assert meter.has_counters
        plug.watt_hours = 10_000.5
        assert meter.read().joules == (36_001_800.0,)


@pytest.mark.parametrize("kind", [ShellyFirst, ShellySecond])
def test_a_counter_that_is_too_coarse_or_is_not_there_is_not_told(kind):
    with kind() as plug:
        plug.watt_hours = None
        meter = opened(plug)
        assert not meter.has_counters
        assert meter.read().joules is None


def test_it_switches(plug):
    meter = opened(plug)
    meter.switch(on=False)
    assert plug.on is False
    meter.switch(on=True)
    assert plug.on is True


def test_it_switches_without_being_opened(plug):
    make("shelly", {"host": plug.host}).switch(on=False)
    assert plug.on is False


def test_a_switch_that_does_not_move_is_an_error(plug):
    plug.mood = "stuck"
    with pytest.raises(MeterError, match="told to switch off, and did not"):
        opened(plug).switch(on=False)


# ── passwords ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_password_comes_from_the_environment(plug, monkeypatch):
    monkeypatch.setenv("PLUG", "a secret: ü")
    plug.password = "a secret: ü"
    meter = opened(plug, password_env="PLUG")
    meter.switch(on=False)
    assert plug.on is False
    assert meter.read().watts == (4.2,)


def test_one_challenge_serves_many_readings_until_it_expires(monkeypatch):
    monkeypatch.setenv("PLUG", "secret")
    with ShellySecond(password="secret") as plug:
        meter = opened(plug, password_env="PLUG", generation=2)
        before = len(plug.asked)
        for _ in range(5):
            meter.read()
        assert len(plug.asked) == before + 5
        plug.nonce += 1
        assert meter.read().watts == (4.2,)
        assert len(plug.asked) == before + 7


def test_a_password_that_is_asked_for_and_not_named(plug):
    plug.password = "secret"
    with pytest.raises(MeterError, match=r"asks for a password.*password_env: "):
        opened(plug)


def test_a_variable_that_is_not_set(plug, monkeypatch):
    monkeypatch.delenv("PLUG", raising=False)
    plug.password = "secret"
    with pytest.raises(MeterError, match="environment variable PLUG, which is not set"):
        opened(plug, password_env="PLUG")


def test_a_wrong_password_is_not_repeated_in_the_message(plug, monkeypatch):
    monkeypatch.setenv("PLUG", "guessed")
    plug.password = "secret"
    with pytest.raises(MeterError, match="does not take the password in PLUG for user admin") as caught:
        opened(plug, password_env="PLUG")
    assert "guessed" not in str(caught.value)


def test_a_login_of_another_kind_is_named(monkeypatch):
    monkeypatch.setenv("PLUG", "secret")
    with ShellySecond(password="secret") as plug:
        plug.algorithm = "SHA-512-256"
        with pytest.raises(MeterError, match="a login of a kind that is not known here: Digest"):
            opened(plug, password_env="PLUG")


def test_the_answer_to_a_challenge_is_that_of_the_standard():
    # RFC 7616, section 3.9.1
    challenge = {
        "realm": "http-auth@example.org", "qop": "auth, auth-int", "algorithm": "SHA-256",
        "nonce": "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v",
        "opaque": "FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS",
    }  # fmt: skip
    digest = _http.Digest("Mufasa", "Circle of Life", challenge, "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ")
    header = digest("/dir/index.html")
    assert 'response="753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"' in header
    assert f'opaque="{challenge["opaque"]}"' in header
    assert "nc=00000001" in header
    assert "nc=00000002" in digest("/dir/index.html")


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────
MOODS = {
    "slow": r"cannot be reached \(no answer in time\)",
    "garbage": "expected JSON from .*, got '<html>Please log in",
    "broken": "answers 500 Internal Server Error: out of memory",
    "rude": "does not speak HTTP",
    "moved": "answers 302",
}


@pytest.mark.parametrize("mood", MOODS)
def test_a_plug_that_misbehaves_costs_one_reading(plug, mood, impatient):
    meter = opened(plug)
    plug.mood = mood
    with pytest.raises(MeterError, match=MOODS[mood]):
        meter.read()
    plug.mood = ""
    assert meter.read().watts == (4.2,)


def test_nobody_there():
    with ShellyFirst() as plug:
        host = plug.host
    with pytest.raises(MeterError, match=rf"shelly {host}: http://{host} cannot be reached \(Connection refused\)"):
        make("shelly", {"host": host}).open()


def test_a_model_without_a_meter():
    with ShellySecond() as plug:
        plug.measures = False
        with pytest.raises(MeterError, match="tells no power of channel 0: this model measures none"):
            opened(plug)


def test_a_channel_that_there_is_not():
    with ShellyFirst() as plug, pytest.raises(MeterError, match="no meter of channel 1, but 1, which count from 0"):
        opened(plug, channel=1)
    with ShellySecond() as plug, pytest.raises(MeterError, match="answers 404"):
        opened(plug, channel=1)


def test_a_reading_that_the_plug_itself_does_not_trust():
    with ShellyFirst() as plug:
        meter = opened(plug)
        plug.valid = False
        with pytest.raises(MeterError, match="not valid now"):
            meter.read()


def test_a_figure_that_is_none(plug):
    meter = opened(plug)
    plug.watts = "much"
    with pytest.raises(MeterError, match=r"tells no power .*, but 'much'"):
        meter.read()


def test_something_else_than_a_shelly(plug):
    plug.answer = lambda path, query: (200, {"hello": "world"})
    with pytest.raises(MeterError, match="what answers there is no Shelly"):
        opened(plug)


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match="generation: expected 1, 2, 3"):
        make("shelly", {"host": "x", "generation": 0})
    with pytest.raises(UsageError, match='no setting "pasword_env"; did you mean "password_env"'):
        make("shelly", {"host": "x", "pasword_env": "X"})
