"""How far predicted peak memory is from measured: a table, its summary, and the smallest caps that jobs survive.

    python benchmarks/footprint.py [--quick] [--calibrate] [--caps] [--fresh] [--folder FOLDER]

Every case is one job in a fresh trainer process: the real path (content files, workplace, the method `lora`, two local
steps), its peaks read as the agent reads them.  Results are kept per case in the folder, so that a run which was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.cache import cache_folder
from testbed.environment import describe_environment
from testbed.job import Job
from testbed.method import Block, Submodel, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.model.footprint import Baseline, Coefficients, PhaseFootprint

MIB = 1 << 20
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True}


def llama(hidden: int, forward: int, heads: int, blocks: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        **LLAMA,
        "hidden_size": hidden,
        "intermediate_size": forward,
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama-11M": llama(256, 640, 4, 12, 8192),
    "llama-134M": llama(768, 2048, 12, 12, 32000),
    # from here on: shapes and architectures that no calibration case has
    "llama-60M": llama(512, 1408, 8, 12, 32000, num_key_value_heads=2),
    "llama-1.1B": llama(2048, 5632, 32, 22, 32000, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen2-90M": {**llama(512, 2048, 8, 16, 50000, num_key_value_heads=4), "model_type": "qwen2"},
    "qwen3-60M": {**llama(512, 1536, 8, 10, 32000, num_key_value_heads=4, head_dim=64), "model_type": "qwen3"},
    "gemma2-80M": {
        **llama(512, 2048, 8, 10, 64000, num_key_value_heads=4, head_dim=64, sliding_window=128),
        "model_type": "gemma2",
    },
    "gpt2-124M": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "bert-110M": {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "distilbert-66M": {"model_type": "distilbert", "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072},
}
for _encoder in ("gpt2-124M", "bert-110M", "distilbert-66M"):
    MODELS[_encoder]["pad_token_id"] = 0

LM, CLASSES = "causal_lm", "sequence_classification"


@dataclass(frozen=True)
class Case:
    """One job to predict and to measure."""

    model: str
    keep: int
    batch: int
    length: int
    task: str = LM
    dtype: str = "float32"
    holding: str = "resident"
    checkpointing: bool = False
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    stored: str = "bfloat16"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def work(self) -> Workload:
        return Workload(
            task=self.task,
            labels=8,
            batch_size=self.batch,
            length=self.length,
            dtype=self.dtype,
            holding=self.holding,
            checkpointing=self.checkpointing,
        )

    def __str__(self) -> str:
        marks = [
            "lm" if self.task == LM else "cls",
            {"float32": "fp32", "bfloat16": "bf16"}[self.dtype],
            self.holding,
            *(["ckpt"] * self.checkpointing),
        ]
        return (
            f"{self.model:15} keep {self.keep:2} b{self.batch:<2} s{self.length:<4} r{self.rank:<3} {' '.join(marks)}"
        )


CALIBRATION = (
    Case("llama-11M", 12, 4, 128),
    Case("llama-11M", 3, 8, 256, CLASSES),
    Case("llama-11M", 12, 1, 512, checkpointing=True),
    Case("llama-11M", 6, 16, 64, CLASSES, dtype="bfloat16"),
    Case("llama-134M", 12, 1, 128),
    Case("llama-134M", 3, 4, 256),
    Case("llama-134M", 12, 4, 256, CLASSES),
    Case("llama-134M", 12, 2, 512, CLASSES, checkpointing=True),
    Case("llama-134M", 12, 1, 256, dtype="bfloat16"),
    Case("llama-134M", 6, 2, 512, CLASSES, dtype="bfloat16"),
    Case("llama-134M", 6, 1, 128, holding="mapped", stored="float32"),
    Case("llama-134M", 12, 2, 128, CLASSES, holding="streamed", checkpointing=True),
)


def held_out_cases() -> tuple[Case, ...]:
    """The cases that count: drawn once with a fixed seed, plus the large ones."""
    draw = random.Random(20)
    drawn = []
    blocks = {name: config.get("num_hidden_layers") or config.get("n_layer") or config["n_layers"]
              for name, config in MODELS.items()}  # fmt: skip
    small = [name for name in MODELS if name != "llama-1.1B"]
    for index in range(44):
        model = small[index % len(small)]
        encoder = model.startswith(("bert", "distilbert"))
        task = CLASSES if encoder else draw.choice([LM, CLASSES])
        length = draw.choice([64, 77, 128, 200, 256, 333, 512])
        batch = draw.choice([b for b in (1, 2, 3, 4, 8, 16) if b * length <= (1400 if task == LM else 2200)])
        holding = draw.choice(["resident"] * 4 + ["mapped", "streamed"])
        drawn.append(
            Case(
                model,
                draw.randint(1, blocks[model]),
                batch,
                length,
                task,
                dtype=draw.choice(["float32", "float32", "bfloat16"]),
                holding=holding,
                checkpointing=holding == "streamed" or draw.random() < 0.25,
                rank=draw.choice([4, 8, 16, 24, 64]),
                stored="float32" if holding == "mapped" else "bfloat16",
            )
        )
    large = (
        Case("llama-1.1B", 22, 1, 128, CLASSES, dtype="bfloat16", rank=16),
        Case("llama-1.1B", 22, 1, 77, LM, rank=16),
        Case("llama-1.1B", 11, 2, 333, LM, checkpointing=True),
        Case("llama-1.1B", 6, 4, 128, CLASSES, rank=4),
        Case("llama-1.1B", 22, 1, 256, CLASSES, dtype="bfloat16", checkpointing=True),
        Case("llama-1.1B", 22, 2, 128, CLASSES, holding="streamed", checkpointing=True),
    )
    return (*drawn, *large)


# ── models: random weights, written once ─────────────────────────────────────────────────────────────────────────────
def write_model(case: Case, store_folder: Path) -> dict[str, Any]:
    """Content files of a case's model; what a job names: {"config", "outside", "blocks"}."""
    import torch

    from testbed.model import blocks, checkpoint
    from testbed.model.content import ContentStore
    from testbed.model.tensorfile import put_tensors

    known = store_folder / f"{case.model}-{case.task}-{case.stored}.json"
    if known.is_file():
        return dict(json.loads(known.read_text()))
    store = ContentStore(store_folder)
    model = blocks.skeleton(MODELS[case.model], case.task, 8, "float32")
    anatomy = blocks.find(model)
    head = blocks.head_names(model, anatomy, case.task)
    files: dict[int | None, dict[str, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(7)
    for names, shape in checkpoint.wanted(model):
        if names[0] not in head:
            position, rest = blocks.place(anatomy.prefix, names[0])
            value = torch.empty(shape).normal_(std=0.02, generator=generator).to(getattr(torch, case.stored))
            files.setdefault(position, {})[rest] = value
    contents = {position: put_tensors(store, tensors) for position, tensors in files.items()}
    made = {
        "config": store.put_bytes(json.dumps(MODELS[case.model]).encode()),
        "outside": contents[None],
        "blocks": [contents[position] for position in range(len(anatomy.blocks))],
    }
    known.write_text(json.dumps(made))
    return made


def write_shard(case: Case, store_folder: Path) -> str:
    """One batch of texts of different lengths, the longest as long as the case says."""
    from testbed.model.content import ContentStore
    from testbed.task import Example, Shard

    draw = random.Random(case.key)
    lengths = [case.length, *(draw.randint(case.length // 2, case.length - 1) for _ in range(case.batch - 1))]
    examples = [Example([draw.randrange(5, 1000) for _ in range(n)], label=i % 8) for i, n in enumerate(lengths)]
    partial = store_folder / f"shard-{os.getpid()}"
    Shard.of(examples, case.task, 8).save(partial)
    content = ContentStore(store_folder).put_file(partial)
    partial.unlink()
    return content


def job_of(case: Case, store_folder: Path) -> Job:
    content = write_model(case, store_folder)
    kept = Submodel(tuple(Block(position, content["blocks"][position]) for position in range(case.keep)))
    return Job(
        id="case", run="benchmark", round=0, client=0, kind="train", method="lora",
        settings={"rank": case.rank, "targets": list(case.targets)}, config=content["config"],
        outside=content["outside"], submodel=kept, shard=write_shard(case, store_folder), work=case.work, steps=2,
        learning_rate=1e-3, seed=1,
    )  # fmt: skip


# ── the trainer's side ───────────────────────────────────────────────────────────────────────────────────────────────
class _Pipe:
    """Says each phase to the parent and waits until it has read the peaks, as a trainer does with its agent."""

    def phase(self, name: str) -> None:
        print(json.dumps({"phase": name}), flush=True)
        sys.stdin.readline()

    def progress(self, **_: Any) -> None: ...


def child(job_file: Path, store_folder: Path, threads: int) -> None:
    """Be the trainer of one job."""
    import torch

    import testbed.node.trainer as _trainer
    from methods.lora import Lora
    from testbed.model.held import HeldWeights
    from testbed.node.workplace import Workplace

    torch.set_num_threads(threads)
    _trainer.transformers.logging.set_verbosity_error()
    pipe = _Pipe()
    pipe.phase("load")
    job = Job.from_json(json.loads(job_file.read_text()))
    method = Lora(**{**job.settings, "targets": tuple(job.settings["targets"])})
    workplace = Workplace(job, store_folder, None, store_folder / "state", HeldWeights(), pipe)
    started = time.monotonic()
    method.work(workplace)
    seconds = time.monotonic() - started
    pipe.phase("send")
    print(json.dumps({"seconds": seconds}), flush=True)


# ── the agent's side ─────────────────────────────────────────────────────────────────────────────────────────────────
def measure(case: Case, folder: Path, cap_bytes: int | None = None, variables: dict[str, str] | None = None) -> Any:
    """Run a case in a fresh trainer; its phases as the agent would report them, or None when the kernel killed it."""
    import threading

    from testbed.node import limits
    from testbed.node.child import environment
    from testbed.node.memory import PhaseMeter

    job_file = folder / f"job-{os.getpid()}.json"
    job_file.write_text(json.dumps(job_of(case, folder).to_json()))
    command = [sys.executable, "-I", __file__, "--child", str(job_file), "--folder", str(folder)]
    with ExitStack() as cleanup:
        group = None
        if cap_bytes is not None:
            group = limits.create(f"footprint-{os.getpid()}", cap_bytes)
            cleanup.callback(group.remove)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if cap_bytes is None else subprocess.DEVNULL,
            text=True,
            env=environment({"threads": 1, "environment": variables or {}}),
            preexec_fn=(lambda: group.add(os.getpid())) if group is not None else None,  # noqa: PLW1509 -- one thread
        )
        cleanup.callback(process.kill)
        meter, phases, done = PhaseMeter(process.pid, None), [], threading.Event()
        lock = threading.Lock()

        def watch() -> None:
            while not done.wait(0.02):
                with lock:
                    meter.sample()

        threading.Thread(target=watch, daemon=True).start()
        cleanup.callback(done.set)
        seconds = None
        for line in process.stdout or ():
            said = json.loads(line)
            with lock:
                if meter.name:
                    phases.append(meter.end())
                if "seconds" in said:
                    seconds = said["seconds"]
                    break
                meter.begin(said["phase"])
            process.stdin.write("go\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        if seconds is None and cap_bytes is None:
            raise SystemExit(f"{case}: the trainer ended early\n{process.stderr.read()[-3000:]}")  # type: ignore[union-attr]
        process.wait()
        if seconds is None:
            return None
    return {"phases": phases, "seconds": seconds}


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
    """Least relative error of slack_bytes + slack x (bytes of the passes); the CUDA coefficients stay."""
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
            f"{case!s:66} {predicted / MIB:8.1f} {survived / MIB:8.1f} {killed / MIB:8.1f} {predicted / survived - 1:+7.1%}",
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
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.child, given.folder, threads=1)
        return
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


def cap_cases() -> tuple[Case, ...]:
    """Six of the cases: three models, both tasks, both types, with and without checkpointing."""
    resident = [case for case in held_out_cases() if case.holding == "resident" and case.model != "llama-1.1B"]
    return tuple(resident[:: len(resident) // 6][:6])


if __name__ == "__main__":
    main()
