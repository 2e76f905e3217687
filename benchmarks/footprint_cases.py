"""The jobs whose memory benchmarks/footprint.py predicts and measures: twelve to calibrate on, fifty that count."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Any

from testbed.method import Workload

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
    "llama-6.7B": llama(4096, 11008, 32, 32, 32000, tie_word_embeddings=False),
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
for _side in (32, 128, 224):
    MODELS[f"resnet18-{_side}"] = {
        "model_type": "resnet", "image_size": _side, "num_channels": 3, "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic", "hidden_act": "relu",
    }  # fmt: skip
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
    small = [name for name in MODELS if name not in ("llama-1.1B", "llama-6.7B") and not name.startswith("resnet")]
    blocks = {name: MODELS[name].get("num_hidden_layers") or MODELS[name].get("n_layer") or MODELS[name]["n_layers"]
              for name in small}  # fmt: skip
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


def cap_cases() -> tuple[Case, ...]:
    """Six of them, whose smallest surviving cap is looked for."""
    resident = [case for case in held_out_cases() if case.holding == "resident" and case.model != "llama-1.1B"]
    return tuple(resident[:: len(resident) // 6][:6])
