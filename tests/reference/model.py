"""A Llama sequence classifier in plain functional torch: what the references train.

Weights lie in one dict under Hugging Face's canonical names, in float64. What a method adds lies in the same dict and
is used where it is found: LoRA as "<projection>.lora_A.weight" (rank, in) and ".lora_B.weight" (out, rank), bottleneck
adapters as "model.layers.<i>.adapter.{down,up}.{weight,bias}". All texts of a batch have the same length: no padding.
Imports nothing of the code that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

HEAD_SIZE = 8  # hidden 32 in 4 heads; a width-sliced model keeps the size and has fewer heads
ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-6  # LlamaConfig's default
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD = "score.weight"

Weights = Mapping[str, Tensor]
Linear = Callable[[Tensor, Weights, str], Tensor]
"""(inputs (..., in), weights, the projection's name without ".weight") -> (..., out)."""


def with_lora(scale: float) -> Linear:
    """x Wᵀ + scale · (x Aᵀ) Bᵀ where A and B are there, x Wᵀ elsewhere; scale is alpha / rank."""

    def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
        plain = x @ weights[f"{name}.weight"].T
        if f"{name}.lora_A.weight" not in weights:
            return plain
        return plain + scale * (x @ weights[f"{name}.lora_A.weight"].T) @ weights[f"{name}.lora_B.weight"].T

    return linear


PLAIN = with_lora(1.0)  # for weights without LoRA


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) · gain over the last axis."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * gain


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: (batch, heads, length, head size), the halves of a head rotated against each other."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies[None, :]
    cosine, sine = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attention(x: Tensor, weights: Weights, prefix: str, linear: Linear) -> Tensor:
    """Causal attention in which each key-value head serves as many query heads in a row."""
    batch, length, _ = x.shape
    q, k, v = (
        linear(x, weights, f"{prefix}.self_attn.{name}").view(batch, length, -1, HEAD_SIZE).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    shared = q.shape[1] // k.shape[1]
    q, k, v = rotate(q), rotate(k).repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_SIZE)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
    return linear(mixed.transpose(1, 2).reshape(batch, length, -1), weights, f"{prefix}.self_attn.o_proj")


def feed_forward(x: Tensor, weights: Weights, prefix: str, linear: Linear) -> Tensor:
    """down(silu(gate x) · up x)."""
    gate = linear(x, weights, f"{prefix}.mlp.gate_proj")
    up = linear(x, weights, f"{prefix}.mlp.up_proj")
    return linear(gate * torch.sigmoid(gate) * up, weights, f"{prefix}.mlp.down_proj")


def adapter(hidden: Tensor, weights: Weights, prefix: str) -> Tensor:
    """Block `prefix`'s bottleneck adapter: h + up(gelu(down(h))) with the exact GELU."""
    down = hidden @ weights[f"{prefix}.adapter.down.weight"].T + weights[f"{prefix}.adapter.down.bias"]
    gelu = down * 0.5 * (1.0 + torch.erf(down / math.sqrt(2.0)))
    return hidden + gelu @ weights[f"{prefix}.adapter.up.weight"].T + weights[f"{prefix}.adapter.up.bias"]


def block(hidden: Tensor, weights: Weights, index: int, linear: Linear = PLAIN) -> Tensor:
    """One block, with its adapter behind it where it has one: (batch, length, hidden) -> the same."""
    prefix = f"model.layers.{index}"
    normed = rms_norm(hidden, weights[f"{prefix}.input_layernorm.weight"])
    hidden = hidden + attention(normed, weights, prefix, linear)
    normed = rms_norm(hidden, weights[f"{prefix}.post_attention_layernorm.weight"])
    hidden = hidden + feed_forward(normed, weights, prefix, linear)
    return adapter(hidden, weights, prefix) if f"{prefix}.adapter.down.weight" in weights else hidden


def hidden_states(weights: Weights, ids: Tensor, blocks: Sequence[int], linear: Linear = PLAIN) -> list[Tensor]:
    """The embedding's output and then each given block's, one after the other."""
    states = [weights["model.embed_tokens.weight"][ids]]
    for index in blocks:
        states.append(block(states[-1], weights, index, linear))
    return states


def head(hidden: Tensor, weights: Weights) -> Tensor:
    """The final norm and the score of the last token: (batch, length, hidden) -> (batch, classes)."""
    return rms_norm(hidden[:, -1], weights["model.norm.weight"]) @ weights[HEAD].T


def logits(weights: Weights, ids: Tensor, blocks: Sequence[int], linear: Linear = PLAIN) -> Tensor:
    """(batch, length) token ids through the given blocks -> (batch, classes)."""
    return head(hidden_states(weights, ids, blocks, linear)[-1], weights)


def depth(weights: Weights) -> int:
    """How many blocks the weights have."""
    return sum(name.endswith(".input_layernorm.weight") for name in weights)
