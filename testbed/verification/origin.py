"""What a run was made with: this installation, the base model and the data, as far as they are still here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from testbed.environment import describe_environment
from testbed.errors import TestbedError
from testbed.verification.checks import Check, judged, unknown

if TYPE_CHECKING:
    from testbed.model.checkpoint import BaseModel
    from testbed.store import RunFolder


def check_versions(folder: RunFolder) -> Check:
    """Versions, commit and machine are recorded; where this installation is another, that is told and is no failure."""
    recorded = folder.record.versions
    packages = recorded.get("packages") or {}
    now = describe_environment()
    failures = [] if packages.get("torch") else ["versions.json does not say which torch it was"]
    notes = list(_differences(recorded, now))
    same = "this installation is the same" if not notes else "this installation is another"
    if recorded.get("dirty"):
        notes.append("its code had changes that no commit holds")
    return judged("versions", f"edge-testbed {packages.get('edge-testbed')}; {same}", failures, notes)


def opened_base(folder: RunFolder) -> BaseModel | str:
    """The base model of a run; or why it cannot be had."""
    from testbed.method import Workload
    from testbed.model.checkpoint import BaseModel
    from testbed.prepare import content_store, model_folder

    try:
        work = Workload(**folder.plan["work"])
        return BaseModel.open(model_folder(folder.config["model"]), content_store(), work.task, work.labels)
    except (TestbedError, KeyError, TypeError) as error:
        return str(error)


def check_base(folder: RunFolder, base: BaseModel | str) -> Check:
    """The base model's weights, block by block, are those that the plan was made for."""
    if isinstance(base, str):
        return unknown("base model", base)
    then = folder.plan.get("model") or {}
    if not {"outside", "blocks"} <= then.keys():
        return unknown("base model", "the plan does not say what its weights were")
    failures = [] if then["outside"] == base.outside else ["what lies outside its blocks has other weights now"]
    if len(then["blocks"]) != len(base.blocks):
        failures.append(f"it had {len(then['blocks'])} blocks, and has {len(base.blocks)}")
    changed = [str(i) for i, (a, b) in enumerate(zip(then["blocks"], base.blocks, strict=False)) if a != b]
    if changed:
        failures.append(f"block {', '.join(changed)} has other weights now")
    return judged(
        "base model", f"{then.get('name') or folder.config.get('model')}, {len(base.blocks)} blocks", failures
    )


def check_data(folder: RunFolder) -> Check:
    """The data set's texts, labels and sides are those that the run was trained and judged on."""
    from testbed.data import check_same
    from testbed.errors import DataError
    from testbed.prepare import data_of
    from testbed.run import RunConfig

    config = folder.config
    name = (config.get("data") or {}).get("name")
    if not config.get("data_hash"):
        return unknown("data", "no hash of it is recorded")
    try:
        data = data_of(RunConfig.from_json(config))
    except (TestbedError, OSError) as error:
        return unknown("data", str(error))
    try:
        check_same(data, config["data_hash"])
    except DataError as error:
        return judged("data", str(name), [str(error)])
    return judged("data", f"{name}, {len(data.train)} to train on and {len(data.held_out)} held out", [])


def _differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, version in (recorded.get("packages") or {}).items():
        here = now["packages"].get(name)
        if here != version:
            yield f"{name}: {version} then, {here or 'not installed'} here"
    for what in ("python", "commit"):
        if recorded.get(what) != now[what]:
            yield f"{what}: {recorded.get(what) or 'unknown'} then, {now[what] or 'unknown'} here"
    cpu, here = (recorded.get("machine") or {}).get("cpu"), now["machine"]["cpu"]
    if cpu != here:
        yield f"machine: {cpu or 'unknown'} then, {here or 'unknown'} here"
