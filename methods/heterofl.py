"""HeteroFL: each client trains a narrower model, the leading channels of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from methods._width import WidthMethod


@dataclass(frozen=True)
class HeteroFL(WidthMethod):
    """A client of ratio p holds the first p · n of the n channels of every axis; the server averages each element.

    Paper: Diao et al., "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
    Clients" (ICLR 2021, arXiv:2010.01264).  Evidence: general knowledge of it, and what NeuLite's code compares itself
    with ("Static": ratios 1 … 1/16, CIFAR-10, a ResNet-18); SGD at 0.01 with momentum 0.9 and weight decay 5e-4 is
    that code's own training.

    Our reading: the mean of an element runs over the clients that held it, weighted by their examples; what nobody
    held keeps its value; the picture's channels and the classes are never cut; of a transformer, whole heads are kept.
    BatchNorm's running statistics are cut and averaged like weights.  Left out are the paper's static BatchNorm (the
    statistics are queried from the clients once, after training), its scaler (activations times 1 / p in training) and
    its masking of absent classes in the loss.  The learning rate is the run's times `rate_scale`: at the run's default
    of 0.002 that is the code's 0.01.
    """

    def shift(self, round_index: int) -> int:
        return 0
