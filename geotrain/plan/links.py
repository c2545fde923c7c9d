"""What an exchange takes on the WAN: a directed link is a rate, a delay and a price (alpha-beta model)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from geotrain.job import LinkSpec

LinkOf = Callable[[str, str], LinkSpec]
"""(from, to) -> the link."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One round's exchange."""

    seconds: float
    """From the last inner step to the first that uses the result, were nothing else to do."""
    bytes: dict[str, int]
    """Region -> payload bytes that it sends."""
    usd: float


def transfer_s(link: LinkSpec, payload_bytes: int) -> float:
    """One way, on a link of its own."""
    return payload_bytes * 8 / (link.mbit_per_s * 1e6) + link.rtt_ms / 2000


def merge_exchange(regions: Sequence[str], owner: str, payload_bytes: int, link: LinkOf) -> Exchange:
    """Contributions to the owner, the merged update back to all."""
    others = [region for region in regions if region != owner]
    up = max((transfer_s(link(region, owner), payload_bytes) for region in others), default=0.0)
    down = max((transfer_s(link(owner, region), payload_bytes) for region in others), default=0.0)
    sent = dict.fromkeys(others, payload_bytes) | {owner: payload_bytes * len(others)}
    return Exchange(up + down, sent, _usd([(r, owner) for r in others] + [(owner, r) for r in others], payload_bytes, link))


def push_exchange(regions: Sequence[str], payload_bytes: int, link: LinkOf) -> Exchange:
    """Everyone's update to all others; `seconds` is what the slowest link needs per update, without its delay."""
    pairs = [(a, b) for a in regions for b in regions if a != b]
    busiest = max((payload_bytes * 8 / (link(a, b).mbit_per_s * 1e6) for a, b in pairs), default=0.0)
    return Exchange(busiest, {region: payload_bytes * (len(regions) - 1) for region in regions}, _usd(pairs, payload_bytes, link))


def best_owner(regions: Sequence[str], payload_bytes: int, link: LinkOf) -> str:
    """The region whose rounds are quickest; of equal ones the cheaper, then the first by name."""

    def rank(owner: str) -> tuple[float, float, str]:
        exchange = merge_exchange(regions, owner, payload_bytes, link)
        return (exchange.seconds, exchange.usd, owner)

    return min(regions, key=rank)


def _usd(pairs: Sequence[tuple[str, str]], payload_bytes: int, link: LinkOf) -> float:
    return sum(payload_bytes / 1e9 * link(a, b).usd_per_gb for a, b in pairs)
