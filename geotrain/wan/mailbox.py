"""Updates through a bucket: every region writes into its own box and reads those of the others, so nobody has to be reachable.

An update to a peer is cut into parts, an object each, that are named by number: the reader knows the next name and asks for it, so
that nothing is ever listed. What a reader has taken whole it acknowledges in one small object of its own box; the writer then removes
the parts. Objects are authenticated with the run's token, and signed by their writer where regions have certificates, so that what
somebody else writes into a bucket is refused. Requests per update of P parts, about: P to write, P to read, one each to acknowledge,
to see that and to remove, and what looking for the next one takes: POLLS_PER_GAP of the usual time between two updates.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geotrain.data.store import open_url
from geotrain.errors import DataError, MailboxUnusable, WanError
from geotrain.job import Mailbox
from geotrain.stores import STORE_ERRORS, write_whole
from geotrain.sync.messages import Update
from geotrain.wan.certs import Credentials
from geotrain.wan.sealed import Seal
from geotrain.wan.transport import Delivery, Identity, Inbox, LinkTraffic, Once, header_of, update_of

PART_BYTES = 2**22
"""Of an object: large beside what a request costs, small beside what a cut may lose."""
AT_ONCE = 4
"""Requests under way in each direction of a link."""
ROOM = 4
"""Updates of the largest size that are written and not acknowledged, and that are read and not taken."""
POLLS_PER_GAP = 20
LONGEST_POLL_S = 5.0
ADDRESS_S = 0.05
"""A peer's address is filled in by the training thread, which does not tell: how often it is looked at."""
RETRIES = 4
"""Of one request, by s3fs, with its growing pauses. After that the transport itself goes on, until it gives up or is closed."""


@dataclass(slots=True)
class Box:
    """A folder or bucket, opened for one region's use."""

    fs: Any
    path: str

    def read(self, *names: str) -> bytes | None:
        """None when there is no such object."""
        try:
            content: bytes = self.fs.cat_file("/".join([self.path, *names]))
            return content
        except FileNotFoundError:
            return None

    def write(self, content: bytes, *names: str) -> None:
        write_whole(self.fs, "/".join([self.path, *names]), content)

    def remove(self, names: list[str]) -> None:
        try:
            self.fs.rm([f"{self.path}/{name}" for name in names])
        except FileNotFoundError:
            return

    def remove_all(self) -> None:
        try:
            self.fs.rm(self.path, recursive=True)
        except FileNotFoundError:
            return


def open_box(region: str, box: Mailbox, url: str, patience_s: float) -> Box:
    """`url`: within the mailbox. Raises MailboxUnusable."""
    more: dict[str, Any] = {}
    if url.startswith("s3://"):
        timeouts = {"connect_timeout": patience_s, "read_timeout": patience_s, "max_pool_connections": 4 * AT_ONCE}
        more = {"use_listings_cache": False, "config_kwargs": {**timeouts, "retries": {"mode": "standard", "max_attempts": 1}}}
    try:
        fs, path = open_url(region, url, box.storage_options, **more)
    except DataError as error:
        raise MailboxUnusable(region, url, error.message) from error
    if hasattr(fs, "retries"):
        fs.retries = RETRIES
    return Box(fs, path)


class MailboxTransport:
    """One leader's endpoint: a thread that writes for each peer that is sent to, and one that reads for each that sends this way."""

    def __init__(
        self,
        identity: Identity,
        own: Mailbox,
        peers: Mapping[str, str],
        boxes: Mapping[str, Mailbox],
        *,
        credentials: Credentials | None = None,
        inbox: Inbox | None = None,
        give_up_s: float = 120.0,
    ) -> None:
        """`own`: where this region writes. `peers`: region -> the address that its endpoint told, which may be filled later.

        `boxes`: region -> its mailbox, for the options with which it is read. Raises MailboxUnusable.
        """
        self.identity, self.peers, self.boxes = identity, peers, boxes
        self.inbox = inbox or Inbox()
        self.seal = Seal(identity, credentials)
        self.traffic: dict[str, LinkTraffic] = {}
        self.give_up_s = give_up_s
        self.once = Once()
        self.room = threading.Condition()
        self.held = 0
        """Bytes that are read and not taken."""
        place = "/".join([own.url.rstrip("/"), identity.run, identity.region])
        self.address = f"{place}/{identity.life}"
        self.box = open_box(identity.region, own, self.address, self.patience_s)
        self._sweep(open_box(identity.region, own, place, self.patience_s))
        self._writers: dict[str, _Writer] = {}
        self._readers: dict[str, _Reader] = {}
        self._left: list[_Worker] = []
        """To and from peers that have left."""

    @property
    def patience_s(self) -> float:
        """How long one request may go without a byte."""
        return self.give_up_s / AT_ONCE

    def _sweep(self, place: Box) -> None:
        """Remove what earlier lives of this region left, and see that this one may write."""
        try:
            for name in place.fs.ls(place.path, detail=False) if place.fs.exists(place.path) else []:
                if (life := str(name).rstrip("/").rsplit("/", 1)[-1]).isdigit() and int(life) < self.identity.life:
                    Box(place.fs, name).remove_all()
            self.box.write(self.seal.close({"life": self.identity.life}), "here")
        except STORE_ERRORS as error:
            raise MailboxUnusable(self.identity.region, self.address, error) from error

    def link(self, peer: str) -> LinkTraffic:
        return self.traffic.setdefault(peer, LinkTraffic())

    def listen(self, peer: str) -> None:
        """Read what a peer writes from now on; its address may come later."""
        if peer not in self._readers:
            self._readers[peer] = _Reader(self, peer)

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        if to not in self._writers:
            self._writers[to] = _Writer(self, to)
        self._writers[to].put(update, payload)

    def forget(self, to: str) -> None:
        """A peer has left: what it did not acknowledge is dropped, and what became of the link is no error."""
        for workers in (self._writers, self._readers):
            if (worker := workers.pop(to, None)) is not None:
                worker.end()
                self._left.append(worker)

    def receive(self, timeout_s: float) -> Delivery | None:
        self.check()
        return self.inbox.get(timeout_s)

    def check(self) -> None:
        """Raises what became of reading or writing for good."""
        for worker in [*self._writers.values(), *self._readers.values()]:
            if worker.error is not None:
                raise worker.error

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        return all(writer.drain(max(0.0, until - time.monotonic())) for writer in list(self._writers.values()))

    def renew(self, credentials: Credentials) -> None:
        """Sign with another certificate from now on."""
        self.seal = Seal(self.identity, credentials)

    def close(self) -> None:
        """Ends the threads and removes this endpoint's objects."""
        workers = [*self._writers.values(), *self._readers.values(), *self._left]
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join()
        try:
            self.box.remove_all()
        except STORE_ERRORS:
            return  # the next life removes them, or the bucket's own rules do

    def took(self, delivery: Delivery) -> None:
        with self.room:
            self.held -= delivery.payload.numel()
            self.room.notify_all()


@dataclass(slots=True)
class _Outgoing:
    number: int
    update: Update
    payload: Tensor
    since: float
    parts: int = 0


class _Worker(ABC):
    """A thread with requests of its own: again and again until they are answered, or the transport gives up."""

    def __init__(self, owner: MailboxTransport, peer: str, name: str) -> None:
        self.owner, self.peer = owner, peer
        self.traffic = owner.link(peer)
        self.error: WanError | None = None
        self.changed = threading.Condition()
        self.over = threading.Event()
        self.rtt_s = 0.0
        """Of the last request."""
        self._alive_at = time.monotonic()
        self._counting = threading.Lock()
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"geotrain-{name}-{peer}")
        self.thread = threading.Thread(target=self._run, name=f"geotrain-{name}-{peer}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while not self.over.is_set():
                self.turn()
        except _Closed:
            return
        except Exception as error:  # whatever ended this thread, who waits for it must hear of it
            with self.changed:
                where = self.owner.address
                self.error = error if isinstance(error, WanError) else MailboxUnusable(self.owner.identity.region, where, repr(error))
                self.changed.notify_all()

    @abstractmethod
    def turn(self) -> None:
        """One piece of its work, or a wait for some. Raises _Closed, or a WanError that ends it."""

    def end(self) -> None:
        """Its thread ends with the request that it is in."""
        self.over.set()
        with self.changed:
            self.changed.notify_all()
        with self.owner.room:
            self.owner.room.notify_all()

    def join(self) -> None:
        self.thread.join()
        self.pool.shutdown()

    def ask(self, request: Callable[[], Any], url: str) -> Any:
        """The answer to a request, however often it takes. Raises MailboxUnusable after give_up_s without any."""
        pause = 0.05
        while True:
            if self.over.is_set():
                raise _Closed
            began = time.monotonic()
            with self._counting:
                self.traffic.requests += 1
            try:
                answer = request()
            except STORE_ERRORS as error:
                if time.monotonic() - self._alive_at > self.owner.give_up_s:
                    raise MailboxUnusable(self.owner.identity.region, url, error) from error
                with self._counting:
                    self.traffic.retries += 1
                self.over.wait(pause)
                pause = min(2 * pause, LONGEST_POLL_S)
                continue
            self._alive_at = now = time.monotonic()
            self.rtt_s = now - began
            return answer

    def box_of(self, peer: str) -> tuple[Box, str, int] | None:
        """A peer's box as its newest endpoint told, its address, and that endpoint's life."""
        if (address := self.owner.peers.get(peer)) is None:
            return None
        life = address.rsplit("/", 1)[-1]
        if not life.isdigit():
            return None
        return open_box(self.owner.identity.region, self.owner.boxes[peer], address, self.owner.patience_s), address, int(life)


class _Closed(Exception):
    """The worker is to end while a request is under way."""


class _Writer(_Worker):
    """Everything that goes to one peer."""

    def __init__(self, owner: MailboxTransport, to: str) -> None:
        self._waiting: deque[_Outgoing] = deque()
        self._written: deque[_Outgoing] = deque()
        self._number = 0
        self._theirs: tuple[Box, str, int] | None = None
        self._pause = 0.0
        super().__init__(owner, to, "writes-to")

    def put(self, update: Update, payload: Tensor) -> None:
        if self.error is not None:
            raise self.error
        with self.changed:
            self._waiting.append(_Outgoing(-1, update, payload, time.monotonic()))
            self.traffic.begin(time.monotonic())
            self.changed.notify_all()

    def end(self) -> None:
        super().end()
        self.traffic.end(time.monotonic())

    def drain(self, timeout_s: float) -> bool:
        with self.changed:
            done = self.changed.wait_for(lambda: self.error is not None or not (self._waiting or self._written), timeout_s)
        if self.error is not None:
            raise self.error
        return done

    def turn(self) -> None:
        self._meet()
        with self.changed:
            if self.over.is_set():
                return
            if self._theirs is None or not (self._waiting or self._written):
                self._alive_at = time.monotonic()
                self.changed.wait(ADDRESS_S if self._waiting else None)
                return
            full = sum(outgoing.payload.numel() for outgoing in self._written) > ROOM * self.owner.identity.largest_payload
            outgoing = self._waiting[0] if self._waiting and not full else None
        if outgoing is None:
            self._look()
            return
        self._write(outgoing)
        with self.changed:
            self._written.append(self._waiting.popleft())
            self._pause = 0.0

    def _meet(self) -> None:
        """The peer's endpoint; a new one has nothing of what is not acknowledged, so numbers begin anew and all of that goes again."""
        if self._theirs is not None and self.owner.peers.get(self.peer) == self._theirs[1]:
            return
        found = self.box_of(self.peer)
        with self.changed:
            self._theirs = found
            if found is not None:
                self._waiting.extendleft(reversed(self._written))
                self._written.clear()
                self._number = 0

    @property
    def _lives(self) -> list[int]:
        """Of the writer's endpoint and of the reader's: an object is for these two alone."""
        assert self._theirs is not None
        return [self.owner.identity.life, self._theirs[2]]

    @property
    def _folder(self) -> str:
        assert self._theirs is not None
        return f"to-{self.peer}/{self._theirs[2]}"

    def _write(self, outgoing: _Outgoing) -> None:
        data = outgoing.payload.numpy()
        outgoing.number, self._number = self._number, self._number + 1
        outgoing.parts = max(1, -(-data.size // PART_BYTES))
        began = time.monotonic()

        def put(index: int) -> None:
            part = data[index * PART_BYTES : (index + 1) * PART_BYTES]
            place = {"to": self.peer, "lives": self._lives, "number": outgoing.number, "index": index}
            content = self.owner.seal.close({**place, "size": data.size, "update": header_of(outgoing.update)}, part.tobytes())
            name = f"{self._folder}/{outgoing.number}.{index}"
            self.ask(lambda: self.owner.box.write(content, name), self.owner.address)
            with self._counting:
                self.traffic.wire_bytes += len(content)

        list(self.pool.map(put, range(outgoing.parts)))
        self.traffic.bytes_per_s = data.size / max(time.monotonic() - began, 1e-9)

    def _look(self) -> None:
        """Whether the peer has acknowledged; remove what it has."""
        assert self._theirs is not None
        box, address, _ = self._theirs
        content = self.ask(lambda: box.read("taken", self.owner.identity.region, str(self.owner.identity.life)), address)
        self.traffic.rtt_s = self.rtt_s
        taken = 0
        if content is not None:
            try:
                header, _ = self.owner.seal.open(content, self.peer)
                if header["lives"] != self._lives or type(header["next"]) is not int:
                    raise ValueError("of another endpoint")
                taken = header["next"]
            except (ValueError, KeyError) as error:
                self.owner.inbox.refuse(self.peer, f"an acknowledgement in {address}: {error}")
        with self.changed:
            done = [outgoing for outgoing in self._written if outgoing.number < taken]
            for outgoing in done:
                self._written.popleft()
                self.traffic.updates += 1
                self.traffic.payload_bytes += outgoing.payload.numel()
                self.traffic.seconds += time.monotonic() - outgoing.since
        if done:
            names = [f"{self._folder}/{outgoing.number}.{index}" for outgoing in done for index in range(outgoing.parts)]
            self.ask(lambda: self.owner.box.remove(names), self.owner.address)
            self._pause = 0.0
        with self.changed:
            if not (self._waiting or self._written or self.over.is_set()):
                self.traffic.end(time.monotonic())
            self.changed.notify_all()
            if self._written:  # a peer that is far behind is asked seldom
                self._pause = min(max(self.rtt_s, 0.01, 1.25 * self._pause), LONGEST_POLL_S)
                self.changed.wait(self._pause)


class _Reader(_Worker):
    """Everything that comes from one peer."""

    def __init__(self, owner: MailboxTransport, origin: str) -> None:
        self._next = 0
        self._theirs: tuple[Box, str, int] | None = None
        self._gap_s = 0.0
        """Smoothed time between two updates."""
        self._came_at: float | None = None
        super().__init__(owner, origin, "reads-from")

    def turn(self) -> None:
        if self._theirs is None or self.owner.peers.get(self.peer) != self._theirs[1]:
            self._theirs, self._next = self.box_of(self.peer), 0
            if self._theirs is None:
                self.over.wait(ADDRESS_S)
                return
        first = self._fetch(0)
        if first is None:
            return
        header, data = first
        size, update = header["size"], update_of(header["update"])
        memory = np.empty(size, dtype=np.uint8)

        def fill(index: int, part: memoryview) -> None:
            memory[index * PART_BYTES : index * PART_BYTES + len(part)] = np.frombuffer(part, dtype=np.uint8)

        fill(0, data)
        parts = max(1, -(-size // PART_BYTES))

        def fetch(index: int) -> bool:
            found = self._fetch(index, like=header)
            if found is not None:
                fill(index, found[1])
            return found is not None

        if not all(self.pool.map(fetch, range(1, parts))):
            return  # a new endpoint of the peer: it sends all of this again
        self._hand_over(Delivery(update, torch.from_numpy(memory)))

    def _hand_over(self, delivery: Delivery) -> None:
        owner, now = self.owner, time.monotonic()
        if self._came_at is not None:
            self._gap_s += 0.3 * (now - self._came_at - self._gap_s) if self._gap_s else now - self._came_at
        self._came_at = now
        size = delivery.payload.numel()
        with owner.room:
            most = ROOM * owner.identity.largest_payload
            owner.room.wait_for(lambda: self.over.is_set() or not owner.held or owner.held + size <= most)
            if self.over.is_set():
                raise _Closed
            if new := owner.once.first(delivery.update):
                owner.held += size
        if new:
            owner.inbox.put(delivery, owner.took)
        self._next += 1
        assert self._theirs is not None
        content = owner.seal.close({"to": self.peer, "lives": [self._theirs[2], owner.identity.life], "next": self._next})
        name = f"taken/{self.peer}/{self._theirs[2]}"
        self.ask(lambda: owner.box.write(content, name), owner.address)

    def _fetch(self, index: int, like: dict[str, Any] | None = None) -> tuple[dict[str, Any], memoryview] | None:
        """Part `index` of the next update, once it is there; None when the peer has a new endpoint.

        What the peer cannot have written is refused, and asked for again: its writer may put the right one in its place.
        """
        assert self._theirs is not None
        box, address, life = self._theirs
        name = f"to-{self.owner.identity.region}/{self.owner.identity.life}/{self._next}.{index}"
        pause = 0.0
        while self.owner.peers.get(self.peer) == address:
            content = self.ask(lambda: box.read(name), address)
            if content is not None:
                try:
                    header, data = self.owner.seal.open(content, self.peer)
                    self._check(header, data, [life, self.owner.identity.life], index, like)
                    return header, data
                except ValueError as error:
                    self.owner.inbox.refuse(self.peer, f"{address}/{name}: {error}")
            elif like is None:
                self._alive_at = time.monotonic()
            most = min(max(self._gap_s / POLLS_PER_GAP, 0.02), LONGEST_POLL_S)
            pause = min(max(self.rtt_s, 0.01, 1.5 * pause), most if content is None else LONGEST_POLL_S)
            if self.over.wait(pause):
                raise _Closed
        return None

    def _check(self, header: dict[str, Any], data: memoryview, lives: list[int], index: int, like: dict[str, Any] | None) -> None:
        """Raises ValueError for a part that is not the one that was asked for."""
        size, mine = header.get("size"), self.owner.identity
        if type(size) is not int or not 0 <= size <= mine.largest_payload:
            raise ValueError(f"announces {size!r} bytes, this model sends at most {mine.largest_payload}")
        if [header.get(name) for name in ("to", "lives", "number", "index")] != [mine.region, lives, self._next, index]:
            raise ValueError("another object under this name")
        update = update_of(header["update"]) if isinstance(header.get("update"), dict) else None
        if update is None or update.origin != self.peer:
            raise ValueError("it is no update of its writer")
        if like is not None and (size, header["update"]) != (like["size"], like["update"]):
            raise ValueError("its parts do not belong together")
        if len(data) != min(PART_BYTES, size - index * PART_BYTES):
            raise ValueError(f"{len(data)} bytes, another number than announced")
