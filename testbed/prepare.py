"""From settings to a run that can start: inventory, model, data, shards, baselines and the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.baselines import BAG_OF_WORDS, MAJORITY_CLASS, UNIGRAM, baselines
from testbed.cache import cache_folder
from testbed.data import DataSet, Split, load_data, load_images, split
from testbed.data_sources import DIGITS, DOCSTRINGS
from testbed.disturbances import CALM, Weather, parse
from testbed.environment import describe_environment
from testbed.errors import ModelError, PlanError
from testbed.fact_sheets import FactSheet, facts_of, outdated
from testbed.inventory import Device, Inventory
from testbed.method import CAUSAL_LM, IMAGE_CLASSIFICATION, SEQUENCE_CLASSIFICATION, Method, Workload
from testbed.model import blocks
from testbed.model.checkpoint import BaseModel, ContentStore, read_config
from testbed.model.footprint import Baseline
from testbed.node.baseline import device_baseline
from testbed.options import partition_of, spec_of
from testbed.package_data import PACKAGE
from testbed.plan import make_plan, place_clients
from testbed.plugins import restore_method
from testbed.run import Plan, RunConfig
from testbed.stopping import check_until
from testbed.store import RunRecord
from testbed.task import Shard

QUICKSTART = "quickstart"
RESNET = "resnet"
VIT = "vit"
#: The models that come along: two are for images, and are configurations only.
_BUNDLED = {
    QUICKSTART: PACKAGE / QUICKSTART,
    RESNET: PACKAGE / QUICKSTART / RESNET,
    VIT: PACKAGE / QUICKSTART / VIT,
}
#: The model and the data that a task has when nobody says.
_OWN_MODEL = {SEQUENCE_CLASSIFICATION: QUICKSTART, CAUSAL_LM: QUICKSTART, IMAGE_CLASSIFICATION: RESNET}
_OWN_DATA = {SEQUENCE_CLASSIFICATION: DOCSTRINGS, CAUSAL_LM: DOCSTRINGS, IMAGE_CLASSIFICATION: DIGITS}


@dataclass(frozen=True)
class Prepared:
    """Everything that is settled before a run starts; nothing has been sent anywhere."""

    config: RunConfig
    inventory: Inventory
    method: Method
    base: BaseModel
    store: ContentStore
    work: Workload
    data: DataSet
    split: Split
    shards: tuple[str, ...]
    held_out: Shard
    baselines: Mapping[str, Baseline]
    facts: Mapping[str, FactSheet]  # of the devices that are not this machine
    plan: Plan
    promises: tuple[str, ...] = ()  # what the method says that this plan gives beyond a result
    weather: Weather = CALM  # what its devices shall undergo

    def reference(self) -> dict[str, float | None]:
        """What every table of quality stands beside; no fine-tuning is filled in when the run starts."""
        held = [index for shard in self.split.shards for index in shard]
        known = {each.name: each for each in baselines(self.data.only(held), self.config.seed, cache_folder())}
        accuracy = {name: known[name].accuracy if name in known else None for name in (MAJORITY_CLASS, BAG_OF_WORDS)}
        simplest = known[UNIGRAM].accuracy if UNIGRAM in known else accuracy[MAJORITY_CLASS]
        return {"majority": simplest, "bag_of_words": accuracy[BAG_OF_WORDS], "no_fine_tuning": None}

    def record(self) -> RunRecord:
        """What the run's folder keeps of all this."""
        plan = {
            "clients": [client.to_json() for client in self.plan.clients],
            "model": {
                "name": self.config.model,
                "architecture": self.base.shape.architecture,
                "blocks": list(self.base.blocks),
                "outside": self.base.outside,
            },
            "work": dataclasses.asdict(self.work),
            "baselines": {name: dataclasses.asdict(baseline) for name, baseline in self.baselines.items()},
            "promises": list(self.promises),
        }
        config = {
            **self.config.to_json(),
            "data_hash": self.data.sha256,
            "data_record": dict(self.data.record),
            "classes": list(self.data.classes),
            "split": dict(self.split.record),
            "shards": list(self.shards),
            "reference": self.reference(),
        }
        inventory = {
            "source": self.inventory.source,
            "devices": [_plain(device) for device in self.inventory],
            "facts": dict(self.facts),
        }
        return RunRecord(plan, config, inventory, describe_environment(self.base.outside, self.data.sha256))


def prepare(
    config: RunConfig,
    inventory: Inventory,
    say: Callable[[str], None] = lambda _: None,
    facts: Mapping[str, FactSheet] | None = None,
) -> Prepared:
    """Load and settle everything for `config` on `inventory`; starts nothing but, once per machine, an empty trainer.

    `facts`: of the devices as a run was begun with them (None: the newest).  Raises a TestbedError for whatever the
    user must change.
    """
    facts = facts if facts is not None else known_facts(inventory)
    method = restore_method(config.method, config.settings)
    config, task, folder = _settled(config, method)
    store = content_store()
    weather = _weather(config, inventory)
    clients = len(place_clients(inventory))
    data = _load(config, task, folder, say)
    work = Workload(
        task=task,
        labels=max(2, len(data.classes)),
        batch_size=config.batch_size,
        length=config.length,
        dtype=config.dtype,
        holding=config.holding,
        checkpointing=config.checkpointing,
    )
    base = BaseModel.open(folder, store, task, work.labels)
    parts = split(data, partition_of(dict(config.partition)), clients, config.seed)
    shards = [data.shard(part) for part in parts.shards]
    baselines = {device.name: _baseline(device, facts, say) for device in inventory}
    plan = make_plan(
        method,
        base.shape,
        work,
        inventory,
        [len(shard) for shard in shards],
        [shard.label_counts for shard in shards],
        baselines,
    )
    check_until(config, inventory, plan)
    return Prepared(
        config=config,
        inventory=inventory,
        method=method,
        base=base,
        store=store,
        work=work,
        data=data,
        split=parts,
        shards=tuple(_stored(store, shard) for shard in shards),
        held_out=data.held_out_shard(),
        baselines=baselines,
        facts=facts,
        plan=plan,
        promises=_promises(method, plan, config),
        weather=weather,
    )


def _weather(config: RunConfig, inventory: Inventory) -> Weather:
    """Who undergoes what; raises UsageError for what a device cannot undergo."""
    by_name = {device.name: device for device in inventory}
    places = [(client, by_name[name]) for client, name in enumerate(place_clients(inventory))]
    weather = parse(config.disturbances).settle(config.seed, places)
    weather.check(tuple(inventory), capped=config.capped)
    return weather


def _promises(method: Method, plan: Plan, config: RunConfig) -> tuple[str, ...]:
    able = len(plan.taking_part)
    if not able:
        return ()
    return tuple(method.promises(able, min(able, config.participants_of(len(plan.clients))), config.rounds))


def known_facts(inventory: Inventory) -> dict[str, FactSheet]:
    """The newest fact sheets of the devices that are not this machine; raises PlanError for one missing or in doubt."""
    found = {device.name: facts_of(device) for device in inventory if device.access is not None}
    lacking = [name for name, sheet in found.items() if sheet is None or not sheet.get("baseline")]
    if lacking:
        which = " ".join(f"--only {name}" for name in lacking)
        raise PlanError(
            f"no fact sheet says what an empty trainer takes on {', '.join(lacking)}; make ready with: "
            f"testbed provision {which}"
        )
    doubts = {name: outdated(sheet) for name, sheet in found.items() if sheet is not None}
    if told := [f"{name} ({reason})" for name, reason in doubts.items() if reason is not None]:
        raise PlanError(
            f"the last visit to {', '.join(told)} failed, and what is known of Python there may not hold; mend that, "
            f"and make ready again: testbed provision {' '.join(f'--only {name}' for name in doubts if doubts[name])}"
        )
    return {name: sheet for name, sheet in found.items() if sheet is not None}


def content_store() -> ContentStore:
    """Where base models are kept in blocks, and all else that is known by its hash."""
    return ContentStore(cache_folder() / "content")


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a base model: one that comes along, or a path."""
    folder = _BUNDLED.get(name, Path(name).expanduser())
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name!r}: expected a folder with config.json and safetensors files, there is no "
            f"{folder / 'config.json'}; give the path of a model's folder, or leave --model out"
        )
    return folder


def _settled(config: RunConfig, method: Method) -> tuple[RunConfig, str, Path]:
    """The settings with nothing left open, their task, and the model's folder."""
    task = config.task or method.default_task
    model = config.model or _OWN_MODEL[task]
    data = {**config.data, "name": config.data.get("name", _OWN_DATA[task])}
    return dataclasses.replace(config, task=task, model=model, data=data), task, model_folder(model)


def data_of(config: RunConfig) -> DataSet:
    """The data of a run whose settings are settled, read again.  Raises DataError or ModelError when they are gone."""
    task = config.task or restore_method(config.method, config.settings).default_task
    return _load(config, task, model_folder(config.model or _OWN_MODEL[task]), lambda _: None)


def _load(config: RunConfig, task: str, folder: Path, say: Callable[[str], None]) -> DataSet:
    """The data of a run, as its model takes them; raises ModelError for a model that is not for the task."""
    spec = spec_of(dict(config.data), task, config.length)
    model = blocks.skeleton(read_config(folder), task, 2, "float32")
    if task == IMAGE_CLASSIFICATION:
        return load_images(spec, blocks.image_shape(model.config), say)
    return load_data(spec, tokenizer_of(folder), cache_folder(), say)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer that stands in a model's folder."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder}: there is no tokenizer.json; save the model's fast tokenizer into the folder")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _baseline(device: Device, facts: Mapping[str, FactSheet], say: Callable[[str], None]) -> Baseline:
    """What an empty trainer takes: measured on the device when it was provisioned, or here for one emulated here."""
    if device.name in facts:
        return Baseline(**facts[device.name]["baseline"])
    return device_baseline(device, cache_folder(), say)


def _stored(store: ContentStore, shard: Shard) -> str:
    partial = store.folder / "shard.partial"
    shard.save(partial)
    return store.put_file(partial)


def _plain(noun: Any) -> dict[str, Any]:
    data: dict[str, Any] = dataclasses.asdict(noun)
    data["tags"] = sorted(data["tags"])
    return data
