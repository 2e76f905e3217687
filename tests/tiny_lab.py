"""A lab small enough for tests: a random 4-block Llama with its tokenizer, a planted data set, two emulated devices."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(60)]
CLASSES = ("alpha", "beta", "gamma", "delta")
INVENTORY = """\
defaults: {kind: emulated, profile: raspberry_pi_5_4gb}
devices:
  large: {budget: {memory: "700 MiB"}, tags: [big]}
  small: {budget: {memory: "640 MiB"}}
"""


def make_lab(folder: Path, hidden_size: int = 32) -> Path:
    """Write model/, data.jsonl and lab.yaml; with 512, a block of the model has 16 MB."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=32
    )
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size if hidden_size == 32 else 4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = Random(0)
    rows = [_row(draw, CLASSES[index % len(CLASSES)]) for index in range(400)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lab.yaml").write_text(INVENTORY)
    return folder


def _row(draw: Random, label: str) -> dict[str, str]:
    own = WORDS[4 * CLASSES.index(label) : 4 * CLASSES.index(label) + 4]
    words = [draw.choice(own) if draw.random() < 0.35 else draw.choice(WORDS[20:]) for _ in range(14)]
    return {"body": " ".join(words), "kind": label}


def arguments(lab: Path, *more: str) -> list[str]:
    """`run-method` on this lab; seconds per run."""
    return [
        "--inventory", str(lab / "lab.yaml"), "--model", str(lab / "model"), "--data", str(lab / "data.jsonl"),
        "--data-set", "text=body", "--data-set", "label=kind", "--length", "16", "--rounds", "3", "--steps", "4",
        "--evaluate-every", "1", "--learning-rate", "0.02", "--runs", str(lab / "runs"), *more,
    ]  # fmt: skip
