"""Merging contributions and the outer step: arithmetic on flat fp32 CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i p_i x_i with p = weights / sum(weights), added in the order given; zeros where all weights are zero.

    Vectors are [elements] fp32. The order is part of the result: floating-point addition does not commute.
    """
    total = sum(weights)
    mean = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        if weight:
            mean.add_(vector, alpha=weight / total)
    return mean


def nesterov_step(theta: Tensor, gradient: Tensor, momentum_buffer: Tensor | None, lr: float, momentum: float) -> Tensor | None:
    """One step of SGD with Nesterov momentum, as torch.optim.SGD takes it, in place; returns the momentum buffer.

    b = m b + g (b = g at first); theta -= lr (g + m b). The outer optimizer of DiLoCo (arXiv 2311.08105).
    """
    if momentum == 0:
        theta.sub_(gradient, alpha=lr)
        return None
    momentum_buffer = gradient.clone() if momentum_buffer is None else momentum_buffer.mul_(momentum).add_(gradient)
    theta.sub_(gradient, alpha=lr).sub_(momentum_buffer, alpha=lr * momentum)
    return momentum_buffer
