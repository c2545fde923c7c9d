"""Updates in parts: what makes a transfer resumable, on both ends, without a network. Pure state machines; callers hold a lock.

A sender numbers its updates to one peer and cuts each into parts that travel on their own, several at a time. The receiver puts
them together in memory that it takes once, whatever the order and however often they come, and hands updates over in the order of
their numbers, each once. A transfer that was cut goes on with the parts that are missing.
"""

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geotrain.sync.messages import Update
from geotrain.wan.timing import PART_BYTES
from geotrain.wan.transport import Delivery, Once, header_of, update_of

Bytes = NDArray[np.uint8]
AHEAD = 256
"""Updates that a sender may be ahead of the first that is not whole; more is no honest sender's."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [offset, offset + length) of an update of `size` bytes."""

    life: int
    """Of the sender as far as this peer is concerned, later lives having higher numbers: what an earlier one began is void."""
    number: int
    """Of the update, counted by the sender for this peer."""
    base: int
    """Every update with a lower number is acknowledged."""
    update: Update
    size: int
    offset: int
    length: int
    crc: int
    """CRC-32 of the part."""

    def header(self) -> dict[str, Any]:
        names = ("life", "number", "base", "size", "offset", "length", "crc")
        return {"update": header_of(self.update)} | {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, header: dict[str, Any]) -> "Part":
        """Raises ValueError when a field is absent, of another type, or fits no part."""
        names = ("life", "number", "base", "size", "offset", "length", "crc")
        values = {name: header.get(name) for name in names}
        for name, value in values.items():
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"part field {name} is {value!r}")
        if not isinstance(inner := header.get("update"), dict):
            raise ValueError(f"part field update is {inner!r}")
        part = cls(update=update_of(inner), **values)  # type: ignore[arg-type]
        if part.base > part.number or part.offset + part.length > part.size or part.length > PART_BYTES:
            raise ValueError(f"part {part.offset}+{part.length} of {part.size} bytes, update {part.number}, base {part.base}")
        if not part.length and part.size:
            raise ValueError("an empty part of an update that is not empty")
        return part


Answer = Literal["taken", "have", "later"]
"""What a receiver says to a part: it is in; it was in; there is no room now, try again."""


@dataclass(slots=True)
class _Assembly:
    update: Update
    memory: Bytes
    filled: dict[int, int] = field(default_factory=dict)
    """Offset -> length of the parts that are in."""
    bytes: int = 0


@dataclass(slots=True)
class _Origin:
    life: int
    next: int
    """The number of the next update to hand over."""
    assemblies: dict[int, _Assembly] = field(default_factory=dict)
    whole: dict[int, Delivery] = field(default_factory=dict)


class Assembler:
    """The receiving end. `largest`: bytes of an update; `room`: bytes of memory for all that is not taken yet."""

    def __init__(self, life: int, largest: int, room: int, deliver: Callable[[Delivery], None]) -> None:
        self.life = life
        """Said with every answer: a later one has nothing of what was begun in this."""
        self.largest, self.room, self.deliver = largest, max(room, largest), deliver
        self.held = 0
        """Bytes of assemblies, and of updates that are whole and not taken."""
        self.waiting = 0
        """Bytes of updates that were handed over and are not taken: only the caller's taking makes room of them."""
        self._origins: dict[str, _Origin] = {}
        self._once = Once()

    def begin(self, part: Part) -> Bytes | Answer:
        """The memory to fill, or the answer where nothing is to be filled. Raises ValueError for what no honest sender sends."""
        if part.size > self.largest:
            raise ValueError(f"announces {part.size} bytes, this model sends at most {self.largest}")
        origin = self._origin(part)
        if part.base > origin.next:
            self._skip(part.update.origin, origin, part.base)
        if part.number >= origin.next + AHEAD:
            raise ValueError(f"update {part.number}, {origin.next} is next")
        if part.number < origin.next or part.number in origin.whole:
            return "have"
        assembly = origin.assemblies.get(part.number)
        if assembly is None:
            if self._has_no_room(part.size, first=part.number == origin.next):
                return "later"
            assembly = origin.assemblies[part.number] = _Assembly(part.update, np.empty(part.size, dtype=np.uint8))
            self.held += part.size
        if assembly.update != part.update or assembly.memory.size != part.size:
            raise ValueError(f"update {part.number} is another than its earlier parts said")
        if part.offset in assembly.filled:
            return "have"
        return assembly.memory[part.offset : part.offset + part.length]

    def _has_no_room(self, size: int, *, first: bool) -> bool:
        """What is to be handed over next need not wait for later updates that are here already: those wait for it."""
        taken = self.waiting if first else self.held
        return bool(taken) and taken + size > self.room

    def _origin(self, part: Part) -> _Origin:
        name = part.update.origin
        origin = self._origins.get(name)
        if origin is None or part.life > origin.life:
            if origin is not None:
                self._drop(origin)
            origin = self._origins[name] = _Origin(part.life, part.base)
        if part.life < origin.life:
            raise ValueError(f"from an earlier life of {name}")
        return origin

    def _drop(self, origin: _Origin, before: int = 2**63) -> None:
        """What is not handed over of the updates before that number."""
        for number in [number for number in origin.assemblies if number < before]:
            self.held -= origin.assemblies.pop(number).memory.size
        for number in [number for number in origin.whole if number < before]:
            self.held -= origin.whole.pop(number).payload.numel()

    def _skip(self, name: str, origin: _Origin, base: int) -> None:
        """An earlier life of this receiver acknowledged all before `base`."""
        self._drop(origin, base)
        origin.next = base
        self._hand_over(name, origin)

    def fill(self, part: Part) -> Answer:
        """The part's bytes are in the memory that `begin` gave; hand over what is whole, in order. Another thread may have been faster."""
        origin = self._origins[part.update.origin]
        assembly = origin.assemblies.get(part.number) if origin.life == part.life else None
        if assembly is None or part.offset in assembly.filled:
            return "have"
        assembly.filled[part.offset] = part.length
        assembly.bytes += part.length
        if assembly.bytes == assembly.memory.size:
            del origin.assemblies[part.number]
            origin.whole[part.number] = Delivery(assembly.update, torch.from_numpy(assembly.memory))
            self._hand_over(part.update.origin, origin)
        return "taken"

    def _hand_over(self, name: str, origin: _Origin) -> None:
        while (delivery := origin.whole.pop(origin.next, None)) is not None:
            origin.next += 1
            if self._once.first(delivery.update):
                self.waiting += delivery.payload.numel()
                self.deliver(delivery)
            else:
                self.held -= delivery.payload.numel()

    @property
    def full(self) -> bool:
        """There is no room for another update of the largest size until some are taken."""
        return bool(self.waiting) and self.waiting + self.largest > self.room

    def took(self, delivery: Delivery) -> None:
        """A delivery was taken out of the inbox."""
        self.waiting -= delivery.payload.numel()
        self.held -= delivery.payload.numel()


@dataclass(slots=True)
class Outgoing:
    """An update on its way to one peer."""

    number: int
    update: Update
    payload: Bytes
    since: float
    """When it was handed over."""
    alone: bool = False
    """Nothing else was on its way then."""
    fresh: int = 0
    """Bytes before it were sent at least once."""
    again: deque[tuple[int, int]] = field(default_factory=deque)
    """(offset, length) of parts to be sent once more, as they were cut."""
    open: int = 0
    """Parts that were cut and are not acknowledged."""
    begun: bool = False

    @property
    def whole(self) -> bool:
        return self.begun and self.fresh == self.payload.size and not self.open

    def cut(self, part_bytes: int) -> tuple[int, int] | None:
        """(offset, length) of the next part; None when all are under way."""
        if self.again:
            return self.again.popleft()
        if self.begun and self.fresh == self.payload.size:
            return None
        offset, self.begun = self.fresh, True
        self.open += 1
        self.fresh = min(offset + part_bytes, self.payload.size)
        return offset, self.fresh - offset


@dataclass(frozen=True, slots=True)
class Sent:
    """A part under way."""

    outgoing: Outgoing
    part: Part
    epoch: int
    """How many lives of the receiver were heard of when it was sent."""

    @property
    def data(self) -> Bytes:
        return self.outgoing.payload[self.part.offset : self.part.offset + self.part.length]


class Outbox:
    """The sending end, for one peer: which part goes next, and what is acknowledged."""

    def __init__(self, life: int, part_bytes: int = PART_BYTES) -> None:
        self.life, self.part_bytes = life, part_bytes
        self.receiver: int | None = None
        """The life of the receiver that acknowledged so far."""
        self._epoch = 0
        self._updates: deque[Outgoing] = deque()
        self._numbered = 0

    def put(self, update: Update, payload: Tensor, now: float) -> None:
        self._updates.append(Outgoing(self._numbered, update, payload.numpy(), now, alone=not self._updates))
        self._numbered += 1

    @property
    def pending(self) -> int:
        """Updates that are not acknowledged."""
        return len(self._updates)

    @property
    def pending_bytes(self) -> int:
        return sum(outgoing.payload.size for outgoing in self._updates)

    @property
    def base(self) -> int:
        """The number of the first update that is not acknowledged."""
        return self._updates[0].number if self._updates else self._numbered

    def next(self, *, first_only: bool = False) -> Sent | None:
        """The next part to send; None when nothing is left or the peer is too far behind.

        `first_only`: of the first update that is not acknowledged.
        """
        base = self.base
        for outgoing in self._updates:
            if outgoing.number >= base + (1 if first_only else AHEAD):
                return None
            if (found := outgoing.cut(self.part_bytes)) is not None:
                offset, length = found
                crc = zlib.crc32(outgoing.payload[offset : offset + length].data)
                part = Part(self.life, outgoing.number, base, outgoing.update, outgoing.payload.size, offset, length, crc)
                return Sent(outgoing, part, self._epoch)
        return None

    def failed(self, sent: Sent) -> None:
        """Not answered, or there was no room: it goes again, as it was cut."""
        if sent.epoch == self._epoch:
            sent.outgoing.again.append((sent.part.offset, sent.part.length))

    def answered(self, sent: Sent, receiver: int) -> list[Outgoing]:
        """A part is in, says that life of the receiver. Returns the updates that are acknowledged now, in order.

        A receiver in a new life has nothing of what is not whole yet: all of that goes again.
        """
        if self.receiver is None:
            self.receiver = receiver
        if sent.epoch != self._epoch:
            return []
        if receiver < self.receiver:
            self.failed(sent)
            return []
        if receiver > self.receiver:
            self.receiver, self._epoch = receiver, self._epoch + 1
            for outgoing in self._updates:
                outgoing.fresh, outgoing.open, outgoing.begun = 0, 0, False
                outgoing.again.clear()
            return []
        sent.outgoing.open -= 1
        done = []
        while self._updates and self._updates[0].whole:
            done.append(self._updates.popleft())
        return done
