"""Merging contributions, and the outer step: arithmetic on flat fp32 CPU tensors.

Every rule takes vectors in the order of their regions' names; the order is part of the result, since floating-point addition does
not commute. What is not finite is left out whatever the rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from geotrain.sync.strategy import Outer, Rule

FAR = 10.0
"""A contribution whose norm is this many times the median norm is named."""


@dataclass(frozen=True, slots=True)
class Part:
    """One contribution."""

    origin: str
    samples: int
    decode: Callable[[], Tensor]
    """[elements] fp32; called once, so that a mean need not hold all of them."""


@dataclass(frozen=True, slots=True)
class Merged:
    vector: Tensor
    suspects: dict[str, str]
    """Region -> what is odd about its contribution."""


def merge(parts: Sequence[Part], rule: Rule) -> Merged:
    """The contributions of one fragment as one. Vectors are [elements] fp32.

    mean          by samples
    radial        mean of the norms times the direction of the mean of the unit vectors, by samples (Decoupled DiLoCo,
                  arXiv 2604.21428): a mean of nearly orthogonal vectors shrinks with their number
    norm_clipped  each cut to the median norm, then the mean by samples (SparseLoCo's receiver, arXiv 2508.15706)
    median        of each coordinate
    trimmed       of each coordinate, the mean without the largest and smallest fifth (at least one of each, of three or more)
    flag          Flag aggregator (ICLR 2024), rescaled to the median norm
    """
    if rule == "mean":
        return _streamed_mean(parts)
    vectors = {part.origin: part.decode() for part in parts}
    suspects = {origin: "not finite" for origin, vector in vectors.items() if not _finite(vector)}
    kept = [part for part in parts if part.origin not in suspects]
    if not kept:
        return Merged(torch.zeros_like(next(iter(vectors.values()))), suspects)
    good, weights = [vectors[part.origin] for part in kept], [part.samples for part in kept]
    norms = [float(vector.norm()) for vector in good]
    vector = _combine(good, weights, norms, rule)
    suspects |= _odd([part.origin for part in kept], good, norms, vector)
    return Merged(vector, suspects)


def _combine(vectors: Sequence[Tensor], weights: Sequence[float], norms: Sequence[float], rule: Rule) -> Tensor:
    middle = float(torch.tensor(norms).median())
    match rule:
        case "mean":
            return weighted_mean(vectors, weights)
        case "radial":
            units = [vector / norm if norm else vector for vector, norm in zip(vectors, norms, strict=True)]
            direction = weighted_mean(units, weights)
            length = float(direction.norm())
            radius = sum(w * norm for w, norm in zip(weights, norms, strict=True)) / max(sum(weights), 1)
            return direction.mul_(radius / length) if length else direction
        case "norm_clipped":
            return weighted_mean([v * (middle / n) if n > middle else v for v, n in zip(vectors, norms, strict=True)], weights)
        case "median":
            return torch.stack(list(vectors)).quantile(0.5, dim=0) if len(vectors) % 2 == 0 else torch.stack(list(vectors)).median(0).values
        case "trimmed":
            cut = max(1, len(vectors) // 5) if len(vectors) >= 3 else 0
            return torch.stack(list(vectors)).sort(0).values[cut : len(vectors) - cut].mean(0)
        case "flag":
            return flag_aggregate(vectors, norms)
        case _:
            assert_never(rule)


def _streamed_mean(parts: Sequence[Part]) -> Merged:
    """As weighted_mean, with one vector in memory at a time."""
    total, count, suspects = None, 0, dict[str, str]()
    for part in parts:
        vector = part.decode()
        total = torch.zeros_like(vector) if total is None else total
        if not _finite(vector):
            suspects[part.origin] = "not finite"
        elif part.samples:
            total.add_(vector, alpha=float(part.samples))
            count += part.samples
    assert total is not None, "a merge of nothing"
    return Merged(total.div_(count) if count else total, suspects)


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i, added in the order given; zeros where all weights are zero."""
    mean = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        if weight:
            mean.add_(vector, alpha=float(weight))
    return mean.div_(sum(weights)) if sum(weights) else mean


def flag_aggregate(vectors: Sequence[Tensor], norms: Sequence[float], sweeps: int = 5) -> Tensor:
    """The Flag aggregator (ICLR 2024, code): a robust subspace through the normalised vectors, found by reweighting.

    weights_i = (1 - |Y' x_i|^2 + 1e-7)^(-1/4), Y the r = (R + 1) / 2 first left singular vectors of [w_i x_i], by way of the R x R Gram
    matrix; the mean of the projections on Y, rescaled by the median norm [ours].
    """
    count = len(vectors)
    inverse = torch.tensor([1 / norm if norm else 0.0 for norm in norms], dtype=torch.float64)
    gram = torch.empty(count, count, dtype=torch.float64)
    for i, left in enumerate(vectors):
        for j in range(i, count):
            gram[i, j] = gram[j, i] = torch.dot(left, vectors[j]).double()
    gram *= inverse[:, None] * inverse[None, :]
    rank, weights = (count + 1) // 2, torch.ones(count, dtype=torch.float64)
    inside = torch.zeros(count, count, dtype=torch.float64)
    for _ in range(sweeps):
        values, basis = torch.linalg.eigh(weights[:, None] * gram * weights[None, :])
        top = basis[:, -rank:] / values[-rank:].clamp_min(1e-12).sqrt()
        inside = (weights[:, None] * top) @ top.T * weights[None, :]  # Y Y' = X inside X', X the normalised vectors
        explained = (gram @ inside @ gram).diagonal()
        weights = (1 - explained + 1e-7).clamp_min(1e-7) ** -0.25
        weights /= weights.max()
    shares = inside @ gram @ torch.full((count,), 1 / count, dtype=torch.float64) * inverse
    mean = weighted_mean_of(vectors, shares.tolist())
    length = float(mean.norm())
    return mean.mul_(float(torch.tensor(norms).median()) / length) if length else mean


def weighted_mean_of(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_i s_i x_i, whatever the shares add up to."""
    total = torch.zeros_like(vectors[0])
    for vector, share in zip(vectors, shares, strict=True):
        total.add_(vector, alpha=share)
    return total


def _finite(vector: Tensor) -> bool:
    """One pass: a NaN or an infinity anywhere makes the sum of x * 0 one."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())


def _odd(origins: Sequence[str], vectors: Sequence[Tensor], norms: Sequence[float], merged: Tensor) -> dict[str, str]:
    """Contributions to name: far longer than the median, or pointing clearly against the merge."""
    middle, length = float(torch.tensor(norms).median()), float(merged.norm())
    found = {}
    for origin, vector, norm in zip(origins, vectors, norms, strict=True):
        if norm > FAR * middle > 0:
            found[origin] = f"{norm / middle:.0f} times the median norm"
        elif norm and length and (cosine := float(torch.dot(vector, merged)) / (norm * length)) < -0.2:
            found[origin] = f"points against the merge (cosine {cosine:.2f})"
    return found


def cosine(left: Tensor, right: Tensor) -> float:
    """0 where one of them is zero."""
    norms = float(left.norm()) * float(right.norm())
    return float(torch.dot(left, right)) / norms if norms else 0.0


def outer_step(theta: Tensor, gradient: Tensor, momentum_buffer: Tensor | None, rule: Outer) -> None:
    """One step of the outer optimizer, in place; with Nesterov as torch.optim.SGD takes it.

    b = m b + g; theta -= lr (g + m b), without Nesterov theta -= lr b; b clipped to [-clip, clip] (CO2, arXiv 2401.16265).
    `momentum_buffer`: zeros at first; None where the momentum is 0.
    """
    if momentum_buffer is None:
        theta.sub_(gradient, alpha=rule.lr)
        return
    momentum_buffer.mul_(rule.momentum).add_(gradient)
    if rule.clip is not None:
        momentum_buffer.clamp_(-rule.clip, rule.clip)
    if rule.nesterov:
        theta.sub_(gradient, alpha=rule.lr).sub_(momentum_buffer, alpha=rule.lr * rule.momentum)
    else:
        theta.sub_(momentum_buffer, alpha=rule.lr)
