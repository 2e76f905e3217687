"""Full adapters: bottleneck adapters on the whole model, trained end to end; what ChainFed is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods._adapters import AdapterMethod


@dataclass(frozen=True)
class FullAdapters(AdapterMethod):
    """Every client trains the adapters of all blocks end to end; the server averages them, weighted by examples.

    The upper bound of ChainFed's tables ("Full Adapters", arXiv:2604.06819), there without any limit of memory.  The
    adapters' form is our reading: Houlsby et al.'s bottleneck (arXiv:1902.00751), one behind each block instead of two
    inside it, because ChainFed needs a map of the residual stream onto itself.

    A device that cannot hold the whole model takes no part: that is what the memory-fitted methods are compared with.
    """

    family: ClassVar[str] = "adapters"
    memory: ClassVar[str] = "whole model, trained through"
    traffic: ClassVar[str] = "adapters, both ways"
