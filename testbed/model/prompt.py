"""A soft prompt: trained vectors that stand in a text where the embeddings of its first tokens would.

The model's own forward runs on texts that are longer by as many placeholder tokens, whose embeddings are then replaced,
so that whatever it does with positions, masks and padding is done for the prompt too.  A model that reads the first
token (BERT's [CLS]) has the prompt behind that one; every other has it before the text, and a language model's
predictions for the prompt's own places are dropped: whoever calls the model sees the text's alone.

Float32 whatever the base model computes in (float64 where it has that), under the name "prompt.weight" (tokens, width
of the embedding).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Outfit
from testbed.model import blocks, initial

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from testbed.method import ModelShape, Workload
    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built

_Positional = tuple[Any, ...]
PROMPT = "prompt"
PROMPT_WEIGHT = f"{PROMPT}.weight"


@dataclass(frozen=True)
class PromptShape(Outfit):
    """A prompt of so many vectors, in texts that are as much longer."""

    tokens: int

    def mount(self, built: Built) -> None:
        mount_prompt(built, self.tokens)


def mount_prompt(built: Built, tokens: int) -> None:
    """Mount a prompt of zeros in the model's texts."""
    embedding: Any = built.model.get_input_embeddings()
    like = embedding.weight
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    prompt = _Prompt(tokens, first_place(built.model, built.work.task), placeholder=int(built.pad_token_id == 0))
    prompt.weight = nn.Parameter(torch.zeros(tokens, like.shape[1], dtype=dtype, device=like.device))
    built.model.add_module(PROMPT, prompt)
    built.model.register_forward_pre_hook(prompt.lengthened, with_kwargs=True)
    embedding.register_forward_hook(prompt.put)
    if built.work.task == CAUSAL_LM:
        built.model.register_forward_hook(prompt.dropped)


class _Prompt(nn.Module):
    """The vectors, and the hooks that put them into texts."""

    weight: nn.Parameter

    def __init__(self, tokens: int, first: int, placeholder: int) -> None:
        super().__init__()
        self.places = slice(first, first + tokens)
        self.placeholder = placeholder  # any token but the padding

    def lengthened(
        self, _: Any, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Placeholders in the model's input, of which its mask shows every one."""
        changed = dict(named)
        ids = inputs[0] if inputs else named["input_ids"]
        lengthened = self._with(ids, self.placeholder)
        if named.get("attention_mask") is not None:
            changed["attention_mask"] = self._with(named["attention_mask"], 1)
        if inputs:
            return (lengthened, *inputs[1:]), changed
        return inputs, {**changed, "input_ids": lengthened}

    def _with(self, rows: Tensor, value: int) -> Tensor:
        first = self.places.start
        added = rows.new_full((len(rows), self.places.stop - first), value)
        return torch.cat([rows[:, :first], added, rows[:, first:]], dim=1)

    def put(self, _: Any, __: Any, embedded: Tensor) -> Tensor:
        """The prompt in the placeholders' stead."""
        prompt = self.weight.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, : self.places.start], prompt, embedded[:, self.places.stop :]], dim=1)

    def dropped(self, _: Any, __: Any, output: Any) -> Any:
        """A language model's output without what it predicts in the prompt."""
        output.logits = output.logits[:, self.places.stop :]
        return output


def first_place(model: PreTrainedModel, task: str) -> int:
    """Where the prompt begins: behind the first token where that is what a classifier reads."""
    return int(task == SEQUENCE_CLASSIFICATION and blocks.bidirectional(model))


def longest_text(shape: ModelShape, work: Workload) -> int | None:
    """How many tokens the model has positions for, where its configuration says so."""
    config = blocks.configuration(shape.config, work.task, work.labels).get_text_config()
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is not None and config.model_type in {"roberta", "xlm-roberta", "camembert"}:
        return most - int(config.pad_token_id) - 1  # its positions are counted from behind the padding's
    return most


def prompt_tensors(base: BaseModel, tokens: int, seed: int, *, of_tokens: bool) -> dict[str, Tensor]:
    """An initial prompt, float32: the embeddings of random tokens, or random numbers as large as a new head's."""
    from safetensors import safe_open

    model = blocks.skeleton(base.config, base.task, base.labels, "float32")
    embedding: Any = model.get_input_embeddings()
    if not of_tokens:
        spread = base.config.get("initializer_range") or 0.02
        shape = (tokens, embedding.weight.shape[1])
        return {PROMPT_WEIGHT: initial.head(shape, spread, seed, PROMPT_WEIGHT)}
    name = next(name for name, module in model.named_modules() if module is embedding)
    draw = Random(f"{seed}/{PROMPT}").random
    rows = [int(draw() * len(embedding.weight)) for _ in range(tokens)]
    with safe_open(base.store.path(base.outside), "pt") as file:
        stored = file.get_slice(f"{name}.weight")
        return {PROMPT_WEIGHT: torch.cat([stored[row : row + 1] for row in rows]).float()}


def export_peft_prompt(folder: Path, base: BaseModel, prompt: Tensor) -> None:
    """Write a PEFT folder: `PeftModel.from_pretrained(base, folder)` predicts in a text what the run's model does.

    Of language models only: PEFT's classifiers read another place of a text with a prompt than models do without.
    """
    from safetensors.torch import save_file

    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder),
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
