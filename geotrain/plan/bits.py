"""Bits per number for `codec: auto`: for every region and way, the most that its links can carry in time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from geotrain.plan.links import LinkOf, transfer_s

BYTES_PER_NUMBER = (2.0, 1.004, 0.516)
"""Of bf16, int8 and int4 with their scales: the order of geotrain.sync.codec.BITS."""


@dataclass(frozen=True, slots=True)
class Bits:
    """What one region chooses, as positions in geotrain.sync.codec.BITS."""

    up: tuple[int, ...]
    """For what it sends to each owner; of a push, one for all."""
    down: int
    """For what it merges, sent to all others: by the slowest of its links."""


def most_bits(elements: float, link_s: Sequence[tuple[LinkOf, str, str]], budget_s: float) -> int:
    """The first choice with which `elements` numbers pass all these links within the budget; else the one with the fewest bits [ours]."""
    for choice, size in enumerate(BYTES_PER_NUMBER):
        if all(transfer_s(link(a, b), round(size * elements)) <= budget_s for link, a, b in link_s):
            return choice
    return len(BYTES_PER_NUMBER) - 1


HIDDEN_MARGIN = 1.2
"""An exchange counts as hidden behind this many times its length."""
BLOCKING_SHARE = 0.1
"""A blocking exchange may take this part of a round's compute."""


def exchange_budget_s(compute_s: float, *, hides: bool) -> float:
    """What one way of an exchange may take: half of what hides behind a round, or of a tenth of it where it cannot hide [ours]."""
    return compute_s / HIDDEN_MARGIN / 2 if hides else compute_s * BLOCKING_SHARE / 2


def region_bits(region: str, others: Sequence[str], shares: Mapping[str, float], elements: float, budget_s: float, link: LinkOf) -> Bits:
    """One region's choice. `shares`: owner -> its part of the merging; none for a push."""
    out = [(link, region, other) for other in others]
    if not shares:
        choice = most_bits(elements, out, budget_s)
        return Bits((choice,), choice)
    up = tuple(most_bits(elements * share, [(link, region, owner)] if owner != region else [], budget_s) for owner, share in shares.items())
    return Bits(up, most_bits(elements * shares.get(region, 0.0), out, budget_s))


def choose_bits(regions: Sequence[str], shares: Mapping[str, float], elements: float, budget_s: float, link: LinkOf) -> dict[str, Bits]:
    """Per region. `elements`: numbers of one round's update; `budget_s`: what one way of an exchange may take."""
    return {a: region_bits(a, [b for b in regions if b != a], shares, elements, budget_s, link) for a in regions}


def choose_push_bits(pairs: Sequence[tuple[str, str]], elements: float, budget_s: float, link: LinkOf) -> dict[str, Bits]:
    """Per region, one choice for all that it sends to."""
    return {
        a: region_bits(a, [b for source, b in pairs if source == a], {}, elements, budget_s, link) for a in sorted({a for a, _ in pairs})
    }
