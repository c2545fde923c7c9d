"""What an exchange takes on the WAN: a directed link is a rate, a delay and a price (alpha-beta model)."""

from collections.abc import Callable, Mapping, Sequence
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


def merge_exchange(regions: Sequence[str], shares: Mapping[str, float], payload_bytes: int, link: LinkOf) -> Exchange:
    """Contributions to the owners, each region's share of the update to it, and the merged shares back to all.

    `shares`: owner -> its part of the update; they sum to 1.
    """
    up = {(region, owner): round(payload_bytes * share) for owner, share in shares.items() for region in regions if region != owner}
    down = {(owner, region): size for (region, owner), size in up.items()}
    seconds = sum(max((transfer_s(link(*pair), size) for pair, size in way.items()), default=0.0) for way in (up, down))
    sent, usd = dict.fromkeys(regions, 0), 0.0
    for way in (up, down):
        for pair, size in way.items():
            sent[pair[0]] += size
            usd += size / 1e9 * link(*pair).usd_per_gb
    return Exchange(seconds, sent, usd)


def push_exchange(pairs: Sequence[tuple[str, str]], payload_bytes: int, link: LinkOf) -> Exchange:
    """An update over each of the directed `pairs`; `seconds` is what the slowest link needs per update, without its delay."""
    busiest = max((payload_bytes * 8 / (link(a, b).mbit_per_s * 1e6) for a, b in pairs), default=0.0)
    sent = {region: payload_bytes * sum(a == region for a, _ in pairs) for pair in pairs for region in pair}
    return Exchange(busiest, sent, sum(payload_bytes / 1e9 * link(a, b).usd_per_gb for a, b in pairs))


def best_owner(regions: Sequence[str], payload_bytes: int, link: LinkOf) -> str:
    """The region whose rounds are quickest; of equal ones the cheaper, then the first by name."""

    def rank(owner: str) -> tuple[float, float, str]:
        exchange = merge_exchange(regions, {owner: 1.0}, payload_bytes, link)
        return (exchange.seconds, exchange.usd, owner)

    return min(regions, key=rank)


def shares_by_bandwidth(regions: Sequence[str], link: LinkOf) -> dict[str, float]:
    """Each region's part of the merging, in proportion to the slowest of its links [ours]."""
    rates = {a: min((min(link(a, b).mbit_per_s, link(b, a).mbit_per_s) for b in regions if b != a), default=1.0) for a in regions}
    return {region: rate / sum(rates.values()) for region, rate in sorted(rates.items())}
