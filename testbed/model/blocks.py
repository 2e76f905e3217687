"""Find embeddings, blocks, final norm and head of a model by its structure; sizes without weights.

The blocks of a transformer are its layers, those of a convolutional network its stages, which differ in shape.
Everything here works on a skeleton: the Hugging Face model on the meta device, which allocates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from testbed.errors import ModelError
from testbed.method import (
    ATTENTION,
    CAUSAL_LM,
    FEED_FORWARD,
    IMAGE_CLASSIFICATION,
    PARTS,
    SEQUENCE_CLASSIFICATION,
    Linear,
    ModelShape,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

#: float64 is for comparisons with another implementation.
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


_PIXELS = "pixel_values"


@dataclass(frozen=True)
class Anatomy:
    """Where the blocks of a model are."""

    prefix: str  # name of the block list: "model.layers"
    blocks: nn.ModuleList
    post_norm: (
        bool  # the norms stand behind the residual sums (BERT), not before the parts (Llama); of stages, no matter
    )


def configuration(config: Mapping[str, Any] | PreTrainedConfig, task: str, labels: int) -> PreTrainedConfig:
    """A Hugging Face configuration for the task, ready to build from; the input stays as it is.

    Raises ModelError for an unknown model type and for quantised checkpoints.
    """
    from transformers import AutoConfig

    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if plain.get("quantization_config"):
        raise ModelError("the checkpoint is quantised (quantization_config): use the float32 or bfloat16 original")
    model_type = plain.pop("model_type", None)
    if task != CAUSAL_LM:
        names = {str(index): f"LABEL_{index}" for index in range(labels)}
        plain |= {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
        plain.pop("num_labels", None)
    try:
        made = AutoConfig.for_model(model_type, **plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"model type {model_type!r} cannot be configured: {error}") from error
    made.use_cache = False
    if getattr(made, "pad_token_id", None) is None:  # sequence classifiers refuse batches without one
        made.pad_token_id = _first_token(getattr(made, "eos_token_id", None))
    return made


def _first_token(token: int | list[int] | None) -> int:
    if isinstance(token, list):
        token = token[0] if token else None
    return token or 0


def skeleton(config: Mapping[str, Any] | PreTrainedConfig, task: str, labels: int, dtype: str) -> PreTrainedModel:
    """The model for the task on the meta device.

    Raises ModelError where there is no such model, and for types other than those of COMPUTE_DTYPES.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

    if dtype not in COMPUTE_DTYPES:
        raise ModelError(f"a model computes in {' or '.join(COMPUTE_DTYPES)}, not in {dtype!r}")
    family = {
        CAUSAL_LM: AutoModelForCausalLM,
        SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
        IMAGE_CLASSIFICATION: AutoModelForImageClassification,
    }[task]
    made = configuration(config, task, labels)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = family.from_config(made, dtype=COMPUTE_DTYPES[dtype])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        none = "Unrecognized configuration class" in str(error)  # a list of every class that there is follows
        reason = "transformers has none; choose another model or task" if none else str(error)
        raise ModelError(f"no {task} model for type {made.model_type!r}: {reason}") from error
    if task == CAUSAL_LM and bidirectional(model):
        raise ModelError(f"a {made.model_type!r} model sees the tokens it should predict: use it as a classifier")
    return model


def bidirectional(model: nn.Module) -> bool:
    """Whether a token sees those behind it too: such a model classifies a text by its first token."""
    stated = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(stated) and not any(stated)


def find(model: PreTrainedModel) -> Anatomy:
    """Where the blocks are: the longest list of like modules with attention, outside any other such list.

    An image model without attention has stages: its longest list of like modules.
    Raises ModelError where there is none, or more than one.
    """
    lists = [(name, module) for name, module in model.named_modules() if _is_list_of_likes(module)]
    found = [(name, module) for name, module in lists if _attention_names(module[0])]
    if not found and model.main_input_name == _PIXELS:
        found = lists
    outer = [(name, blocks) for name, blocks in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    longest = max((len(blocks) for _, blocks in outer), default=0)
    best = [(name, blocks) for name, blocks in outer if len(blocks) == longest]
    if len(best) != 1:
        names = ", ".join(name for name, _ in best) or "none"
        raise ModelError(f"{type(model).__name__}: one list of transformer blocks is needed, found {names}")
    prefix, blocks = best[0]
    return Anatomy(prefix, blocks, post_norm=not norm_follows(model, prefix))


def _is_list_of_likes(module: nn.Module) -> TypeGuard[nn.ModuleList]:
    return isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1


def norm_follows(model: PreTrainedModel, prefix: str) -> bool:
    """Whether a final norm stands beside the block list: then every block leaves its residual sum un-normed."""
    parent = model.get_submodule(prefix.rpartition(".")[0])
    return any(is_norm(child) for child in parent.children())


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def is_linear(module: nn.Module) -> bool:
    """Torch's Linear, and GPT-2's Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def transposed(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return int(linear.nx), int(linear.nf)  # type: ignore[arg-type]  # Conv1D's plain integers


def _attention_names(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in block.named_children() if "attention" in type(child).__name__.lower())


def part_names(block: nn.Module, *, post_norm: bool) -> dict[str, tuple[str, ...]]:
    """Children of a block that make up its attention and its feed-forward part; none of a stage without attention.

    With norms behind the residual sums, a norm that stands on its own behind a part belongs to that part.
    Raises ModelError where the two cannot be told apart.
    """
    attention = _attention_names(block)
    if not attention:
        return {}
    forward = tuple(
        name
        for name, child in block.named_children()
        if name not in attention and any(parameter.dim() > 1 for parameter in child.parameters())
    )
    if len(attention) != 1 or not forward:
        raise ModelError(f"{type(block).__name__}: one attention and one feed-forward part are needed in a block")
    parts = {ATTENTION: attention, FEED_FORWARD: forward}
    return _with_norms(block, parts) if post_norm else parts


def _with_norms(block: nn.Module, parts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    owner = ATTENTION
    grown = {part: list(names) for part, names in parts.items()}
    for name, child in block.named_children():
        owner = next((part for part, names in parts.items() if name in names), owner)
        if is_norm(child):
            grown[owner].append(name)
    return {part: tuple(names) for part, names in grown.items()}


def linears(block: nn.Module, *, post_norm: bool) -> tuple[Linear, ...]:
    """The linear maps of a block, in the order of its modules; none of a block whose parts cannot be told apart."""
    parts = part_names(block, post_norm=post_norm)
    if not parts:
        return ()
    owner = {name: part for part in PARTS for name in parts[part]}
    return tuple(
        Linear(path, *sizes(module), owner[path.split(".")[0]])
        for path, module in block.named_modules()
        if is_linear(module)
    )


def place(prefix: str, name: str) -> tuple[int | None, str]:
    """The position of the block that a canonical name lies in and the name inside it; (None, name) outside."""
    if not name.startswith(f"{prefix}."):
        return None, name
    position, _, rest = name[len(prefix) + 1 :].partition(".")
    return (int(position), rest) if position.isdecimal() else (None, name)


def head_names(model: PreTrainedModel, anatomy: Anatomy, task: str) -> set[str]:
    """Parameters behind the blocks that a checkpoint of the bare model lacks: pooler and classifier, not final norms.

    Empty for a model whose output layer belongs to the pretrained model itself (a causal LM).
    """
    if task == CAUSAL_LM:
        return set()
    modules = list(model.named_modules())
    last = max(index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{anatomy.prefix}."))
    backbone = anatomy.prefix.rpartition(".")[0]
    beside = model.get_submodule(backbone).named_children()
    final_norms = {f"{backbone}.{name}" for name, child in beside if is_norm(child)}
    return {
        f"{name}.{own}"
        for name, module in modules[last + 1 :]
        if name not in final_norms
        for own, _ in module.named_parameters(recurse=False)
    }


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes.

    Raises ModelError where its configuration does not say their size (a convolutional network's need not).
    """
    size = getattr(config, "image_size", None)
    if size is None:
        raise ModelError(
            f"the {config.model_type!r} model does not say what size of images it takes: put image_size into its "
            'config.json ("image_size": 32)'
        )
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds (a batch norm's statistics), by name; others the configuration gives."""
    stored = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def fill_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into stored buffers, by name: training writes to them, and what was read may be held for others."""
    own = stored_buffers(module)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def elements(module: nn.Module) -> int:
    """Parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def describe(
    config: Mapping[str, Any] | PreTrainedConfig, task: str, labels: int, stored_dtype: str = "float32"
) -> ModelShape:
    """Structure and sizes of a model, from its configuration alone; allocates no weights.

    Without a checkpoint at hand all that stands behind the blocks of a classifier counts as its new head.
    Raises ModelError where the structure cannot be found.
    """
    model = skeleton(config, task, labels, "float32")
    plain = config if isinstance(config, Mapping) else config.to_dict()
    return shape_of(model, plain, stored_dtype, head_names(model, find(model), task))


def shape_of(model: PreTrainedModel, config: Mapping[str, Any], stored_dtype: str, head: Iterable[str]) -> ModelShape:
    """The same, from a skeleton that is there already and the names of the new head's parameters."""
    anatomy = find(model)
    parts = [part_names(block, post_norm=anatomy.post_norm) for block in anatomy.blocks]
    own = model.config.get_text_config()
    return ModelShape(
        architecture=model.config.model_type,
        config=config,
        hidden=own.hidden_sizes[-1] if hasattr(own, "hidden_sizes") else own.hidden_size,
        vocabulary=0 if model.main_input_name == _PIXELS else own.vocab_size,
        block_prefix=anatomy.prefix,
        blocks=tuple(linears(block, post_norm=anatomy.post_norm) for block in anatomy.blocks),
        block_elements=tuple(elements(block) for block in anatomy.blocks),
        part_elements=tuple(
            {part: sum(elements(block.get_submodule(name)) for name in names) for part, names in found.items()}
            for block, found in zip(anatomy.blocks, parts, strict=True)
        ),
        outside_elements=elements(model) - elements(anatomy.blocks),
        head_elements=sum(model.get_parameter(name).numel() for name in head),
        stored_dtype=stored_dtype,
    )
