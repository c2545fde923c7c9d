"""The WAN on a virtual clock: every directed link has a rate that may change over time, a delay with jitter, and loss.

Updates on one link go one after the other; links do not share a bottleneck, but for what both directions of a pair lose to
acknowledgements and their delay while both are busy. With loss p a transfer takes 1 / (1 - p) of its bytes,
and one round trip more when a packet of its last window was lost: a model of a sender that recovers as fast as it can [ours].
"""

import csv
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geotrain.errors import JobError
from geotrain.job import LinkSpec

PACKET_BYTES = 1448
WINDOW_PACKETS = 64
DUPLEX = 0.95
"""Of its rate a link carries while the way back is busy: 91 of 95.4 Mbit/s, raw TCP both ways at 100 Mbit/s and 30 ms [measured]."""
HEADER_BYTES = 300
"""About what an update's header and framing take on the wire."""

Steps = Sequence[tuple[float, float]]
"""(second from which on, Mbit/s), rising."""


@dataclass(slots=True)
class Link:
    """One directed link."""

    spec: LinkSpec
    trace: Steps = ()
    free_at: float = 0.0
    last_arrival: float = 0.0
    bytes: int = 0
    updates: int = 0
    back: "Link | None" = None
    """The other direction, once it was used."""

    def finish(self, start: float, size: float) -> float:
        """When the last of `size` bytes leaves, if the first leaves at `start`."""
        bits = size * 8e-6
        position = bisect_right(self.trace, start, key=lambda step: step[0])
        while True:
            rate = self.trace[position - 1][1] if position else self.spec.mbit_per_s
            until = self.trace[position][0] if position < len(self.trace) else float("inf")
            if rate and (end := start + bits / rate) <= until:
                return end
            if until == float("inf"):
                return until
            bits -= rate * (until - start)
            start, position = until, position + 1


@dataclass(slots=True)
class Network:
    """All links; made when first used."""

    link: Callable[[str, str], LinkSpec]
    random: random.Random
    traces: Mapping[str, Steps] = field(default_factory=dict)
    """`tokyo>virginia`, `tokyo-virginia` or `all` -> its rate over time."""
    links: dict[tuple[str, str], Link] = field(default_factory=dict)

    def between(self, source: str, target: str) -> Link:
        link = self.links.get((source, target))
        if link is None:
            names = (f"{source}>{target}", f"{source}-{target}", f"{target}-{source}", "all")
            trace = next((self.traces[name] for name in names if name in self.traces), ())
            back = self.links.get((target, source))
            link = self.links[source, target] = Link(self.link(source, target), trace, back=back)
            if back is not None:
                back.back = link
        return link

    def send(self, source: str, target: str, payload_bytes: int, now: float) -> float:
        """Put an update on its way; returns when it is there."""
        link = self.between(source, target)
        spec, size = link.spec, payload_bytes + HEADER_BYTES
        start = now if now > link.free_at else link.free_at
        wire = size / (1 - spec.loss) if spec.loss else size
        end = link.finish(start, wire) if link.trace else start + wire * 8e-6 / spec.mbit_per_s
        back = link.back
        if back is not None and back.free_at > start:
            end += min(end - start, back.free_at - start) * (1 / DUPLEX - 1)
        rtt = spec.rtt_ms / 1000
        if spec.loss:
            packets = min(WINDOW_PACKETS, 1 + size // PACKET_BYTES)
            end += rtt * (self.random.random() > (1 - spec.loss) ** packets)
        arrival = end + rtt / 2
        if spec.jitter_ms:
            arrival += abs(self.random.gauss(0, spec.jitter_ms / 1000))
        link.free_at = end
        link.last_arrival = arrival = max(arrival, link.last_arrival)
        link.bytes += round(wire)
        link.updates += 1
        return arrival


def read_trace(path: str) -> dict[str, list[tuple[float, float]]]:
    """A CSV file with the columns seconds, link and mbit_per_s. Raises JobError."""
    traces: dict[str, list[tuple[float, float]]] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    traces.setdefault(row["link"].strip(), []).append((float(row["seconds"]), float(row["mbit_per_s"])))
                except (KeyError, TypeError, ValueError) as error:
                    raise JobError(f"links.trace: {path}, line {number}: it needs seconds, link and mbit_per_s, got {row}") from error
    except OSError as error:
        raise JobError(f"links.trace: cannot read {path}: {error.strerror}") from error
    return {link: sorted(steps) for link, steps in traces.items()}
