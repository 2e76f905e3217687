"""Changes to a built submodel, for methods that look into it: leave a part out for a while, add to a weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.nn import ModuleList

from testbed.errors import ModelError, WireError
from testbed.method import ATTENTION
from testbed.model import blocks
from testbed.model.submodel import prune_part

if TYPE_CHECKING:
    from torch import Tensor, nn

    from testbed.model.submodel import Built


def post_norm(built: Built) -> bool:
    """Whether norms stand behind the residual sums (BERT), so that a part's output is the residual stream itself."""
    return not blocks.norm_follows(built.model, built.prefix)


def block_list(built: Built) -> ModuleList:
    """The kept blocks, in their order, as the model's forward walks them."""
    kept = built.model.get_submodule(built.prefix)
    if not isinstance(kept, ModuleList):
        raise ModelError(f"{built.prefix} is no list of blocks")
    return kept


def part_modules(built: Built, block: nn.Module) -> dict[str, nn.Module]:
    """The module of a block whose output is its attention's, and the one whose output is its feed-forward's.

    Where norms stand behind the sums, a part ends with its norm.
    """
    behind = post_norm(built)
    found = {}
    for part, names in blocks.part_names(block, post_norm=behind).items():
        steps = [name for name in names if behind or not blocks.is_norm(block.get_submodule(name))]
        found[part] = block.get_submodule(steps[-1])
    return found


@contextmanager
def without(built: Built, index: int, parts: Collection[str]) -> Iterator[None]:
    """Inside, these parts of the block at `index` (of the kept ones) are left out: only the residual stream passes.

    The modules stay where they are, with their weights (a streamed block goes on being filled and freed); only what
    they compute changes.
    """
    behind = post_norm(built)
    block = block_list(built)[index]
    changed = []
    for part, names in blocks.part_names(block, post_norm=behind).items():
        if part in parts:
            children = {name: block.get_submodule(name) for name in names}
            prune_part(block, names, attention=part == ATTENTION, post_norm=behind)
            for name, child in children.items():
                child.forward = block.get_submodule(name).forward
                setattr(block, name, child)
                changed.append(child)
    try:
        yield
    finally:
        for child in changed:
            del child.forward


def add_to_weight(built: Built, name: str, delta: Tensor) -> None:
    """Add to a base weight, by canonical name, in a copy of its own: weights that are held for other jobs stay.

    Raises WireError when there is no such weight or the shapes differ.
    """
    local = built.local(name)
    weight = dict(built.model.named_parameters()).get(local or "")
    if weight is None or weight.shape != delta.shape:
        found = "it is not there" if weight is None else f"its shape is {tuple(weight.shape)}"
        raise WireError(f"{tuple(delta.shape)} cannot be added to the weight {name}: {found}")
    weight.data = weight.data + delta.to(weight)
