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


def choose_bits(regions: Sequence[str], shares: Mapping[str, float], elements: float, budget_s: float, link: LinkOf) -> dict[str, Bits]:
    """Per region. `elements`: numbers of one round's update; `budget_s`: what one way of an exchange may take."""
    chosen = {}
    for region in regions:
        up = tuple(
            most_bits(elements * share, [(link, region, owner)] if owner != region else [], budget_s) for owner, share in shares.items()
        )
        out = [(link, region, other) for other in regions if other != region]
        chosen[region] = Bits(up, most_bits(elements * shares.get(region, 0.0), out, budget_s))
    return chosen


def choose_push_bits(pairs: Sequence[tuple[str, str]], elements: float, budget_s: float, link: LinkOf) -> dict[str, Bits]:
    """Per region, one choice for all that it sends to."""
    sources = sorted({a for a, _ in pairs})
    chosen = {a: most_bits(elements, [(link, a, b) for source, b in pairs if source == a], budget_s) for a in sources}
    return {a: Bits((choice,), choice) for a, choice in chosen.items()}
