"""How a link is timed: what its sender measured, and what follows from it: connections, and patience. No seconds are set by hand."""

from dataclasses import dataclass, field
from math import ceil

PART_BYTES = 2**19
PER_CONNECTION = 6 * PART_BYTES
"""Bytes under way on one connection: less than the kernel's default send buffer of 4 MB holds."""
MOST_CONNECTIONS = 8
SPREAD = 4
"""Connections for each that a long pipe would need, were it never to lose a packet: each of them recovers its window by itself."""
LONG = 0.7
"""Of what one connection holds: a pipe that holds more is long."""
LEAST_MEASURED = 2**18
"""Bytes; a smaller update says little of a link's rate."""
SLOW_START = 10
"""Round trips until a new connection carries PER_CONNECTION at once: two to open it, then its window doubles from ten packets."""
ENOUGH = 0.7
"""Of the believed rate: then no further connection is tried, which costs the others while it opens its window."""
K = 4.0
"""A part is missing when its answer is so many times later than expected [ours]."""


@dataclass(slots=True)
class LinkTiming:
    """What a link is like, as its sender sees it, and what follows: how many connections, and how long to be patient."""

    rtt_s: float
    """Of a small message."""
    bytes_per_s: float
    """Goodput: what was acknowledged while there was something to send."""
    measured: bool = False
    """Else both are the plan's."""
    completion_s: float = 0.0
    """Smoothed time from sending a part to its answer, and its mean deviation."""
    deviation_s: float = 0.0
    connections: int = 0
    _by: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Connections -> (measurements with so many, the best goodput)."""
    _since: float | None = None
    _bytes: int = 0
    _goodput: float = 0.0
    _believed: float = 0.0

    def __post_init__(self) -> None:
        self._believed = self.bytes_per_s
        self.connections = self.connections or self._filling()

    def _filling(self) -> int:
        """Connections that keep the pipe full, the better of what is believed and what was measured."""
        pipe = max(self.bytes_per_s, self._believed) * self.rtt_s / PER_CONNECTION
        return min(ceil(SPREAD * pipe), MOST_CONNECTIONS) if pipe > LONG else 1

    @property
    def parts(self) -> int:
        """To have under way."""
        return self.connections * PER_CONNECTION // PART_BYTES

    def pinged(self, seconds: float, *, alone: bool) -> None:
        """A small message's round trip. Measured among parts it has their queue in it: that may lower the estimate, and hardly raise it."""
        if not self.measured or seconds < self.rtt_s:
            self.rtt_s = seconds
        else:
            self.rtt_s += (0.5 if alone else 0.01) * (seconds - self.rtt_s)

    def answered(self, seconds: float, length: int, now: float) -> None:
        """A part of so many bytes was answered so long after it was sent."""
        if not self.completion_s:
            self.completion_s, self.deviation_s = seconds, seconds / 2
        self.deviation_s += 0.25 * (abs(seconds - self.completion_s) - self.deviation_s)  # as RFC 6298 smooths round trips
        self.completion_s += 0.125 * (seconds - self.completion_s)
        if self._since is None:
            self._since, self._bytes = now - seconds, 0
        self._bytes += length
        spent = now - self._since
        if spent > 4 * self.completion_s and self._bytes >= 3 * self.parts * PART_BYTES:
            self._measure(self._bytes / spent)
            self._since, self._bytes = now, 0

    def _measure(self, rate: float) -> None:
        """As many connections as keep the pipe full; one more while the link carries much less than was believed of it and the last one
        brought a tenth more.

        A number of connections is judged by the better of two measurements: the first has their slow start in it. What was found
        is forgotten when the link changes.
        """
        if self.measured and not 0.5 < rate / self.bytes_per_s < 2:
            self._by.clear()
        self.bytes_per_s = rate if not self.measured else self.bytes_per_s + 0.3 * (rate - self.bytes_per_s)
        self.measured = True
        n = self.connections
        count, best = self._by.get(n, (0, 0.0))
        self._by[n] = count, best = count + 1, max(rate, best)
        if n < (filling := self._filling()):
            self.connections = filling
        elif count >= 2 and n > filling and n - 1 in self._by and best < 1.1 * self._by[n - 1][1]:
            self.connections = n - 1
        elif count >= 2 and n + 1 not in self._by and n < MOST_CONNECTIONS and best < ENOUGH * self._believed:
            self.connections = n + 1

    def goodput(self, size: int, seconds: float, *, alone: bool) -> float:
        """Bytes per second of late, after an update took so long from first to last: smoothed; 0 while nothing large enough was sent."""
        if size >= LEAST_MEASURED:
            found = size / max(seconds - self.rtt_s, seconds / 4) if alone else self.bytes_per_s
            self._goodput = found if not self._goodput else self._goodput + 0.7 * (found - self._goodput)
        return self._goodput

    def paused(self) -> None:
        """Nothing is left to send: what comes next is measured from its own begin."""
        self._since = None

    def patience_s(self, parts: int) -> float:
        """How long a part may go unanswered with so many under way: K times what is to be expected, with its deviation.

        A connection that is new, or was idle, first has to open its window.
        """
        return K * max(SLOW_START * self.rtt_s + parts * PART_BYTES / self.bytes_per_s, self.completion_s + self.deviation_s)


def first_patience_s(rtt_s: float, bytes_per_s: float) -> float:
    """How long a part may go unanswered on a link of which only this is believed."""
    timing = LinkTiming(rtt_s, bytes_per_s)
    return timing.patience_s(timing.parts)
