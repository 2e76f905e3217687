"""From what the command line asks to a question that a model can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from testbed.errors import UsageError
from testbed.evaluation import choices, classes, generation, harness, perplexity
from testbed.evaluation.generation import STOP, Rules
from testbed.evaluation.harness import Suites
from testbed.evaluation.items import PROMPT, Source, choices_of, questions_of
from testbed.evaluation.likelihood import first_token
from testbed.evaluation.record import Question
from testbed.evaluation.subject import Subject, context_of
from testbed.evaluation.texts import labelled_of, texts_of
from testbed.method import CAUSAL_LM, SEQUENCE_CLASSIFICATION

MULTIPLE_CHOICE, EXACT_MATCH, PERPLEXITY = "multiple_choice", "exact_match", "perplexity"
KINDS = (MULTIPLE_CHOICE, EXACT_MATCH, PERPLEXITY)
_SUITE = "suite"


@dataclass(frozen=True)
class Settings:
    """How it is computed, and what only some kinds have."""

    batch_size: int = 16
    length: int | None = None  # tokens at once; None: as many as the model takes
    stride: int | None = None
    new_tokens: int = 64
    stops: tuple[str, ...] | None = None  # None: the default of the kind of prompt
    extract: str | None = None
    ignore: tuple[str, ...] = ()
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: expected 1 or more")


def question_of(
    subject: Subject, kind: str | None, source: Source, settings: Settings, say: Callable[[str], None]
) -> Question:
    """What `--as KIND` asks on this data; raises UsageError for a kind that is not for the model."""
    subject.check_tokens(settings.length, settings.stride)
    if subject.task == SEQUENCE_CLASSIFICATION and kind in {None, MULTIPLE_CHOICE}:
        return _classes(subject, source, settings, say)
    if kind is None:
        raise UsageError(f"--as: say what the data are for: {', '.join(KINDS)}")
    subject.need(CAUSAL_LM, f"--as {kind}")
    made = {MULTIPLE_CHOICE: _choices, EXACT_MATCH: _exact_match, PERPLEXITY: _perplexity}
    return made[kind](subject, source, settings, say)


def suites_of(subject: Subject, suites: Suites, settings: Settings) -> Question:
    """What `--suite` asks."""
    subject.need(CAUSAL_LM, "--suite")
    subject.check_tokens(settings.length)
    harness.require()
    return Question(
        kind=_SUITE,
        data={"name": "-".join(suites.names)},
        definition={"words": harness.DEFINITION, "length": settings.length, **harness.versions_of(suites)},
        examine=lambda model: harness.examine(
            model, subject.tokenizer, suites, context_of(model, subject.tokenizer, settings.length), settings.batch_size
        ),
    )


_Say = Callable[[str], None]


def _choices(subject: Subject, source: Source, settings: Settings, say: _Say) -> Question:
    items, data = choices_of(source, say)
    return Question(
        MULTIPLE_CHOICE,
        data,
        _definition(choices.DEFINITION, settings, prompt=_prompt(source)),
        lambda model: choices.examine(
            model,
            subject.tokenizer,
            items,
            context_of(model, subject.tokenizer, settings.length),
            settings.batch_size,
            template=source.template,
        ),
        choices.guessing(items),
    )


def _exact_match(subject: Subject, source: Source, settings: Settings, say: _Say) -> Question:
    default = () if source.template else (STOP,)
    rules = Rules(
        settings.new_tokens,
        default if settings.stops is None else settings.stops,
        settings.extract,
        settings.ignore,
        settings.ignore_case,
    )
    items, data = questions_of(source, say)
    return Question(
        EXACT_MATCH,
        data,
        _definition(generation.DEFINITION, settings, prompt=_prompt(source), **asdict(rules)),
        lambda model: generation.examine(
            model,
            subject.tokenizer,
            items,
            context_of(model, subject.tokenizer, settings.length),
            settings.batch_size,
            rules,
        ),
    )


def _perplexity(subject: Subject, source: Source, settings: Settings, say: _Say) -> Question:
    if source.prompt is not None:
        raise UsageError(
            "--prompt: --as perplexity takes texts as they are; instruction data: --data-set template=alpaca"
        )
    first_token(subject.tokenizer)  # before anything is loaded
    texts, data = texts_of(source, subject.tokenizer, say)
    return Question(
        PERPLEXITY,
        data,
        _definition(perplexity.DEFINITION, settings, stride=settings.stride, counted=_counted(source)),
        lambda model: perplexity.examine(
            model,
            texts,
            context_of(model, subject.tokenizer, settings.length),
            settings.batch_size,
            settings.stride,
        ),
    )


def _classes(subject: Subject, source: Source, settings: Settings, say: _Say) -> Question:
    if source.prompt is not None or settings.length is not None:
        raise UsageError("--prompt and --length: a classifier reads texts as its run did")
    examples, data = labelled_of(source, subject.tokenizer, subject.classes, subject.length, say)
    return Question(
        MULTIPLE_CHOICE,
        data,
        {"words": classes.DEFINITION, "length": subject.length},
        lambda model: classes.examine(model, examples, len(subject.classes), subject.length, settings.batch_size),
        classes.majority(examples),
    )


def _definition(words: str, settings: Settings, **more: Any) -> Mapping[str, Any]:
    return {"words": words, "length": settings.length, **more}


def _prompt(source: Source) -> str:
    return f"template={source.words['template']}" if source.template else source.prompt or PROMPT


def _counted(source: Source) -> str:
    return "the response and what closes it" if source.template else "every token of the text"
