"""The Prometheus meter: against a real server whose samples are known, and against one that misbehaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from testbed.errors import MeterError, UsageError
from testbed.meters import make
from tests.drills import wait_until
from tests.meters.plugs import StandIn
from tests.ssh_server import free_port

SECONDS = 600
SPACING = 5


class Server(NamedTuple):
    url: str
    began: int  # time of the first sample


def watts(step):
    """Outlet 3 of the stand-in for a power distribution unit, at each scrape."""
    return 4.0 if step % 24 < 12 else 9.5


def open_metrics(began):
    lines = ["# TYPE pdu_outlet_watts gauge"]
    for outlet, factor in (("3", 1), ("4", 10)):
        for step in range(SECONDS // SPACING + 1):
            value = factor * watts(step)
            lines.append(f'pdu_outlet_watts{{outlet="{outlet}",room="lab"}} {value} {began + step * SPACING}')
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prometheus with ten minutes of samples, the last of them about now."""
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        reason = "there is no Prometheus on this machine (Debian, Ubuntu: prometheus)"
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    folder, began = tmp_path_factory.mktemp("prometheus"), int(time.time()) - SECONDS
    (folder / "samples").write_text(open_metrics(began))
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1m}\n")
    backfill = ["promtool", "tsdb", "create-blocks-from", "openmetrics", folder / "samples", folder / "data"]
    subprocess.run(backfill, check=True, capture_output=True)
    port = free_port()
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: process.poll() is not None or ready(url))
            assert process.poll() is None
            yield Server(url, began)
        finally:
            process.kill()


def ready(url):
    try:
        with urlopen(f"{url}/-/ready", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def opened(server, query='pdu_outlet_watts{outlet="3"}', **settings):
    meter = make("prometheus", {"url": server.url, "query": query, **settings})
    meter.open()
    return meter


def test_a_metrics_own_samples_with_their_own_times(server):
    meter = opened(server)
    since = server.began + 61
    found = meter.history(since, since + 118)
    steps = range(12, 37)  # 60 … 180: one before, one after
    assert [(each.unix_seconds, each.watts) for each in found] == [
        (server.began + SPACING * step, (watts(step),)) for step in steps
    ]
    assert meter.rails == meter.total_rails == ("pdu_outlet_watts",)
    assert meter.accuracy[0].timing_seconds == 1.0


def test_a_window_at_the_edge_of_what_is_known(server):
    found = opened(server).history(server.began - 10, server.began + 3)
    assert [each.unix_seconds for each in found] == [server.began, server.began + SPACING]


def test_now_is_the_last_sample_with_its_own_time(server):
    reading = opened(server).read()
    assert reading.unix_seconds == server.began + SECONDS
    assert reading.watts == (watts(SECONDS // SPACING),)


def test_an_expression_is_evaluated_step_by_step(server):
    meter = opened(server, "sum(pdu_outlet_watts) / 11", step_seconds=2.5)
    since = server.began + 100.0
    found = meter.history(since, since + 10)
    assert [each.unix_seconds for each in found] == pytest.approx([since + 2.5 * step for step in range(5)], abs=0.002)
    assert [each.watts[0] for each in found] == pytest.approx(
        [watts((100 + 2.5 * step) // SPACING) for step in range(5)]
    )
    assert meter.rails == ("query",)
    assert meter.accuracy[0].timing_seconds == 60.0
    assert meter.period_seconds == 2.5
    assert meter.read().watts == pytest.approx((watts(SECONDS // SPACING),))


def test_a_long_range_is_asked_in_pieces(server, monkeypatch):
    monkeypatch.setattr("testbed.meters.prometheus._MOST_STEPS", 7)
    found = opened(server, "pdu_outlet_watts{outlet='3'} + 0").history(server.began + 100, server.began + 140)
    assert [each.unix_seconds for each in found] == [server.began + 100 + step for step in range(41)]


def test_several_series_are_refused_with_what_differs(server):
    with pytest.raises(MeterError, match=r"gives 2 series, and a meter is one: .*; say which by outlet \('3', '4'\)"):
        opened(server, "pdu_outlet_watts")


def test_no_series(server):
    with pytest.raises(MeterError, match=r"gives no series at that time: pdu_outlet_watts\{outlet='9'\}"):
        opened(server, "pdu_outlet_watts{outlet='9'}")
    with pytest.raises(MeterError, match="gives no series at that time"):
        opened(server).history(1000.0, 1010.0)


def test_a_query_that_is_none(server):
    with pytest.raises(MeterError, match=r"bad_data: .*parse error.*query: pdu_outlet_watts\{"):
        opened(server, "pdu_outlet_watts{")


def test_a_scalar_is_a_reading_too(server):
    assert opened(server, "scalar(pdu_outlet_watts{outlet='3'})").read().watts == (watts(SECONDS // SPACING),)


# ── without the real one ─────────────────────────────────────────────────────────────────────────────────────────────
class Elsewhere(StandIn):
    told: object = {"hello": "world"}

    def answer(self, path, query):
        return 200, self.told


def test_something_else_answers():
    with Elsewhere() as server, pytest.raises(MeterError, match="no Prometheus"):
        make("prometheus", {"url": f"http://{server.host}", "query": "up"}).open()


def test_what_is_no_number_is_left_out():
    with Elsewhere() as server:
        values = [[10.0, "4.5"], [11.0, "NaN"], [12.0, "+Inf"], [13.0, "5"]]
        series = {"metric": {"__name__": "w"}, "value": values[0], "values": values}
        server.told = {"status": "success", "data": {"resultType": "matrix", "result": [series]}}
        meter = make("prometheus", {"url": f"http://{server.host}", "query": "w"})
        meter.open()
        assert [each.watts for each in meter.history(10.0, 13.0)] == [(4.5,), (5.0,)]


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match="step_seconds: expected more than 0, got 0"):
        make("prometheus", {"url": "http://x", "query": "up", "step_seconds": 0})
