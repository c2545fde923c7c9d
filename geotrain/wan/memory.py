"""The transport inside one process: for tests, and for a look at what the others must do."""

import queue
from dataclasses import dataclass, field

from torch import Tensor

from geotrain.sync.messages import Update
from geotrain.wan.transport import Delivery, LinkTraffic, Once


@dataclass
class Exchange:
    """The place where memory transports meet."""

    inboxes: dict[str, "queue.Queue[Delivery]"] = field(default_factory=dict)


class MemoryTransport:
    """Delivers by handing over the tensor."""

    def __init__(self, region: str, exchange: Exchange) -> None:
        self.region, self.exchange = region, exchange
        self.traffic: dict[str, LinkTraffic] = {}
        self._inbox: queue.Queue[Delivery] = exchange.inboxes.setdefault(region, queue.Queue())
        self._once = Once()

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        link = self.traffic.setdefault(to, LinkTraffic())
        link.updates += 1
        link.payload_bytes += payload.numel()
        link.wire_bytes += payload.numel()
        self.exchange.inboxes.setdefault(to, queue.Queue()).put(Delivery(update, payload))

    def receive(self, timeout_s: float) -> Delivery | None:
        while True:
            try:
                delivery = self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
            except queue.Empty:
                return None
            if self._once.first(delivery.update):
                return delivery

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.exchange.inboxes.pop(self.region, None)
