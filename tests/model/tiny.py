"""Small random models of every architecture that is promised, saved as Hugging Face folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Block, Submodel, Workload
from testbed.model import blocks
from testbed.model.checkpoint import BaseModel, ContentStore
from testbed.model.submodel import Built, build

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

LABELS = 3
VOCABULARY = 50

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_LLAMA, "head_dim": 8}
_ALTERNATING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": False},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GEMMA, "sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    "phi": {**_LLAMA, "num_key_value_heads": 2},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "bert": _BERT,
    "roberta": {**_BERT, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 4,
        "n_heads": 2,
        "max_position_embeddings": 64,
    },
}
ENCODERS = ("bert", "roberta", "distilbert")
CASES = [(name, CAUSAL_LM) for name in CONFIGS if name not in ENCODERS]
CASES += [(name, SEQUENCE_CLASSIFICATION) for name in CONFIGS]


def make(architecture: str, task: str, **changes: Any) -> PreTrainedModel:
    """A random model whose every parameter differs from its default, so that none can be forgotten."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    family = {CAUSAL_LM: AutoModelForCausalLM, SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification}[task]
    plain = {**CONFIGS[architecture], **changes, "model_type": architecture}
    torch.manual_seed(1)
    model = family.from_config(blocks.configuration(plain, task, LABELS), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def open_base(folder: Path, task: str) -> BaseModel:
    return BaseModel.open(folder, ContentStore(folder.parent / "store"), task, LABELS)


def built_from(base: BaseModel, submodel: Submodel | None = None, seed: int = 5, **work: Any) -> Built:
    kept = base.fill_in(submodel or Submodel.first(len(base.shape)))
    workload = Workload(task=base.task, labels=base.labels, **work)
    return build(base.config, kept, base.store.path, base.outside, workload, seed=seed)


def batch(length: int = 11) -> dict[str, torch.Tensor]:
    """Three texts of different lengths, padded on the right with token 0."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (3, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, length - 4 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


class Identity(nn.Module):
    """A block that only passes the residual stream."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden


def skip_blocks(model: PreTrainedModel, kept: tuple[int, ...]) -> PreTrainedModel:
    """The original with every other block replaced by the identity."""
    anatomy = blocks.find(model)
    for position in range(len(anatomy.blocks)):
        if position not in kept:
            anatomy.blocks[position] = Identity()
    return model


def of(*positions: int) -> Submodel:
    return Submodel(tuple(Block(position) for position in positions))
