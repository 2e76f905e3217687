"""What meters say, as series: watts now, and joules that only ever grow.

An agent's totals begin at 0 with the agent.  Here the next agent's go on where the last one's ended: a scrape that
missed the moment between them sees no reset, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.exporter.figures import Figures

_WATTS, _JOULES, _INFO = "testbed_device_power_watts", "testbed_device_energy_joules_total", "testbed_meter_info"


class Totals:
    """The meters of all devices of a run."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._ended: dict[tuple[str, str, str], float] = {}  # joules of agents that are gone
        self._last: dict[tuple[str, str, str], float] = {}  # what the agent of now said

    def tell(self, device: str, meters: Iterable[Mapping[str, Any]]) -> None:
        """What the meters of a device say now; one that says nothing any more has no series until it does again."""
        for family in (_WATTS, _JOULES, _INFO):
            self._figures.forget(family, device=device)
        for told in meters:
            self._tell(device, told["meter"], told)

    def _tell(self, device: str, meter: str, told: Mapping[str, Any]) -> None:
        replayed = str(bool(told.get("replayed"))).lower()
        self._figures.set(_INFO, 1, device=device, meter=meter, point=told.get("point"), replayed=replayed)
        for rail, watts in (told.get("watts") or {}).items():
            self._figures.set(_WATTS, watts, device=device, meter=meter, rail=rail)
        for rail, joules in (told.get("joules") or {}).items():
            if joules is not None:
                total = self._total((device, meter, rail), joules)
                self._figures.set(_JOULES, total, device=device, meter=meter, rail=rail)

    def _total(self, series: tuple[str, str, str], joules: float) -> float:
        last = self._last.get(series, 0.0)
        if joules < last:
            self._ended[series] = self._ended.get(series, 0.0) + last
        self._last[series] = joules
        return self._ended.get(series, 0.0) + joules
