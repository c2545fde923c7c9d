"""Standstill: all wait for each other, and nothing is under way that could end it. It is a fault of geotrain; here it costs a segment, and
not the run. Pure.
"""

import threading
import time
from collections.abc import Callable, Collection


class Standstill:
    """What leaders wait for, while nothing of theirs is under way. Thread-safe; times in seconds, by one clock."""

    def __init__(self, after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`after_s`: how long all may wait; longer than any of them may wait for something that comes by itself."""
        self.after_s, self._clock = after_s, clock
        self._waits_for: dict[str, str] = {}
        self._since: float | None = None
        """When the last of them began to wait."""
        self._lock = threading.Lock()

    def changed(self) -> None:
        """Others are in, or they are told something else: what they waited for is of no account."""
        with self._lock:
            self._waits_for, self._since = {}, None

    def goes_on(self, region: str) -> None:
        """It does something else than to wait, and may not say so for long."""
        with self._lock:
            self._waits_for.pop(region, None)

    def heard(self, region: str, waits_for: str | None, present: Collection[str]) -> dict[str, str] | None:
        """What each of those that are in waits for, when all have for too long; said once. `waits_for`: None while it goes on."""
        with self._lock:
            if waits_for is None:
                self._waits_for.pop(region, None)
            else:
                self._waits_for[region] = waits_for
            if not all(name in self._waits_for for name in present):
                self._since = None
                return None
            now = self._clock()
            self._since = now if self._since is None else self._since
            if now - self._since < self.after_s:
                return None
            found, self._waits_for, self._since = self._waits_for, {}, None
            return {name: found[name] for name in present}
