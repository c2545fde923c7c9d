"""What a leader tells the control plane while it trains: round records, events and signs of life, a few messages a second."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from distributed import get_worker

from geotrain.partition.endpoint import Endpoint
from geotrain.partition.orders import topic
from geotrain.partition.server import RoundRecord
from geotrain.sync.messages import RoundMade

EVERY_S = 0.5
ROUND_EVERY_S = 0.1
"""A round is told at once, unless they are shorter: what is lost with a leader, its last rounds not told among it, is to be little."""


class Reporter:
    """Gathers round records and sends them together."""

    def __init__(self, scope: str, region: str, life: int) -> None:
        self.topic, self.life, self._worker = topic(scope, region), life, get_worker()
        self.epoch = -1
        """Of the view that the leader has taken last."""
        self.endpoint: Endpoint | None = None
        """The leader's: what it carried and refused is told with the rounds."""
        self.settled: Mapping[str, int] = {}
        """The parameter server's."""
        self.waits_for: Callable[[], str | None] = lambda: None
        """The parameter server's."""
        self._waits = False
        """As it was told."""
        self._rounds: list[dict[str, Any]] = []
        self._held: list[list[Any]] = []
        self._sent_at = 0.0

    def round(self, record: RoundRecord) -> None:
        self._rounds.append({**record.to_dict(), "life": self.life})
        if time.monotonic() - self._sent_at > ROUND_EVERY_S:
            self.flush()

    def holds(self, made: RoundMade) -> None:
        """A round of another region is in what this one holds: should the other be lost before it told of it, this one did."""
        self._held.append([getattr(made, name) for name in RoundMade.__slots__])

    def tell(self) -> None:
        """Now and then, what there is to tell; at once that a wait is over, since the next step may take long."""
        if time.monotonic() - self._sent_at > EVERY_S or (self._waits and self.waits_for() is None):
            self.flush()

    def event(self, name: str, facts: dict[str, Any]) -> None:
        self.say({"event": {"event": name, "at": time.time(), **facts}})

    def say(self, message: dict[str, Any]) -> None:
        """At once, from any thread."""
        self._worker.log_event(self.topic, {**message, "life": self.life})

    def notice(self) -> None:
        """This worker's machine is about to be taken away."""
        self.say({"notice": self._worker.address})

    def close(self) -> None:
        """The last inner step of a segment is made; what follows takes its time."""
        self.flush(closing=True)

    def flush(self, *, closing: bool = False) -> None:
        if self.endpoint is not None:
            for refusal in self.endpoint.inbox.news():
                self.event("refused", refusal)
            links = {to: link.to_dict() for to, link in list(self.endpoint.transport.traffic.items())} if self._rounds else {}
            silent = {to: round(seconds, 1) for to, seconds in self.endpoint.silent().items()}
            waits_for = None if closing or silent else self.waits_for()
            words = {"rounds": self._rounds, "links": links, "settled": dict(self.settled), "held": self._held}
            self.say({**words, "silent": silent, "closing": closing, "waits_for": waits_for, "epoch": self.epoch})
            self._waits = waits_for is not None
        else:
            self.say({"rounds": []})  # the leader, which waits for this worker, can say nothing
        self._rounds, self._held, self._sent_at = [], [], time.monotonic()
