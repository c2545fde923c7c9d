"""Arrow Flight between leaders: gRPC underneath, raw buffers inside, no pickle.

A part of an update (`wan/parts.py`) is one do_put: a JSON header in the descriptor, the bytes as one record batch of one binary value, a
small answer. Several are under way at a time, on as many connections as fill the pipe. The size that a header announces is checked
against what this model can send before memory is taken. A part that is not answered within its patience goes again on a new
connection, once a small question to the peer was answered: so a cut link costs what was under way, and a healed one is noticed soon.
"""

import hmac
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from geotrain.errors import PeerUnreachable, UpdateRefused, WanError
from geotrain.sync.messages import Update
from geotrain.wan.certs import Credentials
from geotrain.wan.parts import Answer, Assembler, Outbox, Part, Sent
from geotrain.wan.timing import PART_BYTES, PER_CONNECTION, K, LinkTiming
from geotrain.wan.transport import LARGEST_HEADER, Delivery, Identity, Inbox, LinkTraffic

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # every refused handshake would be a line on stderr
import pyarrow.flight as fl

SCHEMA = pa.schema([("part", pa.binary())])
MOST_DOUBLINGS = 5
"""Of the pause between two questions to a peer that does not answer; it begins with a round trip."""
FULL = b"full"
"""The answer of a peer that is there and has no room."""
ROOM = 4
"""Updates of the largest size that a receiver holds before the training thread takes them."""
ASK_EVERY_S = 5.0
"""How often a busy lane measures its round trip."""
QUESTIONS = -1
"""The slot of a connection that carries no parts, so that a question waits behind none."""
HANDSHAKES = 5
"""Round trips until a new connection has answered: TCP, TLS, HTTP/2, the question."""
LEAST_RTT_S = 0.02
"""On a link that is quicker the machines are what takes time."""
UNKNOWN = LinkTiming(0.2, 1e6 / 8)
"""A link of which no plan says anything: 1 Mbit/s, 200 ms."""


class FlightTransport:
    """One leader's endpoint: a Flight server for what comes, a lane per peer for what goes."""

    def __init__(
        self,
        identity: Identity,
        listen: str,
        peers: Mapping[str, str],
        *,
        credentials: Credentials | None = None,
        inbox: Inbox | None = None,
        give_up_s: float = 120.0,
        expect: Callable[[str], tuple[float, float]] | None = None,
    ) -> None:
        """`peers`: region -> host:port, looked up when a connection is opened, so it may be filled later.

        `credentials`: for mutual TLS, by which a region can speak for itself alone; None: plain text. `give_up_s`: how long a peer may
        answer nothing. `expect`: region -> (round trip in seconds, bytes per second) of the link there, as planned; measured from the
        first parts on.
        """
        self.identity, self.peers, self.credentials = identity, peers, credentials
        self.inbox = inbox or Inbox()
        self.traffic: dict[str, LinkTraffic] = {}
        self.give_up_s = give_up_s
        self.expect = expect or (lambda to: (UNKNOWN.rtt_s, UNKNOWN.bytes_per_s))
        self.lock = threading.Lock()
        """Of the assembler."""
        self.assembler = Assembler(identity.life, identity.largest_payload, ROOM * identity.largest_payload, self._deliver)
        self._host = listen.rpartition(":")[0]
        self._server = _Server(listen, self)
        self._lanes: dict[str, _Lane] = {}
        self._left: list[_Lane] = []
        """To peers that have left; their threads end with the call that they are in."""
        self._times_left: Counter[str] = Counter()
        """Per peer."""

    @property
    def region(self) -> str:
        return self.identity.region

    def _deliver(self, delivery: Delivery) -> None:
        self.inbox.put(delivery, self._taken)

    def _taken(self, delivery: Delivery) -> None:
        with self.lock:
            self.assembler.took(delivery)

    @property
    def address(self) -> str:
        """host:port that this endpoint listens on."""
        return f"{self._host}:{self._server.port}"

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        if (lane := self._lanes.get(to)) is None:
            life = self.identity.life + self._times_left[to]
            lane = self._lanes[to] = _Lane(self, to, life, self.traffic.setdefault(to, LinkTraffic()))
        lane.put(update, payload)

    def receive(self, timeout_s: float) -> Delivery | None:
        self.check()
        return self.inbox.get(timeout_s)

    def check(self) -> None:
        """Raises what became of an earlier send for good."""
        for lane in list(self._lanes.values()):
            lane.check()

    def silent(self) -> dict[str, float]:
        """Peer -> for how many seconds it has answered nothing, while something goes there."""
        return {to: seconds for to, lane in list(self._lanes.items()) if (seconds := lane.silent_s) > 0}

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        return all(lane.drain(max(0.0, until - time.monotonic())) for lane in list(self._lanes.values()))

    def forget(self, to: str) -> None:
        """A peer has left: what it did not acknowledge is dropped, and what became of the link is no error.

        What is sent to it later has other numbers, so it is of a later life: the peer's next process may have heard the earlier ones.
        """
        if (lane := self._lanes.pop(to, None)) is not None:
            lane.stop()
            self._left.append(lane)
            self._times_left[to] += 1

    def close(self) -> None:
        lanes = [*self._lanes.values(), *self._left]
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.join()
        self._server.shutdown()

    def renew(self, credentials: Credentials) -> None:
        """Go on with another certificate, on the same port. To be called when everything is drained."""
        self.credentials, address = credentials, self.address
        self._server.shutdown()
        self._server = _Server(address, self)
        for lane in list(self._lanes.values()):
            lane.reconnect()


class Door:
    """What stands before the assembler: whose part is taken, and what is said of those that are not. Every refusal is counted."""

    def __init__(self, identity: Identity, inbox: Inbox) -> None:
        self.identity, self.inbox = identity, inbox

    def open(self, command: bytes, caller: str, certified: str | None) -> Part:
        """The header of a part for this endpoint. `certified`: the region that the caller's certificate names, None without TLS.

        Raises ValueError.
        """
        who = certified or caller.rpartition(":")[0]
        try:
            if len(command) > LARGEST_HEADER:
                raise ValueError(f"a header of {len(command)} bytes")
            header = json.loads(command)
            mine = self.identity
            if not isinstance(header, dict) or not hmac.compare_digest(str(header.get("token")).encode(), mine.token.encode()):
                raise ValueError(f"wrong run token (this is run {mine.run})")
            if header.get("to") != mine.region:
                raise ValueError(f"addressed to {header.get('to')!r}, this is {mine.region}: two regions advertise one address")
            part = Part.of(header)
            who = part.update.origin
            if who not in mine.regions or who == mine.region:
                raise ValueError(f"from {who!r}, which is no other region of this job")
            if certified is not None and certified != who:
                raise ValueError(f"the certificate of {certified} does not speak for {who}")
            if header.get("model") != mine.model:
                raise ValueError("its sender built another model: parameter names, shapes or types differ")
        except (ValueError, RecursionError) as error:
            raise ValueError(self.inbox.refuse(who, str(error))) from error
        return part


class _Server(fl.FlightServerBase):
    """Receives. Runs in gRPC's own threads."""

    def __init__(self, listen: str, owner: FlightTransport) -> None:
        own = owner.credentials
        if own is None:
            super().__init__(f"grpc://{listen}")
        else:
            super().__init__(f"grpc+tls://{listen}", tls_certificates=[(own.cert, own.key)], verify_client=True, root_certificates=own.ca)
        self.owner, self.secured = owner, own is not None
        self.door = Door(owner.identity, owner.inbox)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        certified = context.peer_identity().decode(errors="replace") if self.secured else None
        owner = self.owner
        try:
            part = self.door.open(descriptor.command or b"", context.peer(), certified)
        except ValueError as error:
            raise fl.FlightUnauthorizedError(str(error)) from error
        try:
            with owner.lock:
                memory = owner.assembler.begin(part)
        except ValueError as error:
            raise fl.FlightUnauthorizedError(owner.inbox.refuse(part.update.origin, str(error))) from error
        answer: Answer = memory if isinstance(memory, str) else self._fill(part, memory, reader)
        writer.write(json.dumps({"answer": answer, "life": owner.assembler.life}).encode())

    def _fill(self, part: Part, memory: Any, reader: Any) -> Answer:
        if (data := part_data(reader)) is None or data.size != part.length or zlib.crc32(data) != part.crc:
            why = f"damaged: {0 if data is None else data.size} of {part.length} bytes"
            raise fl.FlightServerError(self.owner.inbox.refuse(part.update.origin, why))
        memory[:] = np.frombuffer(data, dtype=np.uint8)
        with self.owner.lock:
            return self.owner.assembler.fill(part)

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """Asked whether anybody is there, and has room."""
        return [FULL if self.owner.assembler.full else b"here"]


def part_data(reader: Any) -> Any:
    """The one binary value of a part's one record batch, as a buffer; None for anything else."""
    try:
        if (chunk := next(iter(reader), None)) is None or chunk.data is None:
            return None
        if chunk.data.num_rows != 1 or not chunk.data.schema.equals(SCHEMA):
            return None
        chunk.data.validate(full=True)
        return chunk.data.column(0)[0].as_buffer()
    except (pa.ArrowException, ValueError):
        return None


class _Lane:
    """Everything that goes to one peer. A thread per part under way; they share the outbox and its lock."""

    def __init__(self, owner: FlightTransport, to: str, life: int, traffic: LinkTraffic) -> None:
        self.owner, self.to, self.traffic = owner, to, traffic
        self.timing = LinkTiming(*owner.expect(to))
        self._outbox = Outbox(life)
        self._changed = threading.Condition()
        self._error: WanError | None = None
        self._closed = False
        self._under_way = 0
        self._alive_at = time.monotonic()
        """When the peer answered last, or when there was nothing to answer."""
        self._clear = True
        """No part has failed since the peer answered; else one thread asks whether it is there, and the others wait."""
        self._full = False
        """The peer has no room: nothing is sent until it says that it has."""
        self._full_at = -1
        """The number of the first update not acknowledged when that was said: it goes alone then."""
        self._asking = False
        self._asked_at = 0.0
        self._alone = True
        """Nothing was under way when the question was asked."""
        self._failures = 0
        """Parts that found no patience since the last answer: the next ones find more."""
        self._clients: dict[int, fl.FlightClient] = {}
        self._threads: list[threading.Thread] = []

    # What the transport's caller does.

    def check(self) -> None:
        if self._error:
            raise self._error

    def put(self, update: Update, payload: Tensor) -> None:
        self.check()
        with self._changed:
            if not self._outbox.pending:
                self._alive_at, self._alone = time.monotonic(), True
            self._outbox.put(update, payload, time.monotonic())
            self.traffic.begin(time.monotonic())
            self._staff()
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            done = self._changed.wait_for(lambda: self._error is not None or not self._outbox.pending, timeout_s)
        self.check()
        return done

    @property
    def silent_s(self) -> float:
        with self._changed:
            return time.monotonic() - self._alive_at if self._outbox.pending else 0.0

    def stop(self) -> None:
        with self._changed:
            self._closed = True
            self.traffic.end(time.monotonic())
            self._changed.notify_all()

    def join(self) -> None:
        for client in list(self._clients.values()):
            client.close()
        until = time.monotonic() + self.timing.patience_s(self.timing.parts)
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))  # a call to a silent peer ends with its patience

    def reconnect(self) -> None:
        with self._changed:
            self._clients.clear()

    # What its threads do.

    def _staff(self) -> None:
        """As many threads as parts may be under way."""
        while len(self._threads) < self.timing.parts:
            number = len(self._threads)
            thread = threading.Thread(target=self._work, args=(number,), name=f"geotrain-to-{self.to}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while not self._closed and self._error is None and not self._may_go(number):
                    self._changed.wait()
                if self._closed or self._error is not None:
                    return
                self._asking |= (ask := self._asks())
                sent = None if ask else self._outbox.next(first_only=self._outbox.base == self._full_at)
                if sent is None and not ask:
                    self.timing.paused()
                    self._changed.wait()
                    continue
                self._under_way += sent is not None
                patience = self.timing.patience_s(self.timing.parts)  # others join while it is under way
            if sent is None:
                self._ask(patience)
            else:
                self._send(number, sent, patience * 2 ** min(self._failures, 6))

    def _may_go(self, number: int) -> bool:
        if self._asks():
            return True
        return self._clear and not self._full and number < self.timing.parts

    def _asks(self) -> bool:
        """Whether the peer is to be asked, by one thread: after a failure, while it is full, and now and then to measure."""
        if self._asking or not self._outbox.pending:
            return False
        return not self._clear or self._full or time.monotonic() - self._asked_at > ASK_EVERY_S

    def _ask(self, patience: float) -> None:
        """One small question; after a failure again and again, on new connections, until it is answered.

        Soon at first, since a link that is healed must be noticed; then with more and more patience, for one that has become slow.
        """
        attempt = 0
        while not self._closed:
            try:
                options = fl.FlightCallOptions(timeout=min(8 * self.timing.rtt_s * 1.5**attempt, patience * 1.1**attempt))
                for _ in range(2):  # the first may have to open the connection
                    began = time.monotonic()
                    (says,) = self._client(QUESTIONS).do_action(fl.Action("here", b""), options=options)
            except (pa.ArrowException, OSError, KeyError) as error:
                self._drop(QUESTIONS)
                if self._gives_up(error):
                    return
                with self._changed:
                    self._clear = False
                    self.traffic.retries += 1
                    self._changed.wait(self._pause_s(attempt))
                attempt += 1
                continue
            with self._changed:
                self.timing.pinged(time.monotonic() - began, alone=self._alone)
                self._alone = False
                self.traffic.rtt_s = self.timing.rtt_s
                self._alive_at = self._asked_at = time.monotonic()
                self._clear, self._full = True, says.body.to_pybytes() == FULL
                self._changed.notify_all()
                if not self._full:
                    self._asking = False
                    return
                self._changed.wait(self._pause_s(attempt))
            attempt += 1

    def _pause_s(self, attempt: int) -> float:
        """Between two questions: a round trip, then more and more of them."""
        return self.timing.rtt_s * 2 ** min(attempt, MOST_DOUBLINGS)

    def _gives_up(self, error: BaseException) -> bool:
        with self._changed:
            if time.monotonic() - self._alive_at <= self.owner.give_up_s:
                return False
            self._error = PeerUnreachable(self.owner.region, self.to, self.owner.peers.get(self.to, "an unknown address"), _short(error))
            self._changed.notify_all()
            return True

    def _send(self, number: int, sent: Sent, patience: float) -> None:
        began = time.monotonic()
        try:
            answer = self._put_part(number, sent, patience)
        except fl.FlightUnauthorizedError as error:
            with self._changed:
                self._error = UpdateRefused(self.to, _short(error))
                self._changed.notify_all()
            return
        except (pa.ArrowException, OSError, KeyError, ValueError):
            self._drop(_slot(number))
            with self._changed:
                self._under_way -= 1
                self._outbox.failed(sent)
                self.traffic.retries += 1
                self._failures += self._clear
                self._clear = False
                self._changed.notify_all()
            return
        now = time.monotonic()
        with self._changed:
            if self._closed:
                return  # the traffic is that of the next lane
            self._under_way -= 1
            self._alive_at = now
            if answer["answer"] == "later":
                self._outbox.failed(sent)
                self._full, self._full_at = True, self._outbox.base
                return
            self._failures = 0
            self.timing.answered(now - began, sent.part.length, now)
            for outgoing in self._outbox.answered(sent, int(answer["life"])):
                self.traffic.bytes_per_s = self.timing.goodput(outgoing.payload.size, now - outgoing.since, alone=outgoing.alone)
                self.traffic.updates += 1
                self.traffic.payload_bytes += outgoing.payload.size
                self.traffic.seconds += now - outgoing.since
            if not self._outbox.pending:
                self.traffic.end(now)
            self._staff()
            self._changed.notify_all()

    def _put_part(self, number: int, sent: Sent, patience: float) -> dict[str, Any]:
        header = {**sent.part.header(), "to": self.to, "token": self.owner.identity.token, "model": self.owner.identity.model}
        command = json.dumps(header).encode()
        writer, answers = self._client(_slot(number)).do_put(
            fl.FlightDescriptor.for_command(command), SCHEMA, options=fl.FlightCallOptions(timeout=patience)
        )
        with writer:
            writer.write_batch(_batch(sent.data))
            with self._changed:
                self.traffic.wire_bytes += len(command) + sent.part.length
            writer.done_writing()
            answer = answers.read()
        if answer is None:
            raise pa.ArrowException("not answered")
        return dict(json.loads(answer.to_pybytes()))

    def _client(self, slot: int) -> fl.FlightClient:
        """A connection of its own for every slot."""
        with self._changed:
            if slot not in self._clients:
                self._clients[slot] = connect(self.owner.peers[self.to], self.to, self.owner.credentials)
            return self._clients[slot]

    def _drop(self, slot: int) -> None:
        """A connection that failed is not used again; what others have under way on it may still be answered."""
        with self._changed:
            self._clients.pop(slot, None)


def connect(address: str, region: str, credentials: Credentials | None) -> Any:
    """A client of a region's endpoint, with a connection of its own. With credentials the other end must prove to be that region."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # else all clients of a process share one connection
    if credentials is None:
        return fl.FlightClient(f"grpc://{address}", generic_options=options)
    return fl.FlightClient(
        f"grpc+tls://{address}",
        tls_root_certs=credentials.ca,
        cert_chain=credentials.cert,
        private_key=credentials.key,
        override_hostname=region,
        generic_options=options,
    )


def reach(address: str, region: str, credentials: Credentials | None, rtt_s: float) -> str | None:
    """Why a region's endpoint does not answer at this address; None when it does. `rtt_s`: what is expected of the link."""
    why = "it does not answer"
    for patience in (1, 2, 4):
        client = connect(address, region, credentials)
        try:
            options = fl.FlightCallOptions(timeout=patience * K * HANDSHAKES * max(rtt_s, LEAST_RTT_S))
            list(client.do_action(fl.Action("here", b""), options=options))
        except (pa.ArrowException, OSError) as error:
            why = _short(error)
        else:
            return None
        finally:
            client.close()
    return why


def _slot(number: int) -> int:
    """The connection of a thread: neighbours share one, as many as its buffers carry."""
    return number * PART_BYTES // PER_CONNECTION


def _batch(data: Any) -> pa.RecordBatch:
    """Bytes as a record batch of one binary value, without copying them."""
    buffer = pa.py_buffer(data)
    offsets = pa.py_buffer(np.array([0, buffer.size], dtype=np.int32))
    return pa.record_batch([pa.Array.from_buffers(pa.binary(), 1, [None, offsets, buffer])], schema=SCHEMA)


def _short(error: BaseException) -> str:
    """The first line of a gRPC error, without its debug context."""
    return str(error).splitlines()[0].split(". gRPC client debug context")[0]
