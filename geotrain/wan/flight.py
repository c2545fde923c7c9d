"""Arrow Flight between leaders: gRPC underneath, raw buffers inside, no pickle.

A part of an update (`wan/parts.py`) is one do_put: a JSON header in the descriptor, the bytes as one record batch of one binary value, a
small answer. Several are under way at a time, on as many connections as fill the pipe. The size that a header announces is checked
against what this model can send before memory is taken. A part that is not answered within its patience goes again on a new
connection, once a small question to the peer was answered: so a cut link costs what was under way, and a healed one is noticed soon.
"""

import hmac
import json
import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
from torch import Tensor

from geotrain.errors import PeerUnreachable, UpdateRefused, WanError
from geotrain.sync.messages import Update
from geotrain.wan.parts import PART_BYTES, PER_CONNECTION, Answer, Assembler, Outbox, Pace, Part, Sent
from geotrain.wan.transport import Delivery, LinkTraffic

SCHEMA = pa.schema([("part", pa.binary())])
RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Pauses between questions to a peer that does not answer; the last one repeats."""
ROOM = 4
"""Updates of the largest size that a receiver holds before the training thread takes them."""
ASK_EVERY_S = 5.0
"""How often a busy lane measures its round trip."""
QUESTIONS = -1
"""The slot of a connection that carries no parts, so that a question waits behind none."""
UNKNOWN = Pace(0.2, 1e6 / 8)
"""A link of which no plan says anything: 1 Mbit/s, 200 ms."""


class FlightTransport:
    """One leader's endpoint: a Flight server for what comes, a lane per peer for what goes."""

    def __init__(
        self,
        region: str,
        listen: str,
        peers: Mapping[str, str],
        *,
        token: str,
        largest_payload: int,
        life: int | None = None,
        give_up_s: float = 120.0,
        expect: Callable[[str], tuple[float, float]] | None = None,
    ) -> None:
        """`peers`: region -> host:port, looked up when a connection is opened, so it may be filled later.

        `largest_payload`: bytes; a header that announces more is refused. `life`: higher than that of any endpoint that this region had
        before; None: by this machine's clock. `give_up_s`: how long a peer may answer nothing.
        `expect`: region -> (round trip in seconds, bytes per second) of the link there, as planned; measured from the first parts on.
        """
        self.region, self.peers, self.token = region, peers, token
        self.traffic: dict[str, LinkTraffic] = {}
        self.give_up_s = give_up_s
        self.life = time.time_ns() if life is None else life
        self.expect = expect or (lambda to: (UNKNOWN.rtt_s, UNKNOWN.bytes_per_s))
        self.refused: list[str] = []
        self._inbox: queue.Queue[Delivery] = queue.Queue()
        self._server = _Server(f"grpc://{listen}", self, largest_payload)
        self._host = listen.rpartition(":")[0]
        self._lanes: dict[str, _Lane] = {}

    @property
    def address(self) -> str:
        """host:port that this endpoint listens on."""
        return f"{self._host}:{self._server.port}"

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        if to not in self._lanes:
            self._lanes[to] = _Lane(self, to, self.traffic.setdefault(to, LinkTraffic()))
        self._lanes[to].put(update, payload)

    def receive(self, timeout_s: float) -> Delivery | None:
        for lane in list(self._lanes.values()):
            lane.check()
        try:
            delivery = self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        self._server.took(delivery)
        return delivery

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        return all(lane.drain(max(0.0, until - time.monotonic())) for lane in list(self._lanes.values()))

    def close(self) -> None:
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.join()
        self._server.shutdown()


class _Server(fl.FlightServerBase):
    """Receives. Runs in gRPC's own threads."""

    def __init__(self, location: str, owner: FlightTransport, largest_payload: int) -> None:
        super().__init__(location)
        self.owner = owner
        self._lock = threading.Lock()
        self._assembler = Assembler(owner.life, largest_payload, ROOM * largest_payload, owner._inbox.put)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        try:
            part = self._part(descriptor.command)
            with self._lock:
                memory = self._assembler.begin(part)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise fl.FlightUnauthorizedError(self._note(f"bad header: {error}")) from error
        answer: Answer = memory if isinstance(memory, str) else self._fill(part, memory, reader)
        writer.write(json.dumps({"answer": answer, "life": self._assembler.life}).encode())

    def _fill(self, part: Part, memory: Any, reader: Any) -> Answer:
        chunk = next(iter(reader), None)
        data = chunk.data.column(0)[0].as_buffer() if chunk is not None and chunk.data.num_rows == 1 else pa.py_buffer(b"")
        if data.size != part.length or zlib.crc32(data) != part.crc:
            raise fl.FlightServerError(self._note(f"damaged part from {part.update.origin}: {data.size} of {part.length} bytes"))
        memory[:] = np.frombuffer(data, dtype=np.uint8)
        with self._lock:
            return self._assembler.fill(part)

    def _part(self, command: bytes) -> Part:
        header = json.loads(command)
        if not hmac.compare_digest(str(header["token"]).encode(), self.owner.token.encode()):
            raise ValueError("wrong run token")
        if header["to"] != self.owner.region:
            raise ValueError(f"addressed to {header['to']!r}, this is {self.owner.region}: two regions advertise one address")
        return Part.of(header)

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """Asked whether anybody is there."""
        return [b"here"]

    def took(self, delivery: Delivery) -> None:
        with self._lock:
            self._assembler.took(delivery)

    def _note(self, reason: str) -> str:
        with self._lock:
            del self.owner.refused[:-100]
            self.owner.refused.append(reason)
        return reason


class _Lane:
    """Everything that goes to one peer. A thread per part under way; they share the outbox and its lock."""

    def __init__(self, owner: FlightTransport, to: str, traffic: LinkTraffic) -> None:
        self.owner, self.to, self.traffic = owner, to, traffic
        self.pace = Pace(*owner.expect(to))
        self._outbox = Outbox(owner.life)
        self._changed = threading.Condition()
        self._error: WanError | None = None
        self._closed = False
        self._under_way = 0
        self._alive_at = time.monotonic()
        """When the peer answered last, or when there was nothing to answer."""
        self._clear = True
        """No part has failed since the peer answered; else one thread asks whether it is there, and the others wait."""
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
            self._staff()
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            done = self._changed.wait_for(lambda: self._error is not None or not self._outbox.pending, timeout_s)
        self.check()
        return done

    def stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        for client in list(self._clients.values()):
            client.close()
        until = time.monotonic() + self.pace.patience_s(self.pace.parts)
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))  # a call to a silent peer ends with its patience

    # What its threads do.

    def _staff(self) -> None:
        """As many threads as parts may be under way."""
        while len(self._threads) < self.pace.parts:
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
                sent = None if ask else self._outbox.next()
                if sent is None and not ask:
                    self.pace.paused()
                    self._changed.wait()
                    continue
                self._under_way += sent is not None
                patience = self.pace.patience_s(self._under_way)
            if sent is None:
                self._ask(patience)
            else:
                self._send(number, sent, patience * 2 ** min(self._failures, 6))

    def _may_go(self, number: int) -> bool:
        if self._asks():
            return True
        return self._clear and number < self.pace.parts

    def _asks(self) -> bool:
        """Whether the peer is to be asked, by one thread: after a failure, and now and then to measure."""
        if self._asking or not self._outbox.pending:
            return False
        return not self._clear or time.monotonic() - self._asked_at > ASK_EVERY_S

    def _ask(self, patience: float) -> None:
        """One small question; after a failure again and again, on new connections, until it is answered.

        Soon at first, since a link that is healed must be noticed; then with more and more patience, for one that has become slow.
        """
        attempt = 0
        while not self._closed:
            try:
                options = fl.FlightCallOptions(timeout=min(8 * self.pace.rtt_s * 1.5**attempt, patience * 1.1**attempt))
                for _ in range(2):  # the first may have to open the connection
                    began = time.monotonic()
                    list(self._client(QUESTIONS).do_action(fl.Action("here", b""), options=options))
            except (pa.ArrowException, OSError, KeyError) as error:
                self._drop(QUESTIONS)
                if self._gives_up(error):
                    return
                with self._changed:
                    self._clear = False
                    self.traffic.retries += 1
                    self._changed.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
                continue
            with self._changed:
                self.pace.pinged(time.monotonic() - began, alone=self._alone)
                self._alone = False
                self.traffic.rtt_s = self.pace.rtt_s
                self._alive_at = self._asked_at = time.monotonic()
                self._clear, self._asking = True, False
                self._changed.notify_all()
            return

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
            self._under_way -= 1
            self._alive_at = now
            if answer["answer"] == "later":
                self._outbox.failed(sent)
                self._changed.wait(self.pace.completion_s or self.pace.rtt_s)
                return
            self._failures = 0
            self.pace.answered(now - began, sent.part.length, now)
            self.traffic.bytes_per_s = self.pace.bytes_per_s
            for outgoing in self._outbox.answered(sent, int(answer["life"])):
                self.traffic.updates += 1
                self.traffic.payload_bytes += outgoing.payload.size
                self.traffic.seconds += now - outgoing.since
            self._staff()
            self._changed.notify_all()

    def _put_part(self, number: int, sent: Sent, patience: float) -> dict[str, Any]:
        header = {**sent.part.header(), "to": self.to, "token": self.owner.token}
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
                options = [("grpc.use_local_subchannel_pool", 1)]  # else all clients of a process share one connection
                self._clients[slot] = fl.FlightClient(f"grpc://{self.owner.peers[self.to]}", generic_options=options)
            return self._clients[slot]

    def _drop(self, slot: int) -> None:
        """A connection that failed is not used again; what others have under way on it may still be answered."""
        with self._changed:
            self._clients.pop(slot, None)


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
