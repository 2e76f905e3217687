"""Records of runs as the round loop writes them, built by code: shared by the tests of store, report and live view."""

from __future__ import annotations

from dataclasses import asdict

from testbed.inventory import Budget, Device, HardwareProfile
from testbed.job import FINISHED, OUT_OF_MEMORY, Result
from testbed.measurement import Measurement, PeakMemory, PhaseMeasurement
from testbed.method import Submodel
from testbed.run import PLANNED, ClientPlan
from testbed.run_record import RunRecord
from testbed.task import Quality

MIB = 1 << 20
SOURCES = {"lower": "sampled", "estimate": "vmhwm", "upper": "cgroup1_max_usage"}


def device(name: str, budget_bytes: int, kind: str = "emulated") -> dict:
    profile = HardwareProfile("pi-4", "Raspberry Pi 4", 4096 * MIB, 3800 * MIB, 4)
    noun = Device(name, kind, profile, Budget(budget_bytes))
    return {**asdict(noun), "tags": sorted(noun.tags)}


def planned(index: int, on: str, budget_mib: int, predicted_mib: int, blocks: int) -> dict:
    return ClientPlan(
        index=index,
        device=on,
        examples=1000 + index,
        budget_bytes=budget_mib * MIB,
        outcome=PLANNED,
        submodel=Submodel.first(blocks),
        predicted_bytes=(predicted_mib + 100) * MIB,
        predicted_peak_bytes=predicted_mib * MIB,
        predicted_phase="train",
        parts={"train": {"weights": 100 * MIB, "logits": 30 * MIB}},
    ).to_json()


def refused(index: int, on: str, budget_mib: int, needed_mib: int) -> dict:
    return ClientPlan(
        index=index,
        device=on,
        examples=1000 + index,
        budget_bytes=budget_mib * MIB,
        outcome="refused",
        needed_bytes=needed_mib * MIB,
        reason=f"the smallest submodel needs {needed_mib} MiB, its budget is {budget_mib} MiB",
    ).to_json()


def record(method: str = "lora", clients: list[dict] | None = None, **config: object) -> RunRecord:
    """A run of two boards: one holds the full model, the other is refused (unless `clients` says otherwise)."""
    clients = clients or [planned(0, "orin-1", 800, 740, 12), refused(1, "pi-1", 500, 740)]
    settings = {
        "method": method,
        "settings": {"rank": 8},
        "model": "quickstart",
        "task": "sequence_classification",
        "data": {"name": "docstrings"},
        "data_hash": "d0c5",
        "partition": {"name": "iid"},
        "rounds": 3,
        "seed": 7,
        "capped": True,
        "reference": {"majority": 0.125, "bag_of_words": 0.81, "no_fine_tuning": None},
        **config,
    }
    boards = [device(client["device"], client["budget_bytes"]) for client in clients]
    plan = {"clients": clients, "model": {"name": "quickstart"}, "work": {"task": "sequence_classification"}}
    versions = {"packages": {"torch": "2.13.0"}, "machine": {"cpu": "Test CPU"}, "commit": None, "dirty": None}
    return RunRecord(plan, settings, {"source": "lab.yaml", "devices": boards}, versions)


def finished(round_index: int, client: int, on: str, peak_mib: int, *, limit_mib: int | None = 800) -> Result:
    """A job of 2 s loading and 8 s training on 4000 tokens."""
    peak = PeakMemory((peak_mib - 5) * MIB, peak_mib * MIB, (peak_mib + 12) * MIB, SOURCES, samples=40)
    phases = (PhaseMeasurement("load", 2.0, PeakMemory(300 * MIB, 310 * MIB)), PhaseMeasurement("train", 8.0, peak))
    limit = None if limit_mib is None else limit_mib * MIB
    return Result(
        job=f"run-r{round_index}-c{client}",
        client=client,
        round=round_index,
        outcome=FINISHED,
        device=on,
        examples=1000 + client,
        tokens=4000,
        scalars={"loss": 1.5 - 0.1 * round_index},
        measurement=Measurement(phases, 10.0, limit, 300 * MIB, bytes_down=1000, bytes_up=250),
    )


def out_of_memory(round_index: int, client: int, on: str, limit_mib: int) -> Result:
    peak = PeakMemory(upper_bytes=limit_mib * MIB, sources=SOURCES)
    return Result(
        job=f"run-r{round_index}-c{client}",
        client=client,
        round=round_index,
        outcome=OUT_OF_MEMORY,
        device=on,
        phase="train",
        error="the kernel killed the trainer",
        measurement=Measurement((PhaseMeasurement("train", 1.0, peak),), 1.0, limit_mib * MIB),
    )


def quality(accuracy: float, loss: float = 1.0) -> Quality:
    return Quality(loss, accuracy, 800)


def add_rounds(folder, accuracies: list[float | None], seconds: float = 10.0) -> None:
    """One round per accuracy; None: a round without an evaluation."""
    for index, accuracy in enumerate(accuracies):
        folder.record_round(
            index,
            seconds=seconds,
            learning_rate=0.002,
            participants=1,
            finished=1,
            deployed_bytes=0,
            train_loss=1.5 - 0.1 * index,
            quality=None if accuracy is None else quality(accuracy),
        )
