"""FedPrompt: a few vectors before every text are trained, and nothing else but the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from methods._averaging import AveragingMethod
from methods._export import export_tensors
from testbed.errors import UsageError
from testbed.method import CAUSAL_LM, Client, ModelShape, Outfit, State, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.model.checkpoint import BaseModel
    from testbed.model.submodel import Built


@dataclass(frozen=True)
class FedPrompt(AveragingMethod):
    """Every client trains a soft prompt and the head on the frozen model; the server averages them, by examples.

    Paper: Zhao et al., "FedPrompt: Communication-Efficient and Privacy Preserving Prompt Tuning in Federated Learning"
    (ICASSP 2023, arXiv:2208.12268).  Evidence: background knowledge; the survey lists it among its prompt methods.

    Our reading: the prompt stands before the text, or behind the first token where that is what the model classifies
    by (BERT).  The classes are read from a new head where the checkpoint has none, not from words of the vocabulary.

    tokens    how many vectors; texts are longer by as many
    initial   their start: "tokens", the embeddings of random tokens; "uniform", random numbers as large as a new head's
    """

    family: ClassVar[str] = "prompts"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "prompt vectors, both ways"

    tokens: int = 20
    initial: Literal["tokens", "uniform"] = "tokens"

    # ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, shape: ModelShape, work: Workload) -> None:
        from testbed.model.prompt import longest_text

        super().check(shape, work)
        if self.tokens < 1:
            raise UsageError(f"setting tokens={self.tokens}: expected at least 1")
        longest = longest_text(shape, work)
        if longest is not None and work.length + self.tokens > longest:
            raise UsageError(
                f"setting tokens={self.tokens}: with texts of {work.length} tokens that is more than the {longest} "
                f"that this {shape.architecture} model has positions for; choose fewer, or shorter texts (--length)"
            )

    def outfit(self, shape: ModelShape) -> Outfit | None:
        from testbed.model.prompt import PromptShape

        return PromptShape(self.tokens)

    # ── server half ────────────────────────────────────────────────────────────────────────────────────────────────
    def start(self, base: BaseModel, work: Workload, clients: Sequence[Client], seed: int, rounds: int) -> State:
        from testbed.model.prompt import prompt_tensors

        prompt = prompt_tensors(base, self.tokens, seed, of_tokens=self.initial == "tokens")
        return State({**prompt, **base.new_head(seed)})

    def export(self, state: State, base: BaseModel, work: Workload, folder: Path) -> None:
        """Write a PEFT folder of a language model's prompt; of a classifier's, prompt.safetensors and prompt.json.

        The first has the prompt and the new head by canonical name, the second describes it: PEFT's own classifiers
        read another place of a text with a prompt.
        """
        from testbed.model import blocks
        from testbed.model.prompt import PROMPT_WEIGHT, export_peft_prompt, first_place

        if work.task == CAUSAL_LM:
            export_peft_prompt(folder, base, state.tensors[PROMPT_WEIGHT])
            return
        model = blocks.skeleton(base.config, work.task, work.labels, "float32")
        prompt = "its rows stand among the embeddings of the text's tokens, from place `first` on"
        export_tensors(folder, "prompt", state, base, work, first=first_place(model, work.task), prompt=prompt)

    # ── client half ────────────────────────────────────────────────────────────────────────────────────────────────
    def mount(self, built: Built, tensors: Mapping[str, Tensor]) -> None:
        from testbed.model.prompt import mount_prompt

        mount_prompt(built, self.tokens)
        built.fill(tensors)
