"""Streamed blocks: a frozen block's weights are in memory only while the block computes.

Hooks fill and free each block inside the model's own forward; the next one may be read meanwhile, by a thread.  With
gradient checkpointing the recomputation in the backward pass fills the block once more; what its backward needs is then
held by autograd until it has run.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from testbed.errors import UsageError
from testbed.method import RESIDENT
from testbed.model.tensorfile import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor


class StreamedBlock:
    """Context: the frozen weights of one block are there inside it, and gone after it; nests.

    Every filling makes new parameters, because autograd keeps frozen ones by reference until their backward has run.
    """

    def __init__(self, block: nn.Module, path: Path, dtype: torch.dtype, device: str) -> None:
        self.block = block
        self.path = path
        self.dtype = dtype
        self.device = device
        #: What stands in for each weight between two computations, by its name in the file.
        self.empty = {name: _placeholder(like, dtype, device) for name, like in block.named_parameters()}
        self.checkpointing = False
        self._depth = 0
        self._next: StreamedBlock | None = None
        self._reading: Future[dict[str, Tensor]] | None = None
        self._put(self.empty)
        self._handles = [
            block.register_forward_pre_hook(self._before, with_kwargs=True),
            block.register_forward_hook(self._after, always_call=True),
        ]

    def read_ahead(self, following: StreamedBlock) -> None:
        """Read the weights of `following` while this block computes: two blocks are in memory then."""
        self._next = following

    def enable_checkpointing(self) -> None:
        """Recompute this block in the backward pass, filling it again; to be called after the model's own enabling."""
        self.checkpointing = True
        self.block._gradient_checkpointing_func = self._checkpoint  # type: ignore[assignment]  # noqa: SLF001 -- the seam

    def detach(self) -> None:
        """Stop streaming: the weights stay where they are put next."""
        for handle in self._handles:
            handle.remove()
        self._reading = None
        if self.checkpointing:
            self.block._gradient_checkpointing_func = _recomputed  # type: ignore[assignment]  # noqa: SLF001 -- the seam

    def _checkpoint(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        return _recomputed(partial(self._computed, compute), *inputs)

    def _computed(self, compute: Callable[..., Any], *inputs: Any) -> Any:
        with self:
            return compute(*inputs)

    def _before(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not (self.checkpointing and self.block.training):
            self._refuse_backward([*inputs, *named.values(), *self.block.parameters()])
        self.__enter__()

    def _after(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def _refuse_backward(self, values: list[Any]) -> None:
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
            raise UsageError(
                "streamed blocks cannot be trained through without gradient checkpointing: autograd would keep every"
                " block that was streamed; turn checkpointing on, hold the weights resident, or use torch.no_grad()"
            )

    def __enter__(self) -> None:
        if not self._depth:
            read, self._reading = self._reading.result() if self._reading else self._read(), None
            self._put({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in read.items()})
            if self._next is not None:
                self._next.fetch()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._put(self.empty)

    def fetch(self) -> None:
        """Begin to read the weights, beside what computes."""
        if self._reading is None:
            self._reading = _reader().submit(self._read)

    def _read(self) -> dict[str, Tensor]:
        return read_tensors(self.path, RESIDENT, self.dtype, self.device, names=self.empty)

    def _put(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in weights.items():
            owner, _, own = name.rpartition(".")
            self.block.get_submodule(owner).register_parameter(own, parameter)


@cache
def _reader() -> ThreadPoolExecutor:
    """One thread reads ahead: more would only share the disk."""
    return ThreadPoolExecutor(1, thread_name_prefix="read ahead")


def _recomputed(compute: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(compute, *inputs, use_reentrant=False)


def _placeholder(like: Tensor, dtype: torch.dtype, device: str) -> nn.Parameter:
    """The same shape in one element's memory; whoever computed with it would see NaN."""
    nothing = torch.full((), float("nan"), dtype=dtype, device=device)
    return nn.Parameter(nothing.expand(like.shape), requires_grad=False)
