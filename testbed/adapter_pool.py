"""Pools of ready LoRA adapters: find one, and check it against a model.

A pool is a folder of PEFT adapter folders, each with adapter_config.json and adapter_model.safetensors.  They are read
here in a few lines, without PEFT: of every adapted linear map A, B and the scale; heads in `modules_to_save` are passed
over.  Whatever would make an adapter compute something else than W x + scale · B A x is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import ModelError, UsageError
from testbed.method import RESIDENT, ModelShape
from testbed.package_data import PACKAGE

if TYPE_CHECKING:
    from torch import Tensor

QUICKSTART = "quickstart"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
#: Settings of PEFT's LoRA that, where they are set, change what an adapter computes.
_CHANGES = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alpha_pattern", "layer_replication", "arrow_config",
    "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
)  # fmt: skip
#: Ways of initialising that leave the base model's weights alone.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: for every map that it adapts, by canonical name, its rank and its scale (alpha / rank)."""

    folder: Path
    ranks: Mapping[str, int]
    scales: Mapping[str, float]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (rank, inputs) and B (outputs, rank), the scale in B, float32."""
        import torch

        from testbed.model.tensorfile import read_tensors

        read = read_tensors(self.folder / WEIGHTS, RESIDENT, torch.float32)
        return {
            name: (read[f"{_PREFIX}{name}{_A}"], read[f"{_PREFIX}{name}{_B}"] * self.scales[name])
            for name in self.ranks
        }


@dataclass(frozen=True)
class Pool:
    """Adapters of one base model, in the order in which their ranks become experts."""

    adapters: tuple[Adapter, ...]

    def sizes(self) -> dict[str, int]:
        """The number of rank-one experts of every adapted map, by name."""
        names = sorted({name for adapter in self.adapters for name in adapter.ranks})
        return {name: sum(adapter.ranks.get(name, 0) for adapter in self.adapters) for name in names}

    def experts(self) -> dict[str, Tensor]:
        """Of every adapted map: "<map>.experts_A" (experts, inputs) and "<map>.experts_B" (outputs, experts)."""
        import torch

        from testbed.model.experts import EXPERTS_A, EXPERTS_B

        every = [adapter.factors() for adapter in self.adapters]
        experts = {}
        for name in self.sizes():
            pairs = [factors[name] for factors in every if name in factors]
            experts[f"{name}.{EXPERTS_A}"] = torch.cat([down for down, _ in pairs])
            experts[f"{name}.{EXPERTS_B}"] = torch.cat([up for _, up in pairs], dim=1)
        return experts


def find_pool(pool: str, shape: ModelShape) -> Pool:
    """The adapters of a pool, checked against a model; of their weights only the headers are read.

    `pool`: "quickstart", a folder of adapters, an adapter, or several of these with commas between them.
    Raises UsageError for a folder that is missing or holds no adapter, and for an adapter that is not of this model
    or computes something else than plain LoRA.
    """
    folders = [folder for word in pool.split(",") if word.strip() for folder in _adapter_folders(word.strip())]
    if not folders:
        raise UsageError(f"setting pool={pool!r}: expected the folder of a pool of LoRA adapters")
    return Pool(tuple(_adapter(folder, shape) for folder in folders))


def _adapter_folders(word: str) -> list[Path]:
    folder = PACKAGE / "quickstart" / "adapters" if word == QUICKSTART else Path(word).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"setting pool={word}: there is no folder {folder}; give a folder of PEFT LoRA adapters, or make one with: "
            "testbed make-adapters"
        )
    if (folder / CONFIG).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("."))
    if not found:
        raise UsageError(f"setting pool={word}: neither {folder} nor a folder in it has an {CONFIG}: no PEFT adapter")
    return found


def _adapter(folder: Path, shape: ModelShape) -> Adapter:
    config = _read_config(folder)
    ranks = _checked_ranks(folder, shape)
    rank_of_scale = {name: math.sqrt(rank) if config.get("use_rslora") else rank for name, rank in ranks.items()}
    return Adapter(folder, ranks, {name: config["lora_alpha"] / rank for name, rank in rank_of_scale.items()})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): download or make the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or not isinstance(config.get("lora_alpha"), int | float):
        raise UsageError(f"{path}: expected a LoRA adapter with its lora_alpha, got peft_type {kind!r}")
    changed = [name for name in _CHANGES if config.get(name)]
    changed += ["bias"] if config.get("bias", "none") != "none" else []
    changed += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_INITS else []
    if changed:
        raise UsageError(
            f"{path}: {changed[0]} is {config[changed[0]]!r}: only plain LoRA can be cut into rank-one experts; "
            "leave this adapter out of the pool"
        )
    return dict(config)


def _checked_ranks(folder: Path, shape: ModelShape) -> dict[str, int]:
    """The rank on every adapted map, each of which the model must have, with these sizes."""
    from testbed.model.tensorfile import entries

    path = folder / WEIGHTS
    try:
        stored = {name.removeprefix(_PREFIX): entry.shape for name, entry in entries(path).items()}
    except ModelError as error:
        raise UsageError(str(error)) from None
    linears = {shape.linear_name(at, linear): linear for at, block in enumerate(shape.blocks) for linear in block}
    ranks = {}
    for name in sorted({_map_of(path, stored_name) for stored_name in stored if ".lora_" in stored_name}):
        down, up, linear = stored.get(f"{name}{_A}", ()), stored.get(f"{name}{_B}", ()), linears.get(name)
        if linear is None:
            raise _of_another_model(path, shape, f"it adapts {name}, which is no linear map of this model's blocks")
        if len(down) != 2 or len(up) != 2 or down[1] != linear.inputs or up != (linear.outputs, down[0]):
            expected = f"A (rank, {linear.inputs}) and B ({linear.outputs}, rank)"
            raise _of_another_model(path, shape, f"on {name} it has A {down} and B {up}, expected {expected}")
        ranks[name] = down[0]
    if not ranks:
        raise UsageError(f"{path} has no LoRA factors: it is no LoRA adapter")
    return ranks


def _map_of(path: Path, name: str) -> str:
    for suffix in (_A, _B):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    raise UsageError(f"{path}: {name} is neither {_A[1:]} nor {_B[1:]}: only plain LoRA on linear maps can be used")


def _of_another_model(path: Path, shape: ModelShape, what: str) -> UsageError:
    return UsageError(
        f"{path} is not an adapter of this model ({shape.architecture}, {len(shape)} blocks of hidden size "
        f"{shape.hidden}): {what}; make a pool for it with `testbed make-adapters --model DIR --output POOL` and say "
        "--set pool=POOL"
    )
