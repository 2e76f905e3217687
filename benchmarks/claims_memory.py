"""The papers' claims about a client's peak memory, measured again: one job of each kind, on random weights.

Every job runs as the method's server half orders it, in a fresh trainer of one thread; the figure is the measured
estimate of the phase in question.  *Net* leaves out what an empty trainer takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from method_footprints import results_of
from method_job import MethodCase

from testbed.method import IMAGE_CLASSIFICATION

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryClaim:
    """The jobs of a method against one of a baseline on the same model and workload."""

    claim: str
    paper: str
    cases: tuple[MethodCase, ...]  # the highest peak of these counts
    phase: str | None  # of this phase; None: of any
    against: MethodCase


@dataclass(frozen=True)
class Compared:
    """Measured peaks in bytes, with the runtime and without it."""

    claim: MemoryClaim
    peak: int
    baseline: int
    runtime: int

    @property
    def ratio(self) -> float:
        return self.baseline / self.peak

    @property
    def net_ratio(self) -> float:
        return (self.baseline - self.runtime) / (self.peak - self.runtime)


def claims(models: tuple[str, ...]) -> Iterator[MemoryClaim]:
    """Those on the named models: llama-6.7B (LLaMA2-7B's shape), llama-1.1B, bert-110M, resnet18-SIDE."""
    for model in models:
        yield from _of_images(model) if model.startswith("resnet") else _of_texts(model)


def _of_images(model: str) -> Iterator[MemoryClaim]:
    """A batch of 64, as the paper has it; the baseline trains the whole network.

    The stem divides each side by four: at 128 pixels the feature maps are those of a network made for 32.
    """
    whole = MethodCase("heterofl", model, batch=64, task=IMAGE_CLASSIFICATION)
    stages = 4
    yield MemoryClaim(
        "ScaleFL in its largest stage, against the whole network",
        "up to −50.4 %",
        tuple(replace(whole, method="scalefl", round=stage, rounds=stages) for stage in range(stages)),
        None,
        whole,
    )


def _of_texts(model: str) -> Iterator[MemoryClaim]:
    """Batches are small, so that weights weigh as in the papers."""
    decoder = model.startswith("llama")
    kind = {"dtype": "bfloat16", "stored": "bfloat16"} if decoder else {}
    size = {"batch": 1, "length": 64} if decoder else {"batch": 8, "length": 128}
    plain = MethodCase("lora", model, {"rank": 16}, **size, **kind)  # type: ignore[arg-type]  # plain keywords
    blocks = {"llama-6.7B": 32, "llama-1.1B": 22, "bert-110M": 12}[model]
    yield MemoryClaim(
        "FedPruner with a quarter of the blocks, against LoRA",
        "−75 % (4×)",
        (replace(plain, method="fedpruner", keep=round(blocks / 4)),),
        "train",
        plain,
    )
    yield MemoryClaim(
        "DevFT in its first stage, against LoRA",
        "4×",
        (replace(plain, method="devft", settings={"rank": 16, "stages": 4}, rounds=4),),
        "stage 1",
        plain,
    )
    full = replace(plain, method="full_adapters", settings={})
    for window, paper in _windows(model):
        settings = {"window": window, "window_by": "fixed", "threshold": 1.0}
        yield MemoryClaim(
            f"ChainFed with a window of {window}, against Full Adapters",
            paper,
            (replace(plain, method="chainfed", settings=settings, state={"turn": blocks - window}),),
            "last window",
            full,
        )


def _windows(model: str) -> list[tuple[int, str]]:
    if model == "llama-6.7B":
        return [(2, "–"), (8, "3.23×")]
    bert = [(2, "12.8×"), (3, "7.2×"), (4, "5.0×"), (5, "3.8×"), (6, "3.1×")]
    return bert if model == "bert-110M" else [(window, "–") for window in (2, 4, 6)]


def compare(claim: MemoryClaim, folder: Path, runtime: int) -> Compared:
    """The two peaks of a claim, measured now or before."""
    peaks = [
        peak["estimate_bytes"]
        for case in claim.cases
        for phase, peak in results_of(case, folder).items()
        if claim.phase in (None, phase)
    ]
    baseline = results_of(claim.against, folder)["train"]["estimate_bytes"]
    return Compared(claim, max(peaks), baseline, runtime)


def row(found: Compared) -> tuple[str, str, str, str]:
    """Claim, paper's figure, ours, conditions."""
    case = found.claim.against
    ours = (
        f"{found.ratio:.2f}× ({_percent(found.ratio)}); net of the runtime {found.net_ratio:.2f}× "
        f"({_percent(found.net_ratio)}): {found.baseline / GIB:.2f} → {found.peak / GIB:.2f} GiB"
    )
    images = case.task == IMAGE_CLASSIFICATION
    batch = f"batch {case.batch}" + ("" if images else f" of {case.length} tokens")
    return found.claim.claim, found.claim.paper, ours, f"{case.model}, {case.dtype}, {batch}"


def _percent(ratio: float) -> str:
    return f"{1 / ratio - 1:+.0%}".replace("-", "−")
