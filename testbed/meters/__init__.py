"""Power meters, one file each: what reads the watts of a device, on the device itself or from the controller.

A file of this package whose name has no leading underscore defines exactly one `Meter`, and the file's name is the
meter's in the inventory.  A meter is used so, by an agent or by the controller:

    meter = make("ina3221", {})
    meter.open()                 # raises MeterError: what cannot be read, and the way out
    meter.rails, meter.accuracy, meter.point
    reading = meter.read()       # watts in the order of the rails
    meter.close()

Standard library only, and little of it (no dataclasses, logging, asyncio): an agent holds the meters of its board.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from testbed.errors import ConfigError, MeterError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "BOARD",
    "CONTROLLER",
    "POINTS",
    "Accuracy",
    "Meter",
    "MeterError",
    "Reading",
    "check",
    "make",
    "meter_class",
    "names",
]

#: Who reads a meter: the agent on the device, or the controller.
BOARD, CONTROLLER = "board", "controller"
#: Where power is measured, from the wall inwards.
POINTS = ("wall_ac", "dc_input", "module_rail", "soc_pmic", "processor")


class Accuracy(NamedTuple):
    """How well a rail is known, as half-widths at 95 % (a datasheet's maximum is taken for that).

    gain             of the reading, a ratio: meter class, shunt tolerance; after calibration its residual
    offset_watts     added to every reading
    step_watts       the distance of two neighbouring readings; 0 where it is too fine to matter
    timing_seconds   by how much a reading may be older than its stamp: averaging in the sensor, a refresh period
    """

    gain: float
    offset_watts: float = 0.0
    step_watts: float = 0.0
    timing_seconds: float = 0.0


class Reading(NamedTuple):
    """What a meter said once, in the order of its rails.

    watts         power of each rail
    joules        energy counters of the rails that never go back, where the meter has them
    unix_seconds  when it was true, by the meter's own clock; None: now, and whoever reads puts the stamp
    """

    watts: tuple[float, ...]
    joules: tuple[float, ...] | None = None
    unix_seconds: float | None = None


class Meter:
    """Base of all meters.  A constructor takes settings by keyword and touches nothing; `open` finds and tries.

    where             BOARD: read by the agent; CONTROLLER: over the network, or from a file, by the controller
    period_seconds    how often it is worth reading
    retrospective     True: it cannot be read live; `history` gives what it recorded
    can_switch        True: it is also a switch, with `switch(on=…)`
    point             where it measures, one of POINTS; the inventory may say otherwise
    rails             after `open`: the names of what it measures, the board's own
    total_rails       after `open`: the rails whose sum is the whole at `point`, where the meter itself knows; () else
    has_counters      after `open`: whether every reading brings energy counters
    accuracy          after `open`: of each rail
    """

    where: ClassVar[str] = BOARD
    period_seconds: float = 0.1
    retrospective: ClassVar[bool] = False
    can_switch: ClassVar[bool] = False
    replayed: ClassVar[bool] = False
    point: str = "module_rail"
    rails: tuple[str, ...] = ()
    total_rails: tuple[str, ...] = ()
    has_counters: bool = False
    accuracy: tuple[Accuracy, ...] = ()

    def open(self) -> None:
        """Find what is to be read and read it once; raises MeterError with the reason and the way out."""
        raise NotImplementedError

    def read(self) -> Reading:
        """The power now; raises MeterError when this reading failed (the next may not)."""
        raise NotImplementedError

    def history(self, since: float, until: float) -> Sequence[Reading]:
        """What a retrospective meter recorded between two times (seconds since 1970, by its own clock), in order.

        One reading before and one after are part of it where there are any.  Raises MeterError.
        """
        raise NotImplementedError

    def switch(self, *, on: bool) -> None:
        """Switch the device on or off; raises MeterError."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and connections; a meter that is closed may be opened again."""


def names() -> list[str]:
    """Every meter there is."""
    import pkgutil

    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def meter_class(name: str) -> type[Meter]:
    """The meter of that name; raises UsageError with the nearest right name."""
    full = f"{__name__}.{name}"
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        raise UsageError(f'there is no meter "{name}"; {_did_you_mean(name, names())}') from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Meter) and value.__module__ == full
    ]
    if len(found) != 1:
        raise ConfigError(f"{module.__file__}: expected exactly one Meter, got {len(found)}")
    return found[0]


def make(name: str, settings: Mapping[str, Any]) -> Meter:
    """A meter with its settings; raises UsageError for a setting that it lacks, or that cannot be so."""
    kind = meter_class(name)
    try:
        return kind(**settings)
    except TypeError as error:
        check(name, settings)
        raise UsageError(f"meter {name}: {error}") from None
    except ValueError as error:
        raise UsageError(f"meter {name}: {error}") from None


def check(name: str, settings: Mapping[str, Any]) -> None:
    """Raises UsageError for a setting that the meter has not, that it needs, or that is of another type."""
    import inspect

    parameters = inspect.signature(meter_class(name), eval_str=True).parameters
    for key, value in settings.items():
        if key not in parameters:
            raise UsageError(f'meter {name} has no setting "{key}"; {_did_you_mean(key, list(parameters))}')
        if not _fits(value, parameters[key].annotation):
            expected = " or ".join(_WORDS.get(kind, str(kind)) for kind in _kinds(parameters[key].annotation))
            raise UsageError(f"meter {name}: {key}: expected {expected}, got {value!r}")
    lacking = [key for key, each in parameters.items() if each.default is each.empty and key not in settings]
    if lacking:
        line = ", ".join(f"{key}: …" for key in lacking)
        raise UsageError(f"meter {name} needs {' and '.join(lacking)}; write: meter: {{{name}: {{{line}}}}}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    kinds = _kinds(annotation)
    if not all(kind in _WORDS for kind in kinds):
        return True  # of a kind that the meter itself looks at
    if float in kinds and type(value) is int:
        return True
    return type(value) in kinds


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """Imported where it is needed: an agent, which is told the right names, must stay small."""
    from testbed.spelling import did_you_mean

    return did_you_mean(wrong, known)
