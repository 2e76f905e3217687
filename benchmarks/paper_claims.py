"""The papers' claims beside what is measured here: the table *claim · paper's figure · ours · conditions*.

    testbed experiment experiments/paper_claims.yaml          (the runs: hours on two cores; Ctrl-C, and go on later)
    testbed experiment experiments/paper_claims_limited.yaml
    testbed experiment experiments/paper_claims_images.yaml
    python benchmarks/paper_claims.py [--models llama-1.1B bert-110M …] [--runs DIR] [--folder DIR]

Prints Markdown.  Memory is measured by this command itself, on random weights (llama-6.7B, the shape of LLaMA2-7B,
needs 14 GB of disk and 20 GiB of memory; leave it out with --models).  What was not run yet is left out of the table,
and told.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import claims_memory
from claims_runs import Curve, better, curve_of, fewer_bytes, speed_up

from testbed.cache import cache_folder
from testbed.environment import describe_environment

MODELS = ("llama-6.7B", "llama-1.1B", "bert-110M", "resnet18-224", "resnet18-128", "resnet18-32")
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
Curves = Mapping[int, Curve]  # by seed


@dataclass(frozen=True)
class RunClaim:
    """One row that two methods' runs on the same devices answer."""

    claim: str
    paper: str
    own: str
    baseline: str
    how: Callable[[Curves, Curves], str]


#: Every device can hold the whole model.
AMPLE = (
    RunClaim("DevFT sends fewer bytes than LoRA", "up to 10.67× (against C2A)", "devft", "lora", fewer_bytes),
    RunClaim("ChainFed sends fewer bytes than Full Adapters", "2.75–3.47× by FOAT alone", "chainfed", "full_adapters",
             fewer_bytes),
    RunClaim("SmartFed sends routers instead of LoRA", "routers < 0.1 % of the model", "smartfed", "lora", fewer_bytes),
    RunClaim("DevFT reaches the target sooner than LoRA", "4.59× (against C2A)", "devft", "lora", speed_up),
    RunClaim("DevFT, grouped evenly from half the depth", "–", "devft, even halves", "lora", speed_up),
    RunClaim("SmartFed reaches the target sooner than LoRA", "3.95×", "smartfed", "lora", speed_up),
    RunClaim("DevFT's quality after the same rounds, against LoRA", "+9.07 %", "devft", "lora", better),
    RunClaim("DevFT, grouped evenly from half the depth: quality", "–", "devft, even halves", "lora", better),
    RunClaim("ChainFed's quality against unlimited Full Adapters", "+1.61 … 2.86", "chainfed", "full_adapters", better),
)  # fmt: skip
#: Some devices cannot hold the whole model.
LIMITED = (
    RunClaim("FedPruner's quality where LoRA leaves devices out", "+1.98 % … 11.11 %", "fedpruner", "lora", better),
    RunClaim("ChainFed's quality where Full Adapters leave devices out", "up to +46.46 %", "chainfed", "full_adapters",
             better),
    RunClaim("DevFT's quality where LoRA leaves devices out", "+9.07 %", "devft", "lora", better),
)  # fmt: skip
IMAGES = (
    RunClaim("ScaleFL reaches the target of the whole network sooner", "up to 1.9×", "scalefl", "heterofl", speed_up),
    RunClaim("ScaleFL's quality against the whole network", "–", "scalefl", "heterofl", better),
    RunClaim("ScaleFL's quality against HeteroFL, nobody holding more than a quarter of the width", "up to +84.2 %",
             "scalefl", "heterofl, quarter width", better),
    RunClaim("ScaleFL's quality against FedRolex, nobody holding more than a quarter of the width", "up to +84.2 %",
             "scalefl", "fedrolex, quarter width", better),
)  # fmt: skip
RUNS = (
    (AMPLE, "paper_claims", "four clients on devices that all hold the model"),
    (LIMITED, "paper_claims_limited", "the emulated inventory, on which some devices cannot hold the model"),
    (IMAGES, "paper_claims_images", "the emulated inventory, on which each device can hold this small network"),
)


def curves_of(experiment: Path, runs_dir: Path) -> tuple[dict[str, dict[int, Curve]], str]:
    """Label → seed → curve of the finished runs, and the settings they share, in words."""
    from testbed.experiments.cells import DONE, standings
    from testbed.experiments.experiment import load_experiment

    loaded = load_experiment(experiment)
    found: dict[str, dict[int, Curve]] = {}
    for standing in standings(loaded.cells, runs_dir):
        if standing.state == DONE and standing.run is not None:
            found.setdefault(standing.cell.label, {})[standing.cell.seed] = curve_of(standing.run)
    config = loaded.cells[0].config
    return found, f"{config.rounds} rounds × {config.steps} steps of {config.batch_size}"


def run_rows(
    claims: tuple[RunClaim, ...], experiment: Path, devices: str, runs_dir: Path
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of those claims whose runs are there, and what is missing."""
    curves, settings = curves_of(experiment, runs_dir)
    rows, missing = [], []
    for claim in claims:
        own, baseline = (curves.get(label, {}) for label in (claim.own, claim.baseline))
        seeds = sorted(own.keys() & baseline.keys())
        if not seeds:
            missing.append(f"{claim.claim}: no finished runs of {claim.own} and {claim.baseline} in {experiment.name}")
            continue
        ours = claim.how({seed: own[seed] for seed in seeds}, {seed: baseline[seed] for seed in seeds})
        rows.append((claim.claim, claim.paper, ours, f"{devices}; {settings}; {len(seeds)} seeds"))
    return rows, missing


def main() -> None:
    from testbed.node.baseline import measure_here

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="shapes whose memory is measured")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the experiments' runs are")
    parser.add_argument(
        "--folder", type=Path, default=cache_folder() / "footprint", help="where models and results are"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    runtime = measure_here(threads=1)
    rows = [
        claims_memory.row(claims_memory.compare(claim, given.folder, runtime.bytes + runtime.first_step_bytes))
        for claim in claims_memory.claims(tuple(given.models))
    ]
    missing = []
    for claims, name, devices in RUNS:
        found, lacking = run_rows(claims, EXPERIMENTS / f"{name}.yaml", devices, given.runs)
        rows += found
        missing += lacking
    print("| claim | paper's figure | ours | conditions |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print("\n" + json.dumps(describe_environment()))
    for text in missing:
        print(f"missing: {text}")


if __name__ == "__main__":
    main()
