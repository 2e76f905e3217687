"""nHSIC: how much one set of features tells of another, with Gaussian kernels; differentiable.

K_ab = exp(-‖a - b‖² / (2 σ² dim)), H = I - 1 1ᵀ / m, HSIC(X, Y) = mean(K_X H ⊙ (K_Y H)ᵀ), and
nHSIC(X, Y) = HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)), for m rows of `dim` features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def nhsic(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The nHSIC of two tensors (m, features), from 0 to 1, in float32, or float64 where one of them is.

    0 where one of them does not vary over its rows, for which the quotient is not defined.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    of_x, of_y = (_centred_kernel(side.to(dtype), sigma) for side in (x, y))
    product = _hsic(of_x, of_x) * _hsic(of_y, of_y)
    defined = product > torch.finfo(dtype).tiny
    quotient = _hsic(of_x, of_y) / torch.where(defined, product, 1.0).sqrt()
    return torch.where(defined, quotient, 0.0)


def _hsic(of_x: Tensor, of_y: Tensor) -> Tensor:
    return (of_x * of_y.T).mean()


def _centred_kernel(features: Tensor, sigma: float) -> Tensor:
    """K H, from K - 1: the centring takes the 1 away, and small differences keep their digits."""
    centred = features - features.mean(0)
    squares = (centred * centred).sum(1)
    distances = squares[:, None] + squares[None, :] - 2.0 * (centred @ centred.T)
    kernel = torch.expm1(-distances / (2.0 * sigma * sigma * features.shape[1]))
    return kernel - kernel.mean(1, keepdim=True)
