"""The transport protocol: how updates travel between the leaders of regions."""

import hashlib
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from geotrain.sync.messages import Kind, RoundMade, Update

LARGEST_HEADER = 2**20
"""Bytes; more is not parsed. A merge names its members and the rounds that are in it, so that a thousand of them fit."""


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
    requests: int = 0
    """To the mailbox, for this peer: what is written for it and what it wrote."""
    rtt_s: float = 0.0
    """The last measured round trip of a small message, or of a small request to the mailbox; 0 where none was measured."""
    bytes_per_s: float = 0.0
    """Goodput of late, while there was something to send."""
    busy_s: float = 0.0
    """Time with something to send."""
    blocked_s: float = 0.0
    """The part of it in which this region made no inner step; the rest was hidden behind compute."""
    busy_since: float | None = None
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def begin(self, now: float) -> None:
        """There is something to send."""
        with self._counting:
            if self.busy_since is None:
                self.busy_since = now

    def end(self, now: float) -> None:
        """All is acknowledged."""
        with self._counting:
            self._count(now)
            self.busy_since = None

    def busy(self, now: float) -> float:
        """Seconds so far; never less than it said before, though another thread may have looked at the clock earlier and come later."""
        with self._counting:
            self._count(now)
            return self.busy_s

    def _count(self, now: float) -> None:
        if self.busy_since is not None and now > self.busy_since:
            self.busy_s, self.busy_since = self.busy_s + now - self.busy_since, now

    def to_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("busy_since", "_counting")}


@dataclass(frozen=True, slots=True)
class Delivery:
    """An update that arrived whole, once."""

    update: Update
    payload: Tensor
    """[wire_bytes] uint8 on the CPU."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an endpoint is, and what it asks of those that send to it."""

    run: str
    region: str
    token: str
    """Of the run; nobody else knows it."""
    model: str
    """Digest of the model's fingerprint."""
    life: int
    """Higher than that of any endpoint that this region had in this run, by more than the times that a peer leaves: nanoseconds."""
    regions: frozenset[str]
    """Of the job: nobody else is listened to."""
    largest_payload: int
    """Bytes; what announces more is refused."""


def model_digest(fingerprint: Mapping[str, str]) -> str:
    """SHA-256 of {name: shape and dtype}, hex."""
    return hashlib.sha256("\n".join(f"{name} {what}" for name, what in sorted(fingerprint.items())).encode()).hexdigest()


class Inbox:
    """What came and is not taken yet, and what was refused. Transports of one endpoint share it."""

    KINDS_OF_REFUSAL = 1000
    """More are counted together, so that nobody can fill the memory."""

    def __init__(self) -> None:
        self.refused: Counter[tuple[str, str]] = Counter()
        """(who, why) -> how often."""
        self._told: Counter[tuple[str, str]] = Counter()
        self._arrived: queue.Queue[tuple[Delivery, Callable[[Delivery], None]]] = queue.Queue()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Updates that came and are not taken."""
        return self._arrived.qsize()

    def put(self, delivery: Delivery, taken: Callable[[Delivery], None]) -> None:
        """`taken`: called in the thread that takes it."""
        self._arrived.put((delivery, taken))

    def get(self, timeout_s: float) -> Delivery | None:
        try:
            delivery, taken = self._arrived.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        taken(delivery)
        return delivery

    def refuse(self, who: str, why: str) -> str:
        """Count it; returns `why`, shortened."""
        key = (who[:100], why[:300])
        with self._lock:
            if key not in self.refused and len(self.refused) >= self.KINDS_OF_REFUSAL:
                key = ("others", "much else")
            self.refused[key] += 1
        return key[1]

    def news(self) -> list[dict[str, Any]]:
        """What was refused since the last time: {from, reason, times}."""
        with self._lock:
            new = self.refused - self._told
            self._told = self.refused.copy()
        return [{"from": who, "reason": why, "times": times} for (who, why), times in new.items()]


class Once:
    """Knows the keys of what was handed over, so that a copy that a sender's next life sends is known as one."""

    REMEMBERED = 4096
    """Per origin."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[set[tuple[Any, ...]], deque[tuple[Any, ...]]]] = {}

    def first(self, update: Update) -> bool:
        """Whether it is new; from then on it is known."""
        known, order = self._known.setdefault(update.origin, (set(), deque()))
        if update.key in known:
            return False
        known.add(update.key)
        order.append(update.key)
        if len(order) > self.REMEMBERED:
            known.remove(order.popleft())
        return True


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
    made = [[getattr(made, name) for name in RoundMade.__slots__] for made in update.made]
    return {**values, "kind": update.kind.value, "members": list(update.members), "made": made}


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
    facts = {name: header[name] for name in fields}
    return Update(Kind(header.get("kind")), **facts, last=last, members=tuple(members), made=_made_of(header), lineage=lineage)


def _made_of(header: dict[str, Any]) -> tuple[RoundMade, ...]:
    """Raises ValueError."""
    made = header.get("made")
    if type(made) is not list or not all(type(one) is list and [type(value) for value in one] == [str, *6 * [int]] for one in made):
        raise ValueError(f"header field made is {made!r}")
    return tuple(RoundMade(*one) for one in made)
