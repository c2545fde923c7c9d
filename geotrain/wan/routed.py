"""Several transports of one endpoint: every link has its own way, all that comes goes into one inbox."""

import time
from collections.abc import Callable, Mapping

from torch import Tensor

from geotrain.errors import PeerUnreachable
from geotrain.sync.messages import Update
from geotrain.wan.flight import FlightTransport
from geotrain.wan.mailbox import MailboxTransport
from geotrain.wan.transport import Delivery, Inbox, LinkTraffic

Way = Callable[[str], str | None]


class Routed:
    """`ways`: the transports by name, which share `inbox`. `way`: region -> the name of the one to take there, None: it has left."""

    def __init__(self, region: str, ways: Mapping[str, FlightTransport | MailboxTransport], inbox: Inbox, way: Way) -> None:
        self.region, self.ways, self.inbox, self.way = region, ways, inbox, way
        self.traffic: dict[str, LinkTraffic] = {}
        for transport in ways.values():
            transport.traffic = self.traffic

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        if (name := self.way(to)) is None:
            return
        if name not in self.ways:
            raise PeerUnreachable(self.region, to, name, "this endpoint was opened without that transport")
        self.ways[name].send(to, update, payload)

    def forget(self, peer: str) -> None:
        """Drop what is under way to a peer that has left."""
        for transport in self.ways.values():
            transport.forget(peer)

    def receive(self, timeout_s: float) -> Delivery | None:
        for transport in self.ways.values():
            transport.check()
        return self.inbox.get(timeout_s)

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        return all(transport.drain(max(0.0, until - time.monotonic())) for transport in self.ways.values())

    def close(self) -> None:
        for transport in self.ways.values():
            transport.close()
