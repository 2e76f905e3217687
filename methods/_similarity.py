"""A look at the global model from the device: every block's output on one batch, streamed through the model's forward.

One pass gives the centred Gram matrix of every block's (or part's) output and how much it turns the residual stream;
a second, optional one the loss without each of them, restarted from the hidden state where it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from methods._grouping import centred_gram
from testbed.method import ATTENTION, FEED_FORWARD, PARTS, STREAMED, ModelShape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods._lora import LoraMethod
    from testbed.model.submodel import Built
    from testbed.node.workplace import Workplace
    from testbed.task import Batch

Unit = tuple[str, ...]
WHOLE: Unit = PARTS


@dataclass
class Probe:
    """What a pass over all blocks found, by unit (whole block, attention alone, feed-forward alone) and block."""

    shape: ModelShape
    grams: dict[Unit, list[Tensor]] = field(default_factory=dict)  # samples × samples each
    influence: dict[Unit, list[float]] = field(default_factory=dict)  # 1 - cos(input, output)
    loss: float = 0.0
    losses_without: dict[Unit, list[float]] = field(default_factory=dict)


def probe_blocks(
    method: LoraMethod, workplace: Workplace, units: Sequence[Unit], samples: int, *, losses: bool
) -> Probe:
    """Run the global model once on a local batch, one block in memory at a time; nothing is trained.

    samples: token vectors (of non-padding tokens, drawn by seed) on which similarity is computed.
    With `losses`, the loss without every unit follows: about N²/2 blocks are read; the number is told first.
    """
    import torch

    job = workplace.job
    built = workplace.build(job.submodel, replace(job.work, holding=STREAMED, checkpointing=False))
    method.mount(built, workplace.tensors)
    built.model.eval()
    batch = workplace.batch(0)
    recorder = _Recorder(built, units, _rows(batch, samples, job.seed))
    probe = Probe(built.shape)
    with torch.no_grad(), recorder.listening():
        if losses:
            probe.loss = float(built.loss(batch))
        else:
            built.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    probe.grams, probe.influence = recorder.grams, recorder.influence
    if losses:
        with torch.no_grad():
            probe.losses_without = _losses_without(workplace, built, batch, units)
    return probe


def _rows(batch: Batch, samples: int, seed: int) -> Tensor:
    """Places (in the flattened batch) of the tokens to look at."""
    import torch

    assert batch.attention_mask is not None  # texts only
    places = batch.attention_mask.flatten().nonzero().squeeze(1)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    return places[order[:samples].sort().values]


class _Recorder:
    """Hooks that turn every block's input and output into Gram matrices and angles, keeping no activations."""

    def __init__(self, built: Built, units: Sequence[Unit], rows: Tensor) -> None:
        from testbed.model.surgery import post_norm

        self._built, self._units, self._rows = built, units, rows
        self._post_norm = post_norm(built)
        self.grams: dict[Unit, list[Tensor]] = {unit: [] for unit in units}
        self.influence: dict[Unit, list[float]] = {unit: [] for unit in units}
        self._parts: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        from testbed.model.surgery import part_modules

        handles = []
        for block in self._built.block_modules.values():
            handles.append(block.register_forward_hook(self._block, with_kwargs=True))
            if self._units != [WHOLE]:
                handles += [
                    module.register_forward_hook(self._part(part))
                    for part, module in part_modules(self._built, block).items()
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _part(self, part: str) -> Any:
        def listen(_: nn.Module, __: Any, output: Any) -> None:
            self._parts[part] = self._look(output)

        return listen

    def _block(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        entering = self._look(inputs[0] if inputs else named["hidden_states"])
        leaving = self._look(output)
        for unit in self._units:
            shown, before, after = self._seen(unit, entering, leaving)
            self.grams[unit].append(centred_gram(shown))
            self.influence[unit].append(_turn(before, after))

    def _seen(self, unit: Unit, entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A unit's output, and the residual stream before and after it.

        Between the parts the stream is the block's input plus the attention's output; where norms stand behind the
        sums (BERT), the attention part gives the stream itself.
        """
        if unit == WHOLE:
            return leaving, entering, leaving
        between = self._parts[ATTENTION] if self._post_norm else entering + self._parts[ATTENTION]
        if unit == (ATTENTION,):
            return self._parts[ATTENTION], entering, between
        return self._parts[FEED_FORWARD], between, leaving

    def _look(self, output: Any) -> Tensor:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden.flatten(0, 1)[self._rows].float()


def _turn(before: Tensor, after: Tensor) -> float:
    """Block Influence (Men et al., "ShortGPT", arXiv:2403.03853, eq. 1): 1 - mean cosine of input and output."""
    from torch.nn.functional import cosine_similarity

    return max(0.0, 1.0 - float(cosine_similarity(before, after, dim=-1).mean()))


# ── leaving one out ──────────────────────────────────────────────────────────────────────────────────────────────────
def _losses_without(workplace: Workplace, built: Built, batch: Batch, units: Sequence[Unit]) -> dict[Unit, list[float]]:
    """The loss with each unit left out; a pass restarts at the block in question, from the stream that enters it."""
    from testbed.model.surgery import without

    count = len(built.submodel.blocks)
    workplace.progress(leave_one_out_block_reads=count + len(units) * count * (count + 1) // 2)
    found: dict[Unit, list[float]] = {unit: [] for unit in units}
    entering: Any = None
    for index in range(count):
        with _replayed(built, index, entering):
            for unit in units:
                with without(built, index, unit):
                    found[unit].append(float(built.loss(batch)))
            entering = _output_of(built, batch, index)
    return found


@contextmanager
def _replayed(built: Built, index: int, output: Any) -> Iterator[None]:
    """Inside, the blocks before `index` are not run: they give the output that is known already."""
    from testbed.model.surgery import block_list

    blocks = block_list(built)
    before = list(blocks[:index])
    for place in range(index):
        blocks[place] = _replay(output)
    try:
        yield
    finally:
        for place, block in enumerate(before):
            blocks[place] = block


def _replay(output: Any) -> nn.Module:
    from torch import nn

    class Replay(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            return output

    return Replay()


class _Enough(Exception):  # noqa: N818 -- not an error: the pass has given what was asked of it
    """Ends a pass behind the block whose output was wanted."""


def _output_of(built: Built, batch: Batch, index: int) -> Any:
    """The output of one block, of a pass that goes no further."""
    from testbed.model.surgery import block_list

    caught = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        caught.append(output)
        raise _Enough

    handle = block_list(built)[index].register_forward_hook(stop)
    try:
        built.loss(batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return caught[0]
