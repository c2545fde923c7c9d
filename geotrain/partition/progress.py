"""What a leader tells the control plane while it trains: round records and events, a few messages a second."""

import time
from typing import Any

from distributed import get_worker

from geotrain.partition.orders import topic
from geotrain.partition.server import RoundRecord
from geotrain.wan.transport import LinkTraffic

EVERY_S = 0.5


class Reporter:
    """Gathers round records and sends them together."""

    def __init__(self, run: str, region: str) -> None:
        self.topic = topic(run, region)
        self.traffic: dict[str, LinkTraffic] = {}
        self._rounds: list[dict[str, Any]] = []
        self._sent_at = 0.0

    def round(self, record: RoundRecord) -> None:
        self._rounds.append(record.to_dict())
        if time.monotonic() - self._sent_at > EVERY_S:
            self.flush()

    def event(self, name: str, facts: dict[str, Any]) -> None:
        get_worker().log_event(self.topic, {"event": {"event": name, "at": time.time(), **facts}})

    def flush(self) -> None:
        if self._rounds:
            get_worker().log_event(
                self.topic, {"rounds": self._rounds, "wire_bytes": sum(link.wire_bytes for link in list(self.traffic.values()))}
            )
        self._rounds, self._sent_at = [], time.monotonic()
