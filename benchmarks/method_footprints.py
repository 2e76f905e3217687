"""How far the predicted peak of every phase of every method is from the measured one: a table and its summary.

    python benchmarks/method_footprints.py [--only METHOD …] [--models MODEL …] [--fresh] [--folder FOLDER]

Each case is one job as the method's server half orders it, on random weights, in a fresh trainer process.  Results are
kept per case in the folder, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from method_job import MethodCase, measured_phases, predict_case

from testbed.cache import cache_folder
from testbed.environment import describe_environment
from testbed.method import IMAGE_CLASSIFICATION

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
WIDTHS = (1.0, 0.5, 0.125)
IMAGE_MODEL, IMAGE_STAGES = "resnet18-32", 4
BLOCKS = {"llama-60M": 12, "qwen3-60M": 10, "bert-110M": 12}
STAGES = 4
#: The survey's baselines whose only round is like every other.
BASELINES = (
    "fedprox", "ffa_lora", "lora_fair", "flora", "hetlora", "flexlora", "fedsa_lora", "feddpa", "c2a",
    "bitfit", "fedprompt", "fwdllm",
)  # fmt: skip


def cases() -> Iterator[MethodCase]:
    """Every phase of every method at least once: of text on three models of 10 to 12 blocks, of images on one."""
    yield from image_cases()
    for model, blocks in BLOCKS.items():
        yield from seed_cases(model, blocks)
        yield from baseline_cases(model, blocks)


def image_cases() -> Iterator[MethodCase]:
    for stage in range(IMAGE_STAGES):
        yield MethodCase("scalefl", IMAGE_MODEL, round=stage, rounds=IMAGE_STAGES, batch=64, task=IMAGE_CLASSIFICATION)
    for method in ("heterofl", "fedrolex"):
        for width in WIDTHS:
            yield MethodCase(method, IMAGE_MODEL, width=width, batch=64, task=IMAGE_CLASSIFICATION)


def seed_cases(model: str, blocks: int) -> Iterator[MethodCase]:
    for method in ("lora", "full_adapters", "linear_probe", "no_finetuning", "smartfed"):
        yield MethodCase(method, model)
    for method in ("fedpruner", "fedra"):
        yield MethodCase(method, model, keep=3)
    for method in ("devft", "progfed"):
        for stage in range(STAGES):
            yield MethodCase(method, model, {"stages": STAGES}, round=stage, rounds=STAGES)
    for window, turn in ((2, 0), (2, 1), (2, 4), (2, blocks - 2), (4, 0), (4, blocks - 4)):
        settings = {"window": window, "window_by": "fixed", "threshold": 1.0}
        yield MethodCase("chainfed", model, settings, state={"turn": turn})
    yield MethodCase("chainfed", model, {"window": 2, "window_by": "fixed", "threshold": 0.8})


def baseline_cases(model: str, blocks: int) -> Iterator[MethodCase]:
    for method in BASELINES:
        yield MethodCase(method, model)
    yield MethodCase("inclusivefl", model, keep=3)
    # These two choose anew in every round, and are planned for the most that they may choose: here they do.
    yield MethodCase("fed_pilot", model, {"share": 1.0})
    yield MethodCase("fedadapter", model, {"depth": blocks, "width": 32})
    yield MethodCase("fedkseed", model, {"seeds": 64})
    for factor in ("B", "A"):
        yield MethodCase("rolora", model, state={"factor": factor})
    for stage in (0, 3):
        yield MethodCase("slora", model, round=stage, rounds=4)


def results_of(case: MethodCase, folder: Path) -> dict[str, Any]:
    """Phase → peaks of a case, from the results file or by running it now."""
    results = folder / "method-results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    known = {line["case"]: line["phases"] for line in map(json.loads, lines)}
    if case.key not in known:
        known[case.key] = measured_phases(case, folder)
        with results.open("a") as file:
            file.write(json.dumps({"case": case.key, "phases": known[case.key]}) + "\n")
    return dict(known[case.key])


def main() -> None:
    from testbed.node.baseline import measure_here

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", help="these methods only")
    parser.add_argument("--models", nargs="+", help="these models only")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "footprint", help="where models and results are"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        (given.folder / "method-results.jsonl").unlink(missing_ok=True)
    baseline = measure_here(threads=1)
    print(json.dumps(describe_environment(), indent=1))
    print(f"\n{'MiB':78} {'phase':12} predict. measured   error")
    errors = []
    for case in cases():
        if case.method not in (given.only or [case.method]) or case.model not in (given.models or [case.model]):
            continue
        predicted = {
            phase.name: phase.unreclaimable_bytes for phase in predict_case(case, given.folder, baseline).phases
        }
        for name, peaks in results_of(case, given.folder).items():
            errors.append(predicted[name] / peaks["estimate_bytes"] - 1)
            mib = [f"{size / MIB:8.1f}" for size in (predicted[name], peaks["estimate_bytes"])]
            print(f"{case!s:78} {name:12} {' '.join(mib)} {errors[-1]:+7.1%}", flush=True)
    distances = sorted(map(abs, errors))
    print(f"\n{len(errors)} phases: median {statistics.median(distances):.2%}   worst {distances[-1]:.2%}")


if __name__ == "__main__":
    main()
