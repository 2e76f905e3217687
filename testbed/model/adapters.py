"""LoRA by PEFT's conventions, without PEFT (which costs a node 105 MiB): y = W x + alpha/rank · B A dropout(x).

Adapters are float32 whatever the base model computes in, as PEFT's `autocast_adapter_dtype` has them, and named as
there: "model.layers.7.self_attn.q_proj.lora_A.weight" (rank, inputs) and ".lora_B.weight" (outputs, rank).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.errors import UsageError
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Block, Outfit
from testbed.model import blocks, initial

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from testbed.method import Linear, ModelShape, Workload
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built


A, B = "A", "B"
BOTH = (A, B)
LORA = "lora"


@dataclass(frozen=True)
class LoraShape(Outfit):
    """LoRA factors A (rank × inputs) and B (outputs × rank) on linear maps of the kept blocks."""

    rank: int
    targets: tuple[str, ...]  # last component of the path of each adapted map: ("q_proj", "v_proj")
    positions: tuple[int, ...] | None = None  # None: on every block of the phase
    dropout: bool = False
    factors: tuple[str, ...] = BOTH  # which of them are trained; the others are mounted frozen
    name: str = LORA  # of the adapter: a map may carry several, each with a name of its own

    def trains(self, position: int) -> bool:
        return bool(self.factors) and (self.positions is None or position in self.positions)

    def mount(self, built: Built) -> None:
        mount_lora(built, self, 1.0, 0.1 if self.dropout else 0.0)

    def tensor(self, factor: str) -> str:
        """What follows the linear map's name in the name of a factor's tensor: "lora_A.weight"."""
        return f"{self.name}_{factor}.weight"


_TASK_TYPES = {CAUSAL_LM: "CAUSAL_LM", SEQUENCE_CLASSIFICATION: "SEQ_CLS"}

LORA_A = f"{LORA}_{A}.weight"
LORA_B = f"{LORA}_{B}.weight"


def mount_lora(built: Built, lora: LoraShape, alpha: float, dropout: float) -> tuple[str, ...]:
    """Mount trainable factors on the matching linear maps of the kept blocks; the canonical names of their tensors.

    A gets PEFT's initial values only by `Built.fill`; until then both factors are zero and the model is unchanged.
    Raises UsageError when no map of the model matches.
    """
    mounted = []
    for position, block in built.block_modules.items():
        if lora.positions is None or position in lora.positions:
            found = [(path, module) for path, module in block.named_modules() if blocks.is_linear(module)]
            for path, module in found:
                if adapts(lora, path):
                    _mount(module, lora, alpha / lora.rank, dropout)
                    mounted += [f"{built.prefix}.{position}.{path}.{lora.tensor(factor)}" for factor in BOTH]
    if not mounted:
        raise UsageError(f"no linear map of the kept blocks is called {' or '.join(lora.targets)}")
    return tuple(mounted)


def adapts(lora: LoraShape, path: str) -> bool:
    """Whether a linear map is adapted: its path in the block is, or ends with, one of the targets."""
    return any(path == target or path.endswith(f".{target}") for target in lora.targets)


def _mount(linear: nn.Module, lora: LoraShape, scale: float, dropout: float) -> None:
    inputs, outputs = blocks.sizes(linear)
    weight = next(linear.parameters())
    for factor, sizes in ((A, (inputs, lora.rank)), (B, (lora.rank, outputs))):
        mounted = zero_linear(*sizes, weight).requires_grad_(factor in lora.factors)
        linear.add_module(f"{lora.name}_{factor}", mounted)
    linear.add_module(f"{lora.name}_dropout", nn.Dropout(dropout) if dropout else nn.Identity())
    linear.register_forward_hook(_Adds(lora.name, scale))


def zero_linear(inputs: int, outputs: int, like: Tensor, *, bias: bool = False) -> nn.Linear:
    """A trainable linear map of zeros on the device of a base weight: float32, or float64 where the base has it."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta")
    linear.weight = nn.Parameter(torch.zeros(outputs, inputs, device=like.device, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.zeros(outputs, device=like.device, dtype=dtype))
    return linear


class _Adds:
    """The forward hook that adds the low-rank term to a linear map's output."""

    def __init__(self, name: str, scale: float) -> None:
        self.parts = (f"{name}_dropout", f"{name}_{A}", f"{name}_{B}")
        self.scale = scale

    def __call__(self, linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        dropout, a, b = (getattr(linear, part) for part in self.parts)
        added: Tensor = b(a(dropout(inputs[0].to(a.weight.dtype)))) * self.scale
        return (output + added).to(output.dtype)


def adapted(
    shape: ModelShape, lora: LoraShape, kept: Iterable[int | Block] | None = None
) -> Iterator[tuple[str, Linear]]:
    """Every adapted linear map with its canonical name, on the kept blocks (None: all), whole or by their parts."""
    for block in range(len(shape)) if kept is None else kept:
        whole = block if isinstance(block, Block) else Block(block)
        if lora.positions is None or whole.position in lora.positions:
            for linear in shape.blocks[whole.position]:
                if linear.part in whole.parts and adapts(lora, linear.path):
                    yield shape.linear_name(whole.position, linear), linear


def lora_tensors(shape: ModelShape, lora: LoraShape, seed: int) -> dict[str, Tensor]:
    """Initial factors by canonical name, float32: A as PEFT draws it (uniform within 1/√inputs), B zero."""
    tensors = {}
    for name, linear in adapted(shape, lora):
        a, b = (f"{name}.{lora.tensor(factor)}" for factor in BOTH)
        tensors[a] = initial.lora_a((lora.rank, linear.inputs), seed, a)
        tensors[b] = torch.zeros(linear.outputs, lora.rank)
    if not tensors:
        known = dict.fromkeys(linear.path for block in shape.blocks for linear in block)
        raise UsageError(f"no linear map is called {' or '.join(lora.targets)}: there are {', '.join(known)}")
    return tensors


def lora_elements(shape: ModelShape, lora: LoraShape, kept: Iterable[int | Block] | None = None) -> int:
    """Parameters of the factors on the kept blocks (positions, or blocks with their parts; None: all)."""
    return sum(lora.rank * (linear.inputs + linear.outputs) for _, linear in adapted(shape, lora, kept))


def names_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Linear maps that a set of LoRA tensors adapts."""
    return [name.removesuffix(f".{LORA_A}") for name in tensors if name.endswith(f".{LORA_A}")]


def export_peft(
    folder: Path,
    base: BaseModel,
    tensors: Mapping[str, Tensor],
    lora: LoraShape,
    alpha: float,
    dropout: float,
    work: Workload,
) -> None:
    """Write a PEFT folder: `PeftModel.from_pretrained(base, folder)` computes what the run's model does.

    `tensors` have canonical names; those outside the blocks are the new head, which travels in `modules_to_save`.
    """
    from safetensors.torch import save_file

    prefix = base.shape.block_prefix
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith((LORA_A, LORA_B))}
    head = {name: tensor for name, tensor in tensors.items() if blocks.place(prefix, name)[0] is None}
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(work.task, head),
        "base_model_name_or_path": str(base.folder),
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_pattern(names_of(factors)),
        "modules_to_save": _saved_modules(base.shape, head) or None,
        "fan_in_fan_out": _transposed(base),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stored = {f"base_model.model.{name}": tensor for name, tensor in {**factors, **head}.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _task_type(task: str, head: Mapping[str, Tensor]) -> str | None:
    """None for a classifier whose head came with the base: PEFT would look for a head of the adapter's own."""
    return _TASK_TYPES[task] if task == CAUSAL_LM or head else None


def _target_pattern(names: Iterable[str]) -> str:
    """A pattern that matches exactly these modules: PEFT's short names would also match likes outside the blocks."""
    return "|".join(re.escape(name) for name in names)


def _saved_modules(shape: ModelShape, head: Mapping[str, Tensor]) -> list[str]:
    """Modules of a new head: the model's own child for a classifier, the module itself inside the backbone (pooler)."""
    backbone = shape.block_prefix.split(".")[0]
    inside = {name.rpartition(".")[0] for name in head if name.startswith(f"{backbone}.")}
    beside = {name.split(".")[0] for name in head if not name.startswith(f"{backbone}.")}
    return sorted(inside | beside)


def _transposed(base: BaseModel) -> bool:
    """Whether the model's maps keep their weight transposed (Conv1D), which PEFT calls fan_in_fan_out."""
    model = blocks.skeleton(base.config, base.task, base.labels, "float32")
    maps = (module for module in blocks.find(model).blocks.modules() if blocks.is_linear(module))
    return any(blocks.transposed(module) for module in maps)
