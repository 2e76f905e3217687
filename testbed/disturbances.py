"""Disturbances that a run declares: what devices really undergo, who, and in which rounds.  Standard library only.

    disturbances:
      dropout: {probability: 0.3}
      straggler: {slowdown: 3, devices: [raspberry-pi-4]}
      slow_link: {rate: "1 Mbit/s", delay: "50 ms", share: 0.5}
      background_load: {processes: 1, memory: "64 MiB"}
      thermal_limit: {after: "20 s", slowdown: 2}

Every kind takes whom it is for (`devices`: names, tags or profiles; `share`: of their clients, drawn once) and when
(`probability`: in each round, for each client).  A kind whose only word is its first parameter may be written short
(`dropout: 0.3`); a list of mappings says different things to different clients: the first that is for a client holds.

    declared = parse({"straggler": 3})              # raises UsageError that names the key
    declared.to_json()                       # the same, one spelling for all: what a configuration keeps
    weather = declared.settle(seed, places)  # who undergoes what; raises UsageError for words that fit nobody
    weather.for_job(round, client)           # what one job undergoes, in base units: goes into `Job.disturbances`

All draws come from the run's seed, the kind, the round and the client, and from nothing else: every method meets the
same weather, and so does a run that is resumed.  Whom a small probability or share disturbs, a larger one does too.
What a node does with it: `testbed.node.disturbed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from testbed.disturbance_words import Parameter, count, factor, rate, ratio, seconds, size
from testbed.errors import UsageError
from testbed.inventory import Device, Inventory
from testbed.spelling import did_you_mean

DROPOUT, STRAGGLER, SLOW_LINK = "dropout", "straggler", "slow_link"
BACKGROUND_LOAD, THERMAL_LIMIT = "background_load", "thermal_limit"

_SLOWDOWN = Parameter("slowdown", factor)
#: Kind → its parameters, the first of which the short form gives.
KINDS: Mapping[str, tuple[Parameter, ...]] = {
    DROPOUT: (Parameter("probability", ratio),),
    STRAGGLER: (_SLOWDOWN,),
    SLOW_LINK: (Parameter("bytes_per_second", rate, "rate"), Parameter("delay_seconds", seconds(10.0), "delay", 0.0)),
    BACKGROUND_LOAD: (Parameter("processes", count), Parameter("memory_bytes", size, "memory", 0)),
    THERMAL_LIMIT: (Parameter("after_seconds", seconds(None), "after"), Parameter("slowdown", factor, default=2.0)),
}
#: What every kind takes beside its own.
_WHOM = (Parameter("probability", ratio, default=1.0), Parameter("share", ratio, default=1.0))
_DEVICES = "devices"
#: Kinds that hold the trainer's processor back.
_SLOWING = frozenset({STRAGGLER, THERMAL_LIMIT})


@dataclass(frozen=True)
class Rule:
    """One disturbance: what it does (`values`, in base units), to whom, and how often."""

    kind: str
    values: Mapping[str, float]
    devices: tuple[str, ...] = ()  # names, tags or profiles; (): all
    share: float = 1.0  # of the clients of these devices
    probability: float = 1.0  # in each round, for each client

    def to_json(self) -> dict[str, Any]:
        """As it can be parsed again; what is as it would be anyway is left out."""
        stated = {**self.values, "share": self.share, "probability": self.probability}
        told = {each.word: each.text(stated[each.name]) for each in _parameters(self.kind) if each.stated(stated)}
        return told | ({_DEVICES: list(self.devices)} if self.devices else {})

    @property
    def text(self) -> str:
        """For people: `straggler, slowdown 3`."""
        return ", ".join([self.kind, *(f"{word} {said}" for word, said in self.to_json().items() if word != _DEVICES)])


@dataclass(frozen=True)
class Disturbances:
    """What a run declares; nothing, where there are no rules."""

    rules: tuple[Rule, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Kind → its rule, or a list of them: what `parse` takes."""
        known = {kind: [rule.to_json() for rule in self.rules if rule.kind == kind] for kind in KINDS}
        return {kind: rules[0] if len(rules) == 1 else rules for kind, rules in known.items() if rules}

    def settle(self, seed: int, places: Sequence[tuple[int, Device]]) -> Weather:
        """Who undergoes what: `places` are all clients of the inventory, also those that a plan refuses.

        Raises UsageError for a word that fits no device.
        """
        chosen: dict[str, dict[int, Rule]] = {}
        for number, rule in enumerate(self.rules):
            for client in _chosen(rule, number, seed, places):
                chosen.setdefault(rule.kind, {}).setdefault(client, rule)
        return Weather(seed, chosen, {client: device.name for client, device in places})


@dataclass(frozen=True)
class Weather:
    """What the clients of a run undergo, round by round: the same for every method."""

    seed: int = 0
    rules: Mapping[str, Mapping[int, Rule]] = field(default_factory=dict)  # kind → client → its rule
    device_of: Mapping[int, str] = field(default_factory=dict)  # client → the device that it is placed on

    def for_job(self, index: int, client: int) -> dict[str, dict[str, float]]:
        """Kind → its values in base units: what the job of a client undergoes in a round (counted from 0)."""
        found = {}
        for kind, rules in self.rules.items():
            rule = rules.get(client)
            drawn = Random(f"{self.seed}/disturbance/{kind}/{index}/{client}")
            if rule is not None and drawn.random() < rule.probability:
                found[kind] = {"at": drawn.random()} if kind == DROPOUT else dict(rule.values)
        return found

    @property
    def slowed(self) -> frozenset[str]:
        """Devices whose processor may be held back: their agents prepare for it."""
        return frozenset(self.device_of[client] for kind in _SLOWING for client in self.rules.get(kind, {}))

    def check(self, devices: Sequence[Device], *, capped: bool) -> None:
        """Raises UsageError where a device cannot undergo what it should, before anything has begun."""
        known = {device.name: device for device in devices}
        for kind, rules in self.rules.items():
            for client, rule in rules.items():
                if (problem := _problem(rule, known[self.device_of[client]], capped=capped)) is not None:
                    raise UsageError(f"{kind} on device {self.device_of[client]}: {problem}")

    def to_json(self, rounds: int) -> list[dict[str, Any]]:
        """Every rule with the clients that it holds for, and the rounds (from 0) in which it does."""
        return [
            {"kind": rule.kind, **rule.to_json(), "clients": {str(c): self._rounds(rule, c, rounds) for c in clients}}
            for rule, clients in self._by_rule()
        ]

    def lines(self, rounds: int) -> list[str]:
        """For people: one line for every rule, with whom it holds for and in which rounds (from 1)."""
        told = []
        for rule, clients in self._by_rule():
            alike: dict[tuple[str, str], list[str]] = {}  # on one device, in the same rounds
            for client in clients:
                if found := self._rounds(rule, client, rounds):
                    alike.setdefault((self.device_of[client], _when(found, rounds)), []).append(f"client-{client}")
            where = [f"{', '.join(names)} on {device} in {when}" for (device, when), names in alike.items()]
            told.append(f"disturbed by {rule.text}: {'; '.join(where) or 'nobody, as it was drawn'}")
        return told

    def _by_rule(self) -> list[tuple[Rule, list[int]]]:
        found: dict[int, tuple[Rule, list[int]]] = {}
        for rules in self.rules.values():
            for client, rule in sorted(rules.items()):
                found.setdefault(id(rule), (rule, []))[1].append(client)
        return list(found.values())

    def _rounds(self, rule: Rule, client: int, rounds: int) -> list[int]:
        return [index for index in range(rounds) if rule.kind in self.for_job(index, client)]


def _when(found: Sequence[int], rounds: int) -> str:
    """`every round`, `round 3`, `rounds 1, 4`."""
    if len(found) == rounds:
        return "every round"
    return f"round{'s' if len(found) > 1 else ''} {', '.join(str(index + 1) for index in found)}"


def parse(declared: Mapping[str, Any] | None, where: str = "disturbances") -> Disturbances:
    """From the mapping of an experiment's file or of a run's configuration.

    `where` begins every message.  Raises UsageError: which key, what was expected, what stood there.
    """
    if declared is not None and not isinstance(declared, Mapping):
        raise UsageError(f"{where}: expected a mapping such as {{dropout: 0.3}}, got {declared!r}")
    rules = []
    for name, stated in (declared or {}).items():
        kind = str(name).replace("-", "_")
        if kind not in KINDS:
            raise UsageError(f"{where}.{name}: there is no such disturbance; {did_you_mean(str(name), KINDS)}")
        several = stated if isinstance(stated, list | tuple) and stated else [stated]
        rules += [_rule(kind, each, f"{where}.{name}") for each in several]
    return Disturbances(tuple(rules))


def parse_options(texts: Sequence[str]) -> Disturbances:
    """From `--disturb KIND=VALUE[,NAME=VALUE…][@DEVICE[,DEVICE…]]`, as often as given; raises UsageError."""
    found = [(text, *_option(text)) for text in texts]
    return Disturbances(tuple(_rule(kind, words, f"--disturb {text}: {kind}") for text, kind, words in found))


def _option(text: str) -> tuple[str, dict[str, Any]]:
    """`straggler=3@pi-4` → straggler, {slowdown: 3, devices: [pi-4]}."""
    what, at, whom = text.rpartition("@") if "@" in text else (text, "", "")
    name, equals, rest = what.partition("=")
    kind = name.strip().replace("-", "_")
    if not equals or not rest.strip() or (at and not whom.strip(" ,")):
        raise UsageError(
            f"--disturb {text}: expected KIND=VALUE[,NAME=VALUE…][@DEVICE…], such as dropout=0.3, straggler=3@pi-4 or "
            f'"slow_link=1 Mbit/s,delay=50 ms"; kinds are {", ".join(KINDS)}'
        )
    if kind not in KINDS:
        raise UsageError(f"--disturb {text}: there is no disturbance {name.strip()!r}; {did_you_mean(kind, KINDS)}")
    words: dict[str, Any] = {}
    for number, part in enumerate(rest.split(",")):
        word, sign, value = part.partition("=")
        if number and not sign:
            raise UsageError(f"--disturb {text}: expected NAME=VALUE after the comma, got {part.strip()!r}")
        words[word.strip() if sign else KINDS[kind][0].word] = (value if sign else word).strip()
    return kind, words | ({_DEVICES: [word.strip() for word in whom.split(",") if word.strip()]} if at else {})


def _rule(kind: str, stated: Any, where: str) -> Rule:
    first = KINDS[kind][0]
    words = dict(stated) if isinstance(stated, Mapping) else {first.word: stated}
    if stated is None or first.word not in words:
        example = f"{{{first.word}: {first.read.example}}}"
        raise UsageError(f"{where}: {first.word} is missing; expected a mapping such as {example}")
    known = {each.word: each for each in _parameters(kind)}
    for word in words:
        if word not in known and word != _DEVICES:
            raise UsageError(f"{where}.{word}: {did_you_mean(str(word), (*known, _DEVICES))}")
    values = {each.name: each.value(words, f"{where}.{each.word}") for each in known.values()}
    share, probability = values.pop("share"), values.pop("probability")
    return Rule(kind, values, _devices(words, where), share, probability)


def _parameters(kind: str) -> tuple[Parameter, ...]:
    own = KINDS[kind]
    return (*own, *(each for each in _WHOM if each.name not in {parameter.name for parameter in own}))


def _devices(words: Mapping[str, Any], where: str) -> tuple[str, ...]:
    stated = words.get(_DEVICES)
    listed = [stated] if isinstance(stated, str) else stated
    if listed is None and _DEVICES not in words:
        return ()
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(word, str) for word in listed):
        raise UsageError(f"{where}.{_DEVICES}: expected a list of names, tags or profiles of devices, got {stated!r}")
    return tuple(listed)


def _chosen(rule: Rule, number: int, seed: int, places: Sequence[tuple[int, Device]]) -> list[int]:
    """The clients of a rule: of those on its devices, so many as its share says, at least one."""
    devices = tuple({device.name: device for _, device in places}.values())
    fitting = {device.name for device in Inventory(devices, f"{rule.kind}.{_DEVICES}").select(rule.devices)}
    able = sorted(client for client, device in places if device.name in fitting)
    order = Random(f"{seed}/disturbance/{rule.kind}/share/{number}").sample(able, len(able))
    return sorted(order[: max(1, round(rule.share * len(able)))])


def _problem(rule: Rule, device: Device, *, capped: bool) -> str | None:
    """Why this device cannot undergo that, with the way out."""
    if rule.kind in _SLOWING and device.accelerator != "cpu":
        return (
            f"it trains on an accelerator ({device.accelerator}), and only a processor can be held back; name other "
            "devices for it"
        )
    memory = int(rule.values.get("memory_bytes", 0))
    if memory and not capped:
        return "its memory is held inside the device's budget, and a run with --no-cap has none; leave one of them out"
    if memory >= device.budget.memory_bytes:
        budget = Parameter("memory_bytes", size).text(device.budget.memory_bytes)
        return f"memory {Parameter('memory_bytes', size).text(memory)} leaves nothing of its budget of {budget}"
    return None


#: Of a run that nothing disturbs.
CALM = Weather()
