"""Whatever a Prometheus knows in watts: an exporter of a power distribution unit, a lab's own sensors.

    meter:
      prometheus: {url: "http://prometheus.lan:9090", query: 'pdu_outlet_watts{outlet="3"}', gain: 0.01, point: wall_ac}

Where it measures Prometheus does not tell: without `point` it is taken for `wall_ac`.  `gain` and `offset_watts` are
the accuracy of what is behind it; without them 5 %, an assumption.

Give the plain name of a metric with its labels where there is one: its samples are then read with their own times
(a range vector; https://prometheus.io/docs/prometheus/latest/querying/api/).  An expression (`sum(…)`, `a * b`) is
evaluated every `step_seconds`, from samples that may be as old as the interval of the scrapes: say that in
`timing_seconds` (default: 60, Prometheus' own default of that interval).

An energy from it is as good as its scrapes are dense: at 5 s, what happens between two of them is unseen.

Tried on: Prometheus 2.42.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from testbed.errors import MeterError
from testbed.meters import CONTROLLER, Accuracy, Meter, Reading
from testbed.meters._http import Appliance

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Prometheus answers no range of more than 11,000 points.
_MOST_STEPS = 10_000
#: How far back it looks for the last sample (its flag query.lookback-delta).
_LOOKBACK_SECONDS = 300.0
_OF_AN_EXPRESSION, _OF_A_SAMPLE = 60.0, 1.0


class PrometheusMeter(Meter):
    """One series.  `user` and `password_env` are for a server that asks for a login."""

    where = CONTROLLER
    period_seconds = 1.0
    retrospective = True
    point = "wall_ac"

    def __init__(
        self,
        url: str,
        query: str,
        step_seconds: float = 1.0,
        gain: float = 0.05,
        offset_watts: float = 0.0,
        timing_seconds: float | None = None,
        *,
        user: str = "",
        password_env: str | None = None,
    ) -> None:
        if step_seconds <= 0:
            raise ValueError(f"step_seconds: expected more than 0, got {step_seconds}")
        self._server = Appliance("prometheus", url, user, password_env)
        self._query, self._step = query, step_seconds
        self._gain, self._offset, self._timing = gain, offset_watts, timing_seconds
        self._plain = False

    def open(self) -> None:
        """Ask the query once; raises MeterError when it is wrong, gives nothing, or more than one series."""
        series = self._series("query", {"query": self._query})
        self._plain = self._is_plain()
        self.period_seconds = self._step
        self.rails = self.total_rails = (str(series.get("metric", {}).get("__name__") or "query"),)
        known = self._timing if self._timing is not None else (_OF_A_SAMPLE if self._plain else _OF_AN_EXPRESSION)
        self.accuracy = (Accuracy(self._gain, self._offset, 0.0, known),)

    def read(self) -> Reading:
        """The last sample, with its own time where the query is a plain metric."""
        if self._plain:
            query = f"{self._query}[{_LOOKBACK_SECONDS:g}s]"
            return list(_readings(self._series("query", {"query": query})["values"]))[-1]
        [reading] = _readings([self._series("query", {"query": self._query})["value"]])
        return reading

    def history(self, since: float, until: float) -> Sequence[Reading]:
        found = self._samples(since, until) if self._plain else self._evaluated(since, until)
        first = max((index for index, each in enumerate(found) if _at(each) <= since), default=0)
        last = min((index for index, each in enumerate(found) if _at(each) >= until), default=len(found))
        return found[first : last + 1]

    def _samples(self, since: float, until: float) -> list[Reading]:
        begin, end = since - _LOOKBACK_SECONDS, until + _LOOKBACK_SECONDS
        query = f"{self._query}[{math.ceil(end - begin)}s]"
        return list(_readings(self._series("query", {"query": query, "time": f"{end:.3f}"})["values"]))

    def _evaluated(self, since: float, until: float) -> list[Reading]:
        found: list[Reading] = []
        begin, end = since - self._step, until + self._step
        while begin <= end:
            last = min(end, begin + _MOST_STEPS * self._step)
            asked = {"query": self._query, "start": f"{begin:.3f}", "end": f"{last:.3f}", "step": f"{self._step:g}"}
            found += _readings(self._series("query_range", asked)["values"])
            begin = last + self._step
        return found

    def _is_plain(self) -> bool:
        """Only the name of a metric with labels may be followed by a range."""
        told = self._told("query", {"query": f"{self._query}[1s]"})
        return bool(told.get("status") == "success")

    def _series(self, kind: str, asked: dict[str, str]) -> dict[str, Any]:
        told = self._told(kind, asked)
        if told.get("status") != "success":
            raise MeterError(f"prometheus: {told.get('errorType')}: {told.get('error')} (query: {self._query})")
        data = told["data"]
        found = data.get("result")
        if data.get("resultType") == "scalar":
            return {"value": found}
        if not found:
            raise MeterError(f"prometheus: the query gives no series at that time: {self._query}")
        if len(found) > 1:
            differing = _differing([series.get("metric", {}) for series in found])
            raise MeterError(
                f"prometheus: the query gives {len(found)} series, and a meter is one: {self._query}; say which by "
                f"{differing}"
            )
        series: dict[str, Any] = found[0]
        return series

    def _told(self, kind: str, asked: dict[str, str]) -> dict[str, Any]:
        told = self._server.ask(f"/api/v1/{kind}", asked, told=(400, 422, 503))
        if not isinstance(told, dict) or "status" not in told:
            raise MeterError(f"prometheus: what answers there is no Prometheus: {str(told)[:80]}")
        return told


def _at(reading: Reading) -> float:
    return reading.unix_seconds or 0.0


def _readings(values: Sequence[Sequence[Any]]) -> Iterator[Reading]:
    """Of [time, text] pairs, those that are numbers; raises MeterError where none is."""
    found = [Reading((float(text),), None, float(at)) for at, text in values if math.isfinite(float(text))]
    if not found:
        raise MeterError("prometheus: the series has no number at that time")
    return iter(found)


def _differing(labels: list[dict[str, str]]) -> str:
    """`outlet ("1", "2")`: the labels whose values are not the same in all series."""
    names = sorted({name for each in labels for name in each})
    values = {name: sorted({each.get(name, "") for each in labels}) for name in names}
    told = [f"{name} ({', '.join(map(repr, known[:4]))})" for name, known in values.items() if len(known) > 1]
    return ", ".join(told) or "a label"
