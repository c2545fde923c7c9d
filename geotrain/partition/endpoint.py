"""A leader's end of the WAN: its transports, its certificate, and the directory of the others."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from geotrain.errors import BadCertificate, CannotListen
from geotrain.job import JobSpec
from geotrain.partition.orders import Directory
from geotrain.wan import certs
from geotrain.wan.flight import FlightTransport, reach
from geotrain.wan.mailbox import MailboxTransport
from geotrain.wan.routed import Routed
from geotrain.wan.shaped import Line, Shaped
from geotrain.wan.transport import Identity, Inbox, Transport


class Endpoint:
    """Opened with a seat, introduced to the others at every segment. Raises CannotListen, BadCertificate, MailboxUnusable."""

    def __init__(self, job: JobSpec, identity: Identity, give_up_s: float, event: Callable[[str, dict[str, Any]], None]) -> None:
        region = identity.region
        self.job, self.region, self.event = job, region, event
        self.credentials: certs.Credentials | None = None
        self.credentials = self._load()
        self.inbox = Inbox()
        self.directory = Directory({}, {})
        self.addresses: dict[str, str] = {}
        self._peers: dict[str, dict[str, str]] = {"flight": {}, "mailbox": {}}
        self.flight: FlightTransport | None = None
        self.mailbox: MailboxTransport | None = None
        ways = ways_of(job, region)
        if "flight" in ways:
            self.flight = self._open_flight(identity, give_up_s)
            self.addresses["flight"] = job.region(region).wan.advertise or self.flight.address
        if "mailbox" in ways:
            self.mailbox = self._open_mailbox(identity, give_up_s)
            self.addresses["mailbox"] = self.mailbox.address
        both = {name: transport for name, transport in (("flight", self.flight), ("mailbox", self.mailbox)) if transport is not None}
        self._routed = Routed(region, both, self.inbox, lambda to: self.directory.ways.get(f"{region}>{to}"))
        line = job.shape and Line(job.shape.mbit_per_s, job.shape.rtt_ms)
        self.transport: Transport = Shaped(self._routed, lambda to: line) if line else self._routed

    def _load(self) -> certs.Credentials | None:
        files = self.job.region(self.region).wan.security
        if files is None:
            return None
        own = certs.load(self.region, files)
        if own.expires_soon() and own != self.credentials:
            self.event("certificate_expires", {"path": files.cert, "on": own.expires.isoformat()})
        return own

    def _open_flight(self, identity: Identity, give_up_s: float) -> FlightTransport:
        listen = self.job.region(self.region).wan.listen
        try:
            return FlightTransport(
                identity,
                listen,
                self._peers["flight"],
                credentials=self.credentials,
                inbox=self.inbox,
                give_up_s=give_up_s,
                expect=self._expected,
            )
        except (OSError, pa.ArrowException) as error:
            raise CannotListen(self.region, listen, error) from error

    def _open_mailbox(self, identity: Identity, give_up_s: float) -> MailboxTransport:
        boxes = {spec.name: box for spec in self.job.regions if (box := self.job.mailbox_of(spec.name)) is not None}
        own = boxes[self.region]
        return MailboxTransport(
            identity, own, self._peers["mailbox"], boxes, credentials=self.credentials, inbox=self.inbox, give_up_s=give_up_s
        )

    def _expected(self, to: str) -> tuple[float, float]:
        """(round trip in seconds, bytes per second) of the link there, as the job or the plan says."""
        line = self.job.link(self.region, to)
        return line.rtt_ms / 1000, line.mbit_per_s * 1e6 / 8

    def introduce(self, directory: Directory) -> None:
        """Learn where the others are. What is under way to one that has left, or has another address now, is dropped."""
        before, self.directory = self.directory, directory
        for other, addresses in before.addresses.items():
            if directory.addresses.get(other) != addresses:
                self._routed.forget(other)
                for peers in self._peers.values():
                    peers.pop(other, None)
        for other, addresses in directory.addresses.items():
            for way, address in addresses.items():
                self._peers[way][other] = address
            if self.mailbox is not None and directory.ways.get(f"{other}>{self.region}") == "mailbox":
                self.mailbox.listen(other)

    def renew(self) -> None:
        """Take a new certificate into use if there is one; nothing may be under way.

        A certificate that cannot be used leaves the old one in its place, and is told.
        """
        try:
            new = self._load()
        except BadCertificate as error:
            self.event("certificate_refused", {"reason": error.message})
            return
        if new is None or new == self.credentials:
            return
        self.credentials = new
        for transport in (self.flight, self.mailbox):
            if transport is not None:
                transport.renew(new)
        self.event("certificate_renewed", {"until": new.expires.isoformat()})

    def reach(self, addresses: dict[str, str]) -> dict[str, str | None]:
        """Region -> why it cannot be dialled from here; None where it can."""
        return {other: reach(address, other, self.credentials, self._expected(other)[0]) for other, address in addresses.items()}

    def silent(self) -> dict[str, float]:
        """Region -> for how many seconds it has answered nothing of what is being sent to it."""
        return self.flight.silent() if self.flight is not None else {}

    def close(self) -> None:
        self.transport.close()


def ways_of(job: JobSpec, region: str) -> set[str]:
    """The transports that a region's endpoint needs, for what it sends and for what comes."""
    others = [spec.name for spec in job.regions if spec.name != region]
    wanted: set[str] = {job.link(*pair).transport for other in others for pair in ((region, other), (other, region))}
    ways = wanted - {"auto"} or {"flight"}
    if "auto" in wanted:
        ways.add("flight")
        if job.mailbox_of(region) is not None and any(job.mailbox_of(other) is not None for other in others):
            ways.add("mailbox")
    return ways
