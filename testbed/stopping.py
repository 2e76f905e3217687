"""When a run ends before its last round: a target is reached, or a budget has run out.

The round in which a budget ran out does not count: what a run has reached under a budget is the quality of its last
evaluated round within.  Costs are those of `testbed.costs`: evaluation is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from testbed.costs import Costs, RoundCost
from testbed.errors import PlanError
from testbed.quantities import bytes_text, number_text, seconds_text
from testbed.run import ACCURACY, BUDGETS, BYTES, JOULES, SECONDS

if TYPE_CHECKING:
    from testbed.inventory import Inventory
    from testbed.run import Plan, RunConfig
    from testbed.store import RunFolder

#: What ended a run that none of its ends was met in.
ROUNDS = "rounds"
#: In the facts of a run's status: a Stop as plain data.
FACT = "stopped"


@dataclass(frozen=True)
class Stop:
    """Why a run that was given ends has ended.

    by        the end that was met, or "rounds" when all rounds were done before any
    round     the last one, counted from 0
    limit     of that end, in its base unit; None by rounds
    reached   what it had come to after that round
    counted   the last evaluated round within all budgets, from 0; None: there was none
    accuracy  of that round
    """

    by: str
    round: int
    limit: float | None
    reached: float | None
    counted: int | None
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stop_after(until: Mapping[str, float], costs: Sequence[RoundCost]) -> Stop | None:
    """The end that was met in the last of these rounds; None: in none of them yet.

    A budget goes before a target: a round beyond the budget reaches nothing.  Raises PlanError where joules are asked
    for and not known.
    """
    if not until or not costs:
        return None
    last = costs[-1]
    for name in BUDGETS:
        if name in until and _known(last, name) >= until[name]:
            return _stop(until, costs, name)
    reached = last.accuracy is not None and last.accuracy >= until.get(ACCURACY, float("inf"))
    return _stop(until, costs, ACCURACY) if reached else None


def rounds_done(until: Mapping[str, float], costs: Sequence[RoundCost]) -> Stop | None:
    """What is noted when all rounds are done and no end was met; None where there was none to meet."""
    return _stop(until, costs, ROUNDS) if until and costs else None


def within_budget(until: Mapping[str, float], costs: Sequence[RoundCost]) -> RoundCost | None:
    """The last evaluated round that no budget ran out before; None where there is none."""
    inside = [cost for cost in costs if cost.accuracy is not None and within(until, cost)]
    return inside[-1] if inside else None


def first_reaching(
    accuracy: float, costs: Sequence[RoundCost], until: Mapping[str, float] | None = None
) -> RoundCost | None:
    """The first round after which the accuracy was at least this; None: it never was, or only beyond a budget."""
    found = next((cost for cost in costs if cost.accuracy is not None and cost.accuracy >= accuracy), None)
    return found if found is not None and within(until or {}, found) else None


def stop_text(stop: Mapping[str, Any]) -> str:
    """Why a run ended, in a line for people; `stop` is a Stop as plain data."""
    after = f"ended after round {stop['round'] + 1}: "
    counted = "no evaluated round lies within"
    if stop["counted"] is not None:
        counted = f"what counts is round {stop['counted'] + 1}, with accuracy {number_text(stop['accuracy'])}"
    if stop["by"] == ROUNDS:
        return f"{after}all rounds are done, and no end was met; {counted}"
    told = amount_text(stop["by"], stop["reached"])
    if stop["by"] == ACCURACY:
        return f"{after}accuracy {told} has reached the target of {amount_text(ACCURACY, stop['limit'])}"
    return f"{after}{told} of {amount_text(stop['by'], stop['limit'])} are spent; {counted}"


def amount_text(name: str, value: float | None) -> str:
    """An amount of what a run may be ended by: 2 min 00 s, 300 J, 48 MiB, 0.600."""
    if name == SECONDS:
        return seconds_text(value)
    if name == BYTES:
        return bytes_text(value)
    return number_text(value, 1) + " J" if name == JOULES else number_text(value)


def check_until(config: RunConfig, inventory: Inventory, plan: Plan) -> None:
    """Raise PlanError where a budget of joules is asked for and a device that takes part has no meter."""
    if JOULES not in config.until:
        return
    taking_part = {client.device for client in plan.taking_part}
    without = [device.name for device in inventory if device.name in taking_part and not device.meters]
    if without:
        raise PlanError(
            f"a budget of {amount_text(JOULES, config.until[JOULES])} needs a meter on every device that takes part, "
            f"and there is none on {', '.join(without)}; give them one in the inventory (docs/meters.md), leave them "
            f"out, or set a budget of seconds or bytes"
        )


class Stopping:
    """The ends of one run, as its rounds go by.  Reads nothing where there are none."""

    def __init__(self, until: Mapping[str, float], folder: RunFolder) -> None:
        self._until, self._folder = until, folder
        self._tally = Costs(folder)
        self._costs: list[RoundCost] = []

    def ended(self, rounds: int, *, last: bool) -> bool:
        """Whether the run is over after so many rounds; why, is then among the facts of its status."""
        if self._until:
            for record in self._folder.rounds()[len(self._costs) : rounds]:
                self._costs.append(self._tally.add(record, self._folder.results(record.round)))
        stop = stop_after(self._until, self._costs)
        if stop is None and last:
            stop = rounds_done(self._until, self._costs)
        if stop is not None:
            self._folder.note(**{FACT: stop.to_json()})
        return last or stop is not None


def spent(cost: RoundCost, name: str) -> float | None:
    """What a run has used up of a budget by the end of a round; None: not known."""
    return {SECONDS: cost.seconds, JOULES: cost.joules, BYTES: float(cost.bytes)}[name]


def _known(cost: RoundCost, name: str) -> float:
    amount = spent(cost, name)
    if amount is None:
        raise PlanError(
            f"the energy of round {cost.round + 1} is not known, and so a budget of joules cannot be kept: a device "
            f"brought no power samples (`testbed report` shows which); mend its meter, or set a budget of seconds"
        )
    return amount


def within(until: Mapping[str, float], cost: RoundCost) -> bool:
    """Whether no budget had been exceeded by the end of that round; a cost that is not known is within none."""
    amounts = [(spent(cost, name), until[name]) for name in BUDGETS if name in until]
    return all(amount is not None and amount <= limit for amount, limit in amounts)


def _stop(until: Mapping[str, float], costs: Sequence[RoundCost], by: str) -> Stop:
    last, counts = costs[-1], within_budget(until, costs)
    reached = {ROUNDS: None, ACCURACY: last.accuracy}[by] if by in {ROUNDS, ACCURACY} else _known(last, by)
    return Stop(
        by=by,
        round=last.round,
        limit=until.get(by),
        reached=reached,
        counted=counts.round if counts else None,
        accuracy=counts.accuracy if counts else None,
    )
