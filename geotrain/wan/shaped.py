"""A WAN imitated in front of any transport: rate and delay per directed link.

Each update leaves when the link is free, takes bytes / rate to be sent and half a round trip to arrive. Nothing is dropped.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from geotrain.errors import WanError
from geotrain.sync.messages import Update
from geotrain.wan.transport import Delivery, LinkTraffic, Transport

HEADER_BYTES = 300
"""About what an update's header and framing take on the wire."""


@dataclass(frozen=True, slots=True)
class Line:
    """One directed link."""

    mbit_per_s: float
    rtt_ms: float

    def seconds(self, payload_bytes: int) -> float:
        """Time on the line, without the way there."""
        return (payload_bytes + HEADER_BYTES) * 8 / (self.mbit_per_s * 1e6)

    @property
    def delay_s(self) -> float:
        return self.rtt_ms / 2000


class Shaped:
    """Wraps a transport; `line` says what the link from here to a region is like."""

    def __init__(self, inner: Transport, line: Callable[[str], Line], clock: Callable[[], float] = time.monotonic) -> None:
        self.inner, self.line, self.clock = inner, line, clock
        self.traffic: dict[str, LinkTraffic] = {}
        self._free_at: dict[str, float] = {}
        self._due: list[tuple[float, int, str, Update, Tensor, float]] = []
        self._number = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._error: WanError | None = None
        self._thread = threading.Thread(target=self._deliver, name="geotrain-shape", daemon=True)
        self._thread.start()

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        if self._error:
            raise self._error
        now, line = self.clock(), self.line(to)
        with self._wake:
            free_at = max(now, self._free_at.get(to, now)) + line.seconds(payload.numel())
            self._free_at[to] = free_at
            link = self.traffic.setdefault(to, LinkTraffic())
            link.begin(time.monotonic())
            link.rtt_s, link.bytes_per_s = line.rtt_ms / 1000, line.mbit_per_s * 1e6 / 8
            heapq.heappush(self._due, (free_at + line.delay_s, next(self._number), to, update, payload, now))
            self._wake.notify_all()

    def _deliver(self) -> None:
        with self._wake:
            while not self._closed:
                wait = self._due[0][0] - self.clock() if self._due else None
                if wait is None or wait > 0:
                    self._wake.wait(wait)
                    continue
                due_at, _, to, update, payload, sent_at = heapq.heappop(self._due)
                try:
                    self.inner.send(to, update, payload)
                except WanError as error:
                    self._error = error
                    self._wake.notify_all()
                    return
                link = self.traffic[to]
                link.updates += 1
                link.payload_bytes += payload.numel()
                link.wire_bytes += payload.numel() + HEADER_BYTES
                if (inner := self.inner.traffic.get(to)) is not None:
                    link.retries = inner.retries
                link.seconds += due_at + self.line(to).delay_s - sent_at
                if not any(entry[2] == to for entry in self._due):
                    link.end(time.monotonic())
                self._wake.notify_all()

    def receive(self, timeout_s: float) -> Delivery | None:
        if self._error:
            raise self._error
        return self.inner.receive(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        until = self.clock() + timeout_s
        with self._wake:
            while (self._due or self._error) and not self._closed:
                if self._error:
                    raise self._error
                left = until - self.clock()
                if left <= 0:
                    return False
                self._wake.wait(left)
        return self.inner.drain(max(0.0, until - self.clock()))

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()
        self.inner.close()
