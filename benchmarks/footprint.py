"""How far predicted peak memory is from measured: a table, its summary, and the smallest caps that jobs survive.

    python benchmarks/footprint.py [--quick] [--calibrate] [--caps] [--fresh] [--folder FOLDER]

Every case is one job in a fresh trainer process: the real path (content files, workplace, the method `lora`, two local
steps), its peaks read as the agent reads them.  Results are kept per case in the folder, so that a run which was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from footprint_cases import CALIBRATION, CLASSES, MODELS, Case, cap_cases, held_out_cases
from footprint_job import measure

from testbed.cache import cache_folder
from testbed.environment import describe_environment
from testbed.method import Block, Submodel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.model.footprint import Baseline, Coefficients, PhaseFootprint

MIB = 1 << 20


def predict_case(case: Case, baseline: Baseline, fitted: Coefficients | None = None) -> PhaseFootprint:
    from methods.lora import Lora
    from testbed.model import blocks
    from testbed.model.footprint import fitted_coefficients, predict

    shape = blocks.describe(MODELS[case.model], case.task, 8, case.stored)
    method = Lora(rank=case.rank, targets=case.targets)
    submodel = Submodel(tuple(Block(position) for position in range(case.keep)))
    phases = method.phases(submodel, shape, case.work)
    return predict(phases, shape, case.work, baseline, fitted or fitted_coefficients()).largest


# ── results, kept case by case ───────────────────────────────────────────────────────────────────────────────────────
def measured(case: Case, folder: Path, results: Path) -> dict[str, Any]:
    """The peak of the phase "train" of a case, from the results file or by running it now."""
    known = {line["case"]: line for line in _lines(results)}
    if case.key not in known:
        train = next(phase for phase in measure(case, folder)["phases"] if phase["name"] == "train")
        with results.open("a") as file:
            file.write(json.dumps({"case": case.key, "seconds": train["seconds"], **train["peak"]}) + "\n")
        return measured(case, folder, results)
    return known[case.key]


def _lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


# ── calibration: two numbers from twelve cases ───────────────────────────────────────────────────────────────────────
def calibrate(folder: Path, results: Path, baseline: Baseline) -> Coefficients:
    """Least relative error of slack_bytes + slack x (bytes of the passes)."""
    import numpy as np

    from testbed.model.footprint import Coefficients, fitted_coefficients, passes_bytes

    rows, rests = [], []
    for case in CALIBRATION:
        bare = predict_case(case, baseline, Coefficients())
        peak = measured(case, folder, results)["estimate_bytes"]
        rows.append([1 / peak, passes_bytes(bare) / peak])
        rests.append((peak - bare.unreclaimable_bytes) / peak)
    fixed, share = np.linalg.lstsq(np.array(rows), np.array(rests), rcond=None)[0]
    return replace(fitted_coefficients(), slack=round(float(share), 4), slack_bytes=round(float(fixed)))


# ── the smallest surviving cap ───────────────────────────────────────────────────────────────────────────────────────
def smallest_cap(case: Case, folder: Path, predicted: int, results: Path, step: float = 0.005) -> dict[str, Any]:
    """The smallest cap a case survives and the largest that killed it, found by bisection around the prediction."""
    key = f"cap {case.key}"
    known = {line["case"]: line for line in _lines(results)}
    if key in known:
        return known[key]
    low, high = round(predicted * 0.9), round(predicted * 1.1)
    if measure(case, folder, cap_bytes=high) is None:
        low, high = high, round(predicted * 1.3)
    while high - low > step * predicted:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(case, folder, cap_bytes=middle) else (middle, high)
    with results.open("a") as file:
        file.write(json.dumps({"case": key, "survived_bytes": high, "killed_bytes": low}) + "\n")
    return smallest_cap(case, folder, predicted, results, step)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    case: Case
    predicted: int
    measured: int
    lower: int
    baseline: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def net_error(self) -> float:
        """Net of what an empty trainer takes."""
        return (self.predicted - self.baseline) / (self.measured - self.baseline) - 1


def row_of(case: Case, folder: Path, results: Path, baseline: Baseline) -> Row:
    peak = measured(case, folder, results)
    predicted = predict_case(case, baseline).unreclaimable_bytes
    return Row(case, predicted, peak["estimate_bytes"], peak["lower_bytes"], baseline.bytes)


def show(row: Row) -> None:
    mib = [f"{size / MIB:8.1f}" for size in (row.predicted, row.measured, row.lower)]
    print(f"{row.case!s:66} {' '.join(mib)} {row.error:+7.1%} {row.net_error:+7.1%}", flush=True)


def summarise(rows: Sequence[Row]) -> None:
    errors = sorted(abs(row.error) for row in rows)
    net = sorted(abs(row.net_error) for row in rows)
    print(f"\n{len(rows)} cases, none of them calibrated")
    print(f"error    median {statistics.median(errors):.2%}   worst {errors[-1]:.2%}   targets 2 %, 10 %")
    print(f"         within 5 %: {_share(errors, 0.05):.0%}   target 95 %")
    print(
        f"net of the runtime: median {statistics.median(net):.2%}   within 10 %: {_share(net, 0.1):.0%}   target 95 %"
    )


def _share(errors: Sequence[float], bound: float) -> float:
    return sum(error <= bound for error in errors) / len(errors)


def show_caps(cases: Sequence[Case], folder: Path, results: Path, baseline: Baseline) -> None:
    print(f"\nsmallest surviving cap, MiB\n{'case':66} predict. survived   killed   error")
    for case in cases:
        predicted = predict_case(case, baseline).unreclaimable_bytes
        found = smallest_cap(case, folder, predicted, results)
        survived, killed = found["survived_bytes"], found["killed_bytes"]
        print(
            f"{case!s:66} {predicted / MIB:8.1f} {survived / MIB:8.1f} {killed / MIB:8.1f} "
            f"{predicted / survived - 1:+7.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="every fifth case only")
    parser.add_argument("--calibrate", action="store_true", help="fit the coefficients first and write them")
    parser.add_argument("--caps", action="store_true", help="find the smallest surviving cap of six cases (root)")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--survive", type=int, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "footprint", help="where models and results are"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.survive:
        survive(given.survive, given.folder)
        return
    report(given)


def survive(count: int, folder: Path) -> None:
    """For the tests: jobs that just fit a random budget, each under a real cap of exactly what was predicted."""
    from testbed.node.baseline import measure_here

    baseline = measure_here(threads=1)
    draw = random.Random(5)
    for _ in range(count):
        case = Case("llama-11M", draw.randint(1, 12), draw.choice([1, 4, 8]), draw.choice([77, 128, 256]), CLASSES)
        cap = predict_case(case, baseline).bytes
        ended = measure(case, folder, cap_bytes=cap)
        print(json.dumps({"case": str(case), "cap_bytes": cap, "survived": ended is not None}), flush=True)


def report(given: argparse.Namespace) -> None:
    from testbed.model.footprint import COEFFICIENTS_FILE
    from testbed.node.baseline import measure_here

    results = given.folder / "results.jsonl"
    if given.fresh:
        results.unlink(missing_ok=True)
    baseline = measure_here(threads=1)
    print(json.dumps(describe_environment(), indent=1))
    print({name: f"{size / MIB:.1f} MiB" for name, size in vars(baseline).items()})
    if given.calibrate:
        COEFFICIENTS_FILE.write_text(json.dumps(asdict(calibrate(given.folder, results, baseline)), indent=1) + "\n")
    print(f"\n{'MiB':66} predict. measured  sampled   error     net")
    cases = held_out_cases()[:: 5 if given.quick else 1]
    rows = []
    for case in cases:
        rows.append(row_of(case, given.folder, results, baseline))
        show(rows[-1])
    summarise(rows)
    if given.caps:
        show_caps(cap_cases(), given.folder, results, baseline)


if __name__ == "__main__":
    main()
