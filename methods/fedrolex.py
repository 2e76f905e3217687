"""FedRolex: each client trains a narrower model, cut out by a window that rolls over the channels."""

from __future__ import annotations

from dataclasses import dataclass

from methods._width import WidthMethod


@dataclass(frozen=True)
class FedRolex(WidthMethod):
    """In round t a client of ratio p holds, of an axis of n channels, the p · n from number t mod n on, around the end.

    Paper: Alam et al., "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction" (NeurIPS
    2022, arXiv:2212.01548).  Evidence: general knowledge of it, and what NeuLite's code compares itself with ("Roll":
    ratios 1 … 1/16, CIFAR-10, a ResNet-18); SGD at 0.01 with momentum 0.9 and weight decay 5e-4 is that code's own
    training.

    All clients' windows begin at the same channel, which moves on by one every round, so that every element is trained
    in turn.  Axes that carry the same channels have the same n, and so the same window.

    Our reading: the mean of an element runs over the clients that held it, weighted by their examples; what nobody
    held keeps its value; the picture's channels and the classes are never cut.  Of a transformer, whole heads are kept,
    and their window moves on by one head (with grouped queries: by a key and value head with its query heads), while
    hidden size and feed-forward layer move on by one channel.  BatchNorm's running statistics are cut and averaged like
    weights.  The learning rate is the run's times `rate_scale`: at the run's default of 0.002 that is the code's 0.01.
    """

    def shift(self, round_index: int) -> int:
        return round_index
