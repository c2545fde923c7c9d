"""The transport protocol: how updates travel between the leaders of regions."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from geotrain.sync.messages import Kind, Update


@dataclass(slots=True)
class LinkTraffic:
    """What one directed link carried, as its sender saw it."""

    updates: int = 0
    payload_bytes: int = 0
    """Encoded updates, each counted once."""
    wire_bytes: int = 0
    """With headers, and with what was sent again."""
    seconds: float = 0.0
    """From handing over to acknowledgement, summed; waiting behind earlier updates included."""
    retries: int = 0
    rtt_s: float = 0.0
    """The last measured round trip of a small message; 0 where none was measured."""
    bytes_per_s: float = 0.0
    """Goodput of late, while there was something to send."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Delivery:
    """An update that arrived whole, once."""

    update: Update
    payload: Tensor
    """[wire_bytes] uint8 on the CPU."""


class Transport(Protocol):
    """Moves updates between regions.

    Every implementation delivers each update exactly once, in order per origin, however often the link fails underneath,
    until it is closed.
    """

    traffic: dict[str, LinkTraffic]
    """Per target region."""

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        """Queue an update and return at once. The payload must not change afterwards.

        Raises what became of an earlier send for good, as `receive` and `drain` do: PeerUnreachable when a peer has not been
        reached for too long, UpdateRefused when it will not have what it is sent.
        """

    def receive(self, timeout_s: float) -> Delivery | None:
        """The next update that arrived; None when none did within `timeout_s` (0: only look)."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was sent is acknowledged; False when it is not within `timeout_s`."""

    def close(self) -> None:
        """Give back threads and ports; what is still queued is dropped."""


def header_of(update: Update) -> dict[str, Any]:
    """The header as JSON-able values."""
    values = {name: getattr(update, name) for name in Update.__slots__}
    return {**values, "kind": update.kind.value, "members": list(update.members)}


def update_of(header: dict[str, Any]) -> Update:
    """The header back. Raises ValueError when a field is absent or of another type."""
    fields: dict[str, type] = {"epoch": int, "origin": str, "round": int, "fragment": int, "samples": int}
    for name, kind in fields.items():
        value = header.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"header field {name} is {value!r}")
    last, members, lineage = header.get("last"), header.get("members"), header.get("lineage")
    if last is not None and (type(last) is not int or last < 0):
        raise ValueError(f"header field last is {last!r}")
    if type(members) is not list or not all(type(member) is str for member in members):
        raise ValueError(f"header field members is {members!r}")
    if type(lineage) is not int or lineage < -1:
        raise ValueError(f"header field lineage is {lineage!r}")
    return Update(Kind(header.get("kind")), **{name: header[name] for name in fields}, last=last, members=tuple(members), lineage=lineage)
