"""Load power, and the cheapest allocation that keeps up with the straggler."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Offer:
    """Workers of one kind that a region could give."""

    kind: str
    count: int
    usd_per_hour: float
    samples_per_s: float
    """Of one, on this task; measured by the probe or given by the job."""


Allocation = tuple[int, ...]
"""How many of each offer."""


def efficiency(workers: int, scaling_loss: float) -> float:
    """e(n) = 1 / (1 + loss * (n - 1)): what is left of n workers' speed when they train together [ours]."""
    return 1 / (1 + scaling_loss * (workers - 1)) if workers else 0.0


def compute(offers: Sequence[Offer], allocation: Allocation, scaling_loss: float) -> float:
    """C = e(n) * sum_k n_k P_k, samples per second [ours, after the abstract of Cloudless-Training]."""
    speed = sum(n * offer.samples_per_s for n, offer in zip(allocation, offers, strict=True))
    return efficiency(sum(allocation), scaling_loss) * speed


def load_power(samples_per_s: float, rows: int) -> float:
    """LP = C / D, epochs per second [ours, after the abstract of Cloudless-Training]."""
    return samples_per_s / rows


def usd_per_hour(offers: Sequence[Offer], allocation: Allocation) -> float:
    return sum(n * offer.usd_per_hour for n, offer in zip(allocation, offers, strict=True))


def everything(offers: Sequence[Offer]) -> Allocation:
    return tuple(offer.count for offer in offers)


def allocations(offers: Sequence[Offer]) -> Iterator[Allocation]:
    """All of them with at least one worker: small integers, so the search is exact."""
    return (counts for counts in product(*(range(offer.count + 1) for offer in offers)) if any(counts))


def cheapest(offers: Sequence[Offer], rows: int, target: float, scaling_loss: float) -> Allocation:
    """argmin of price over allocations with load power >= target; of equal prices the one with fewer workers, then the faster.

    `target`: epochs per second. Everything there is where nothing reaches it.
    """
    good = [a for a in allocations(offers) if load_power(compute(offers, a, scaling_loss), rows) >= target]
    if not good:
        return everything(offers)
    return min(good, key=lambda a: (usd_per_hour(offers, a), sum(a), -compute(offers, a, scaling_loss)))
