"""Signs of life of a region's workers, as the control plane sees them: who makes no inner step any more, whose process stands still."""

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

COLD = 10
"""How much longer a seat's first round may take: it has what is slow once."""
STOOD_STILL_S = 10.0
"""Between two looks of the control plane: it is this process that made none, and what it has not heard in that time says nothing."""
FROZEN_S = 120.0
"""A worker whose process gives no sign of life for so long is lost, whatever it does."""


class Signs:
    """Thread-safe. Times are in seconds, by one clock; the scheduler's own times are compared with each other only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lives: Collection[int] = ()
        """Of the seats: what earlier ones still say is no sign."""
        self._warm = False
        """The leader has made a round since it took its seat."""
        self._step_at: float | None = None
        """When the leader was last told to make steps, or gave a sign of it; None: it does something else."""
        self._beats: dict[str, tuple[float, float]] = {}
        """Worker -> its last heartbeat by the scheduler's clock, and when we first saw that."""
        self._looked_at = clock()
        self._lock = threading.Lock()

    def seated(self, lives: Collection[int]) -> None:
        """The workers take other seats."""
        with self._lock:
            self._lives, self._warm, self._step_at = lives, False, None

    def begin(self) -> None:
        """A segment is ordered."""
        with self._lock:
            self._step_at = self._looked_at = self._clock()

    def heard(self, message: Mapping[str, Any]) -> None:
        """What a seat told."""
        with self._lock:
            if "rounds" in message and message["life"] in self._lives and self._step_at is not None:
                self._step_at = None if message.get("closing") else self._clock()
                self._warm = self._warm or bool(message["rounds"])

    def no_step_for(self, hangs_after_s: float) -> float | None:
        """How long the leader has given no sign of an inner step, where that is too long. To be asked all the time."""
        with self._lock:
            now = self._clock()
            if now - self._looked_at > STOOD_STILL_S:
                self._beats.clear()
                self._step_at = None if self._step_at is None else now
            self._looked_at = now
            silent_s = now - self._step_at if self._step_at is not None else 0.0
            return silent_s if silent_s > (hangs_after_s if self._warm else COLD * hangs_after_s) else None

    def no_beat_for(self, worker: str, last_seen: float) -> float | None:
        """How long a worker's process has given no heartbeat, where that is too long. `last_seen`: what the scheduler says now."""
        with self._lock:
            beat, since = self._beats.get(worker, (math.nan, 0.0))
            if beat != last_seen:
                since = self._clock()
                self._beats[worker] = last_seen, since
            silent_s = self._clock() - since
            return silent_s if silent_s > FROZEN_S else None
