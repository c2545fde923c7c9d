"""Arrow Flight between leaders: gRPC underneath, raw buffers inside, no pickle.

An update is one do_put: a JSON header in the descriptor, the payload as record batches of one binary column. The sizes that a header
announces are checked against what this model can send before memory is taken; a CRC-32 covers the payload. An update that
was not acknowledged is sent again; the receiver knows it by its key and takes it once.
"""

import hmac
import json
import queue
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import torch
from torch import Tensor

from geotrain.errors import PeerUnreachable, UpdateRefused, WanError
from geotrain.sync.messages import Update
from geotrain.wan.transport import Delivery, LinkTraffic, header_of, update_of

CHUNK_BYTES = 4 * 2**20
SCHEMA = pa.schema([("chunk", pa.binary())])
RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between attempts; the last one repeats."""
FORGET_AFTER_ROUNDS = 1000
CLOSE_S = 5.0
"""How long closing waits for a call that a silent peer holds; gRPC ends the call by itself later."""


class FlightTransport:
    """One leader's endpoint: a Flight server for what comes, a thread and a connection per peer for what goes."""

    def __init__(
        self, region: str, listen: str, peers: Mapping[str, str], *, token: str, largest_payload: int, give_up_s: float = 120.0
    ) -> None:
        """`peers`: region -> host:port, looked up when a connection is opened, so it may be filled later.

        `largest_payload`: bytes; a header that announces more is refused. `give_up_s`: how long a peer may be unreachable.
        """
        self.region, self.peers, self.token = region, peers, token
        self.traffic: dict[str, LinkTraffic] = {}
        self.give_up_s = give_up_s
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
            return self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        return all(lane.drain(max(0.0, until - time.monotonic())) for lane in list(self._lanes.values()))

    def close(self) -> None:
        for lane in list(self._lanes.values()):
            lane.close()
        self._server.shutdown()


class _Server(fl.FlightServerBase):
    """Receives. Runs in gRPC's own threads."""

    def __init__(self, location: str, owner: FlightTransport, largest_payload: int) -> None:
        super().__init__(location)
        self.owner, self.largest_payload = owner, largest_payload
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int, str, int, int], int] = {}

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        try:
            update, size, crc = self._header(descriptor.command)
        except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise fl.FlightUnauthorizedError(self._note(f"bad header: {error}")) from error
        with self._lock:
            seen = update.key in self._seen
        if seen:
            writer.write(b"again")
            return
        payload = np.empty(size, dtype=np.uint8)
        filled = 0
        for chunk in reader:
            data = chunk.data.column(0)[0].as_buffer()
            if filled + data.size > size:
                raise fl.FlightServerError(self._note(f"more bytes than announced from {update.origin}"))
            payload[filled : filled + data.size] = np.frombuffer(data, dtype=np.uint8)
            filled += data.size
        if filled != size or zlib.crc32(payload.data) != crc:
            raise fl.FlightServerError(self._note(f"damaged payload from {update.origin}: {filled} of {size} bytes"))
        self._take(update, payload)
        writer.write(b"taken")

    def _header(self, command: bytes) -> tuple[Update, int, int]:
        header = json.loads(command)
        if not hmac.compare_digest(str(header["token"]), self.owner.token):
            raise ValueError("wrong run token")
        if header["to"] != self.owner.region:
            raise ValueError(f"addressed to {header['to']!r}, this is {self.owner.region}: two regions advertise one address")
        size = header["bytes"]
        if type(size) is not int or not 0 <= size <= self.largest_payload:
            raise ValueError(f"announces {size!r} bytes, this model sends at most {self.largest_payload}")
        return update_of(header), size, int(header["crc"])

    def _take(self, update: Update, payload: Any) -> None:
        with self._lock:
            if update.key in self._seen:
                return
            self._seen[update.key] = update.round
            if len(self._seen) % FORGET_AFTER_ROUNDS == 0:
                oldest = update.round - FORGET_AFTER_ROUNDS
                self._seen = {key: round for key, round in self._seen.items() if round >= oldest}
            self.owner._inbox.put(Delivery(update, torch.from_numpy(payload)))

    def _note(self, reason: str) -> str:
        with self._lock:
            del self.owner.refused[:-100]
            self.owner.refused.append(reason)
        return reason


class _Lane:
    """Everything that goes to one peer, in order, one update at a time."""

    def __init__(self, owner: FlightTransport, to: str, traffic: LinkTraffic) -> None:
        self.owner, self.to, self.traffic = owner, to, traffic
        self._queue: queue.Queue[tuple[Update, Tensor, float] | None] = queue.Queue()
        self._client: fl.FlightClient | None = None
        self._closed = threading.Event()
        self._error: WanError | None = None
        self._thread = threading.Thread(target=self._run, name=f"geotrain-to-{to}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._error:
            raise self._error

    def put(self, update: Update, payload: Tensor) -> None:
        self.check()
        self._queue.put((update, payload, time.monotonic()))

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                self.check()
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._queue.all_tasks_done.wait(min(left, 0.5))
        return True

    def close(self) -> None:
        self._closed.set()
        self._queue.put(None)
        if self._client is not None:
            self._client.close()
        self._thread.join(timeout=CLOSE_S)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None and not self._closed.is_set():
            update, payload, since = entry
            del entry
            if not self._error:
                self._deliver(update, payload)
                self.traffic.seconds += time.monotonic() - since
            self._queue.task_done()

    def _deliver(self, update: Update, payload: Tensor) -> None:
        """Send until acknowledged, or until the peer has been unreachable for too long."""
        began, attempt = time.monotonic(), 0
        buffer = payload.numpy()
        header = {**header_of(update), "to": self.to, "token": self.owner.token, "bytes": buffer.nbytes, "crc": zlib.crc32(buffer.data)}
        command = json.dumps(header).encode()
        while not self._closed.is_set():
            try:
                self._put_once(command, buffer)
            except fl.FlightUnauthorizedError as error:
                self._error = UpdateRefused(self.to, _short(error))
                return
            except (pa.ArrowException, OSError, KeyError) as error:
                self._drop_client()
                if time.monotonic() - began > self.owner.give_up_s:
                    address = self.owner.peers.get(self.to, "an unknown address")
                    self._error = PeerUnreachable(self.owner.region, self.to, address, _short(error))
                    return
                self.traffic.retries += 1
                self._closed.wait(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
            else:
                self.traffic.updates += 1
                self.traffic.payload_bytes += buffer.nbytes
                return

    def _put_once(self, command: bytes, buffer: Any) -> None:
        if self._client is None:
            self._client = fl.FlightClient(f"grpc://{self.owner.peers[self.to]}")
        patience = fl.FlightCallOptions(timeout=self.owner.give_up_s)
        writer, answers = self._client.do_put(fl.FlightDescriptor.for_command(command), SCHEMA, options=patience)
        with writer:
            self.traffic.wire_bytes += len(command)
            for chunk in _chunks(buffer):
                writer.write_batch(chunk)
                self.traffic.wire_bytes += chunk.nbytes
            writer.done_writing()
            if answers.read() is None:
                raise pa.ArrowException("not acknowledged")

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _chunks(buffer: Any) -> Iterator[pa.RecordBatch]:
    """The payload as record batches of one binary value each, without copying it."""
    data = pa.py_buffer(buffer)
    for start in range(0, data.size, CHUNK_BYTES):
        piece = data.slice(start, min(CHUNK_BYTES, data.size - start))
        offsets = pa.py_buffer(np.array([0, piece.size], dtype=np.int32))
        yield pa.record_batch([pa.Array.from_buffers(pa.binary(), 1, [None, offsets, piece])], schema=SCHEMA)


def _short(error: BaseException) -> str:
    """The first line of a gRPC error, without its debug context."""
    return str(error).splitlines()[0].split(". gRPC client debug context")[0]
