r"""Exact match: the answer is generated greedily and compared as text.

Generation ends at the model's end-of-text token, before a stop text, or after so many new tokens.  Then, of the
generated text and of every right answer alike:

    1. extract   the first match of the regular expression, its first group where it has groups; a generated text
                 without a match is wrong, an answer without one stays as it is
    2. ignore    what these regular expressions match is removed
    3. case      folded, where that is asked
    4. blanks    at both ends are removed

and the figure is the share of the questions whose text is one of the answers.  The stop text before which
lm-evaluation-harness ends by default is the default here too; its `exact_match` does not strip, but its filters do.
Source: EleutherAI/lm-evaluation-harness (0.4.13), `HFLM.generate_until` in lm_eval/models/huggingface.py and
`exact_match_hf_evaluate` in lm_eval/api/metrics.py; GSM8K's pattern is "#### (\-?[0-9\.\,]+)" in its gsm8k.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import UsageError
from testbed.evaluation.figures import Outcome, Scores
from testbed.evaluation.items import Asked
from testbed.evaluation.likelihood import prompt_tokens
from testbed.model.prompt import PROMPT
from testbed.task import Batch, logits

EXACT_MATCH = "exact_match"
#: As the harness has it, where a task does not say; none behind a template.
STOP = "\n\n"
DEFINITION = (
    "the share of the questions whose greedily generated text, after extraction, removal of what is ignored, case "
    "folding where it was asked, and stripping, is one of the answers"
)


@dataclass(frozen=True)
class Generated:
    """What a model went on with; `cut`: it would have gone on further."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Rules:
    """When a generation ends, and what is compared of it."""

    new_tokens: int = 64
    stops: tuple[str, ...] = (STOP,)
    extract: str | None = None
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.new_tokens}: expected 1 or more")
        for option, pattern in (("--extract", self.extract), *(("--ignore", each) for each in self.ignore)):
            _check_pattern(option, pattern or "")

    def compared(self, text: str) -> str:
        """The text as it is compared."""
        for pattern in self.ignore:
            text = re.sub(pattern, "", text)
        return (text.casefold() if self.ignore_case else text).strip()

    def extracted(self, text: str) -> str | None:
        """What the pattern finds; None without a match."""
        if self.extract is None:
            return text
        found = re.search(self.extract, text)
        if found is None:
            return None
        return next((group for group in found.groups() if group is not None), found[0])


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern!r}: not a regular expression ({error})") from None


def examine(model: Any, tokenizer: Any, items: Sequence[Asked], most: int, batch_size: int, rules: Rules) -> Outcome:
    """How often the model generates the answer; UsageError where so many new tokens leave no room for a prompt."""
    room = most - rules.new_tokens
    if room < 1:
        raise UsageError(f"--max-new-tokens {rules.new_tokens}: this model takes {most} tokens, the prompt among them")
    prompts = [prompt_tokens(tokenizer, item.prompt) for item in items]
    made = generate(model, tokenizer, [prompt[-room:] for prompt in prompts], rules, batch_size)
    found = [rules.extracted(each.text) for each in made]
    scores = [float(_matches(rules, text, item)) for text, item in zip(found, items, strict=True)]
    notes = {
        "prompts_cut_from_the_left": sum(len(prompt) > room for prompt in prompts),
        "without_a_match_of_extract": found.count(None),
        "ended_by_max_new_tokens": sum(each.cut for each in made),
    }
    return Outcome.of({EXACT_MATCH: Scores(scores)}, notes)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], rules: Rules, batch_size: int
) -> list[Generated]:
    """What the model goes on with behind each prompt, greedily."""
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    with torch.no_grad():
        cached = keeps_cache(model, prompts[order[-1]])
        size = batch_size if cached else 1
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            chosen = [prompts[index] for index in indices]
            rows = (
                _cached(model, tokenizer, chosen, rules) if cached else [_uncached(model, tokenizer, chosen[0], rules)]
            )
            found.update(zip(indices, rows, strict=True))
    return [_generated(tokenizer, found[index], rules) for index in range(len(prompts))]


def _generated(tokenizer: Any, tokens: list[int], rules: Rules) -> Generated:
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    cut = len(tokens) >= rules.new_tokens and not _stopped(tokenizer, tokens, rules)
    return Generated(_before_stop(whole, rules.stops), cut)


def keeps_cache(model: Any, prompt: Sequence[int]) -> bool:
    """Whether keys and values of earlier tokens can be kept: a soft prompt is put before every text anew.

    Tried on a prompt: the last token's logits must be those of the whole prompt at once.
    """
    import torch

    if getattr(model, PROMPT, None) is not None or len(prompt) < 2:
        return False
    ids = torch.tensor([list(prompt)], device=model.device)
    whole = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    first = model(input_ids=ids[:, :-1], use_cache=True)
    if first.past_key_values is None:
        return False
    step = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1].float()
    near = 1e-3 if model.dtype == torch.float32 else 3e-2  # of the largest logit; another order of the same sums
    return bool((whole - step).abs().max() <= near * whole.abs().max())


def _cached(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], rules: Rules) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the left, so that all go on in the same column
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    ends = _ends(model, tokenizer)
    how = GenerationConfig(
        max_new_tokens=rules.new_tokens, do_sample=False, num_beams=1, use_cache=True, eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip

    def stopped(found: Any, *_: Any, **__: Any) -> Any:
        return torch.tensor([_stopped(tokenizer, row[width:], rules) for row in found], device=found.device)

    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=how,
        stopping_criteria=StoppingCriteriaList([stopped]),
    )
    return [_until_end(row[width:].tolist(), ends) for row in made]


def _uncached(model: Any, tokenizer: Any, prompt: Sequence[int], rules: Rules) -> list[int]:
    import torch

    ends = _ends(model, tokenizer)
    found: list[int] = []
    while len(found) < rules.new_tokens and not _stopped(tokenizer, found, rules):
        ids = torch.tensor([[*prompt, *found]], device=model.device)
        token = int(logits(model, Batch(ids, None, ids[:, 0]))[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
    return found


def _ends(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.config.get_text_config(), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _stopped(tokenizer: Any, tokens: Any, rules: Rules) -> bool:
    return bool(rules.stops) and any(stop in tokenizer.decode(tokens) for stop in rules.stops)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _matches(rules: Rules, text: str | None, item: Asked) -> bool:
    if text is None:
        return False
    right = [rules.compared(answer if (found := rules.extracted(answer)) is None else found) for answer in item.answers]
    return rules.compared(text) in right
