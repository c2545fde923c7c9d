"""One suite for every transport: what it delivers, once, in order, and what it leaves behind."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs
import torch

from geotrain.errors import PeerUnreachable, UpdateRefused
from geotrain.job import Mailbox, SecurityFiles
from geotrain.sync.messages import Kind, Update
from geotrain.wan import certs
from geotrain.wan.flight import FlightTransport
from geotrain.wan.mailbox import MailboxTransport
from geotrain.wan.memory import Exchange, MemoryTransport
from geotrain.wan.routed import Routed
from geotrain.wan.shaped import Line, Shaped
from geotrain.wan.transport import Identity, Inbox, Transport, header_of

LARGEST = 20_000_000


@dataclass(frozen=True)
class Where:
    """What a transport may need."""

    folder: Path
    ca: Path
    bucket: str


Pair = tuple[Transport, Transport]


def identity(region: str, largest: int | None = None, **changes: Any) -> Identity:
    return replace(Identity("run", region, "secret", "model", 1, frozenset("abc"), largest or LARGEST), **changes)


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    certs.make_ca(folder)
    for name in "abc":
        certs.make_region(folder, name)
    return folder


def credentials(ca: Path, region: str) -> certs.Credentials:
    return certs.load(region, SecurityFiles(ca=str(ca / "ca.pem"), cert=str(ca / f"{region}.pem"), key=str(ca / f"{region}.key")))


def memory(where: Where) -> Pair:
    exchange = Exchange()
    return MemoryTransport("a", exchange), MemoryTransport("b", exchange)


def flight(where: Where, *, tls: bool = False, **more: Any) -> tuple[FlightTransport, FlightTransport]:
    peers: dict[str, str] = {}
    a, b = (
        FlightTransport(
            identity(name), "127.0.0.1:0", peers, credentials=credentials(where.ca, name) if tls else None, **{"give_up_s": 1.0, **more}
        )
        for name in "ab"
    )
    peers.update(a=a.address, b=b.address)
    return a, b


def tls(where: Where) -> Pair:
    return flight(where, tls=True)


def mailbox(where: Where, url: str | None = None, *, signed: bool = False) -> tuple[MailboxTransport, MailboxTransport]:
    peers: dict[str, str] = {}
    box = Mailbox(url=url or str(where.folder / "box"))
    a, b = (
        MailboxTransport(
            identity(name), box, peers, {"a": box, "b": box}, credentials=credentials(where.ca, name) if signed else None, give_up_s=10
        )
        for name in "ab"
    )
    peers.update(a=a.address, b=b.address)
    a.listen("b")
    b.listen("a")
    return a, b


def signed_mailbox(where: Where) -> Pair:
    return mailbox(where, signed=True)


def s3_mailbox(where: Where) -> Pair:
    return mailbox(where, f"s3://{where.bucket}/{where.folder.name}")


def mixed(where: Where) -> Pair:
    """From a to b directly, back through the mailbox."""
    direct, boxed = flight(where), mailbox(where)
    ends = []
    for name, way, one, other in zip("ab", ("flight", "mailbox"), direct, boxed, strict=True):
        inbox = Inbox()
        one.inbox = other.inbox = inbox
        ends.append(Routed(name, {"flight": one, "mailbox": other}, inbox, lambda to, way=way: way))  # type: ignore[misc]
    return ends[0], ends[1]


def shaped(inner: Callable[[Where], Pair]) -> Callable[[Where], Pair]:
    def make(where: Where) -> Pair:
        a, b = inner(where)
        return Shaped(a, lambda to: Line(2000, 4)), Shaped(b, lambda to: Line(2000, 4))

    return make


KINDS = {
    "memory": memory,
    "flight": flight,
    "flight with TLS": tls,
    "mailbox": mailbox,
    "signed mailbox": signed_mailbox,
    "mailbox on S3": s3_mailbox,
    "mixed": mixed,
    "shaped memory": shaped(memory),
    "shaped flight": shaped(flight),
}


@pytest.fixture
def where(tmp_path: Path, ca: Path, bucket: str) -> Where:
    return Where(tmp_path, ca, bucket)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, where: Where) -> Iterator[Pair]:
    with ExitStack() as stack:
        a, b = KINDS[request.param](where)
        stack.callback(a.close)
        stack.callback(b.close)
        yield a, b


def push(round: int, origin: str = "a") -> Update:
    return Update(Kind.PUSH, 1, origin, round, samples=5)


def payload(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [0, 1, 1000, 9_000_001])
def test_what_is_sent_arrives_unchanged(pair: Pair, size: int) -> None:
    a, b = pair
    a.send("b", push(3), payload(size))
    got = b.receive(10)
    assert got is not None
    assert got.update == push(3)
    assert torch.equal(got.payload, payload(size))


def test_updates_of_one_origin_arrive_in_order(pair: Pair) -> None:
    a, b = pair
    for round in range(50):
        a.send("b", push(round), payload(1000 + 100_000 * (round % 7 == 0), round))
    got = [b.receive(10) for _ in range(50)]
    assert [delivery and delivery.update.round for delivery in got] == list(range(50))
    assert b.receive(0) is None


def test_an_update_sent_twice_is_taken_once(pair: Pair) -> None:
    a, b = pair
    for round in (0, 0, 1, 0, 1):
        a.send("b", push(round), payload(1000))
    assert a.drain(20)
    assert [(d := b.receive(10)) and d.update.round for _ in range(2)] == [0, 1]
    assert b.receive(0.3) is None


def test_both_ways_at_once(pair: Pair) -> None:
    a, b = pair
    for round in range(10):
        a.send("b", push(round, "a"), payload(50_000))
        b.send("a", push(round, "b"), payload(50_000))
    for end in pair:
        assert [(d := end.receive(10)) and d.update.round for _ in range(10)] == list(range(10))


def test_sending_returns_at_once_and_drain_waits(pair: Pair) -> None:
    a, b = pair
    for round in range(4):
        a.send("b", push(round), payload(2_000_000, round))
    assert a.drain(20)
    assert [(d := b.receive(10)) and d.update.round for _ in range(4)] == [0, 1, 2, 3]


def test_looking_does_not_wait(pair: Pair) -> None:
    began = time.monotonic()
    assert pair[1].receive(0) is None
    assert pair[1].receive(0.05) is None
    assert time.monotonic() - began < 5


def test_traffic_is_counted_per_link(pair: Pair) -> None:
    a, _ = pair
    for round in range(3):
        a.send("b", push(round), payload(10_000))
    assert a.drain(20)
    link = a.traffic["b"]
    assert (link.updates, link.payload_bytes, link.retries) == (3, 30_000, 0)
    assert link.wire_bytes >= link.payload_bytes
    assert "a" not in a.traffic


@pytest.mark.parametrize("kind", KINDS)
def test_closing_in_the_middle_leaves_no_thread_no_port_and_no_object(kind: str, where: Where) -> None:
    before = {(c.laddr.port, c.status) for c in psutil.Process().net_connections() if c.status == "LISTEN"}
    a, b = KINDS[kind](where)
    for round in range(5):
        a.send("b", push(round), payload(5_000_000))
    a.close()
    b.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geotrain-")]
    after = {(c.laddr.port, c.status) for c in psutil.Process().net_connections() if c.status == "LISTEN"}
    assert after == before
    assert not [path for path in where.folder.rglob("*") if path.is_file()]
    assert not s3fs.S3FileSystem(skip_instance_cache=True).find(f"{where.bucket}/{where.folder.name}")


@pytest.mark.parametrize("kind", ["flight", "flight with TLS", "mailbox", "mailbox on S3"])
def test_a_peer_that_does_not_take_is_not_sent_more_than_it_has_room_for(kind: str, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.contract.test_transports.LARGEST", 1_000_000)
    a, b = KINDS[kind](where)
    for round in range(12):
        a.send("b", push(round), payload(1_000_000, round))
    assert not a.drain(1.5)
    assert b.inbox.waiting <= 5  # type: ignore[attr-defined]
    assert [(d := b.receive(20)) and d.update.round for _ in range(12)] == list(range(12))
    assert a.drain(20)
    assert a.traffic["b"].wire_bytes < 1.4 * 12_000_000
    a.close()
    b.close()


@pytest.mark.parametrize("kind", ["flight", "mailbox"])
def test_nothing_is_under_way_to_a_peer_that_was_forgotten(kind: str, where: Where) -> None:
    a, b = KINDS[kind](where)
    b.close()
    a.send("b", push(0), payload(1000))
    assert a.traffic["b"].busy_since is not None
    a.forget("b")  # type: ignore[attr-defined]
    assert a.traffic["b"].busy_since is None
    a.close()


# Only what goes over a network can fail like a network.


def endpoint(name: str, peers: dict[str, str], listen: str = "127.0.0.1:0", give_up_s: float = 20.0, **changes: Any) -> FlightTransport:
    made = FlightTransport(identity(name, 1_000_000, **changes), listen, peers, give_up_s=give_up_s)
    peers[name] = made.address
    return made


def test_a_peer_that_comes_late_gets_everything_once() -> None:
    peers: dict[str, str] = {}
    a, b = endpoint("a", peers), endpoint("b", peers)
    address = b.address
    b.close()
    for round in range(5):
        a.send("b", push(round), payload(1000, round))
    time.sleep(0.5)
    b = endpoint("b", peers, listen=address, life=2)
    assert [(d := b.receive(20)) and d.update.round for _ in range(5)] == list(range(5))
    assert a.drain(20)
    assert a.traffic["b"].retries > 0
    assert b.receive(0.2) is None
    a.close()
    b.close()


def test_a_peer_that_heard_from_here_before_it_left_hears_what_is_sent_when_it_is_back() -> None:
    """Its next process is there before this endpoint has been told that the first one left."""
    peers: dict[str, str] = {}
    a, b = endpoint("a", peers), endpoint("b", peers)
    address = b.address
    b.close()
    for round in range(2):
        a.send("b", push(round), payload(1000, round))
    b = endpoint("b", peers, listen=address, life=2)
    assert [(d := b.receive(20)) and d.update.round for _ in range(2)] == [0, 1]
    for round in (2, 3):
        a.forget("b")
        a.send("b", push(round), payload(1000, round))
        assert (d := b.receive(5)) is not None
        assert d.update.round == round
        assert a.drain(20)
    a.close()
    b.close()


def test_a_peer_that_never_comes_is_named() -> None:
    peers = {"b": "127.0.0.1:1"}
    a = endpoint("a", peers, give_up_s=0.3)
    a.send("b", push(0), payload(10))
    with pytest.raises(PeerUnreachable, match=r"a cannot reach b at 127\.0\.0\.1:1"):
        for _ in range(100):
            a.receive(0.1)
    a.close()


def test_an_update_for_another_region_is_refused() -> None:
    peers: dict[str, str] = {}
    a, b = endpoint("a", peers), endpoint("b", peers)
    peers["c"] = b.address
    a.send("c", push(0), payload(10))
    with pytest.raises(UpdateRefused, match="two regions advertise one address"):
        for _ in range(100):
            a.receive(0.1)
    a.close()
    b.close()


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another token": ({"token": "wrong"}, 10, "wrong run token"),
    "another model": ({"model": "other"}, 10, "another model"),
    "a stranger": ({"region": "z"}, 10, "no other region of this job"),
    "more than this model has": ({}, 2_000_000, "at most 1000000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_here_is_refused_for_good(case: str) -> None:
    changes, size, why = dict(REFUSED[case][0]), *REFUSED[case][1:]
    peers: dict[str, str] = {}
    a, b = endpoint(changes.pop("region", "a"), peers, **changes), endpoint("b", peers)
    a.send("b", push(0, a.region), payload(size))
    with pytest.raises(UpdateRefused, match=why):
        for _ in range(100):
            a.receive(0.1)
    (told,) = b.inbox.news()
    assert why in told["reason"]
    assert told["times"] >= 1
    assert b.inbox.news() == []
    assert b.receive(0) is None
    a.close()
    b.close()


def test_a_region_cannot_speak_for_another(where: Where) -> None:
    """c holds a good certificate and the token, and calls itself a."""
    peers: dict[str, str] = {}
    b = FlightTransport(identity("b"), "127.0.0.1:0", peers, credentials=credentials(where.ca, "b"))
    peers["b"] = b.address
    c = FlightTransport(identity("a"), "127.0.0.1:0", peers, credentials=credentials(where.ca, "c"))
    c.send("b", push(0, "a"), payload(10))
    with pytest.raises(UpdateRefused, match="certificate of c does not speak for a"):
        for _ in range(100):
            c.receive(0.1)
    assert b.receive(0) is None
    b.close()
    c.close()


@pytest.mark.parametrize("who", ["another CA", "nobody", "plain text"])
def test_who_has_no_certificate_of_the_ca_does_not_get_in(who: str, where: Where, tmp_path: Path) -> None:
    peers: dict[str, str] = {}
    b = FlightTransport(identity("b"), "127.0.0.1:0", peers, credentials=credentials(where.ca, "b"))
    peers["b"] = b.address
    own = None
    if who != "plain text":
        certs.make_ca(tmp_path / "other")
        certs.make_region(tmp_path / "other", "a")
        own = credentials(tmp_path / "other", "a")
        if who == "nobody":  # trusts b, but shows a certificate that b does not trust
            own = replace(own, ca=credentials(where.ca, "b").ca)
    a = FlightTransport(identity("a"), "127.0.0.1:0", peers, credentials=own, give_up_s=0.3)
    a.send("b", push(0), payload(10))
    with pytest.raises(PeerUnreachable):
        for _ in range(100):
            a.receive(0.1)
    assert b.receive(0) is None
    a.close()
    b.close()


def test_a_renewed_certificate_is_used_on_the_same_port(where: Where) -> None:
    a, b = flight(where, tls=True, give_up_s=20.0)
    a.send("b", push(0), payload(1000))
    assert a.drain(10)
    address = b.address
    certs.make_region(where.ca, "b", days=30)
    renewed = credentials(where.ca, "b")
    b.renew(renewed)
    assert b.address == address
    a.send("b", push(1), payload(1000))
    assert [(d := b.receive(10)) and d.update.round for _ in range(2)] == [0, 1]
    a.close()
    b.close()


FORGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda content: content[:-1], "damaged"),
    "one bit": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
    "header": (lambda content: content.replace(b'"number": 0', b'"number": 9'), "seal"),
    "no header": (lambda content: b"x" * 100, "no sealed object"),
    "nothing": (lambda content: b"", "no sealed object"),
    "petabyte": (lambda content: content.replace(b'"size": 10', b'"size": 1000000000000000'), "seal"),
}


class Kept:
    """A box that keeps what is written to itself."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, content: bytes, *names: str) -> None:
        self.written.append(content)

    def remove_all(self) -> None: ...


@pytest.mark.parametrize("case", FORGED)
def test_what_somebody_else_writes_into_a_mailbox_is_refused_and_the_right_one_is_taken(case: str, where: Where) -> None:
    forge, why = FORGED[case]
    a, b = mailbox(where)
    path = where.folder / "box/run/a/1/to-b/1/0.0"
    b.peers = {"a": a.address}
    a.box = kept = Kept()  # type: ignore[assignment]
    a.send("b", push(0), payload(10))
    while not kept.written:
        time.sleep(0.01)
    path.parent.mkdir(parents=True)
    path.write_bytes(forge(kept.written[0]))
    until = time.monotonic() + 10
    while not (told := b.inbox.news()) and time.monotonic() < until:
        time.sleep(0.02)
    assert told[0]["from"] == "a"
    assert why in told[0]["reason"]
    path.write_bytes(kept.written[0])
    got = b.receive(10)
    assert got is not None
    assert torch.equal(got.payload, payload(10))
    a.close()
    b.close()


def test_an_object_of_an_earlier_life_is_not_taken_for_a_new_one(where: Where) -> None:
    """Somebody copies what region a really wrote, to where its next life writes."""
    a, b = mailbox(where)
    old = {"to": "b", "lives": [0, 1], "number": 0, "index": 0, "size": 10, "update": header_of(push(0))}
    path = where.folder / "box/run/a/1/to-b/1/0.0"
    path.parent.mkdir(parents=True)
    path.write_bytes(a.seal.close(old, bytes(10)))
    until = time.monotonic() + 10
    while not (told := b.inbox.news()) and time.monotonic() < until:
        time.sleep(0.02)
    assert "another object under this name" in told[0]["reason"]
    assert b.receive(0) is None
    a.close()
    b.close()


def test_a_mailbox_signed_by_another_region_is_refused(where: Where) -> None:
    """c knows the token, and writes as a."""
    box = Mailbox(url=str(where.folder / "box"))
    peers: dict[str, str] = {}
    b = MailboxTransport(identity("b"), box, peers, {"a": box}, credentials=credentials(where.ca, "b"))
    c = MailboxTransport(identity("a"), box, peers, {"b": box}, credentials=credentials(where.ca, "c"))
    peers.update(a=c.address, b=b.address)
    b.listen("a")
    c.send("b", push(0), payload(10))
    until = time.monotonic() + 10
    while not (told := b.inbox.news()) and time.monotonic() < until:
        time.sleep(0.02)
    assert "it is for c, not for a" in told[0]["reason"]
    b.close()
    c.close()


def test_a_mailbox_reader_that_comes_back_gets_what_was_not_acknowledged(where: Where) -> None:
    box = Mailbox(url=str(where.folder / "box"))
    peers: dict[str, str] = {}
    a = MailboxTransport(identity("a"), box, peers, {"b": box})
    b = MailboxTransport(identity("b"), box, peers, {"a": box})
    peers.update(a=a.address, b=b.address)
    a.send("b", push(0), payload(9_000_000))
    time.sleep(0.3)
    b.close()
    b = MailboxTransport(identity("b", life=2), box, peers, {"a": box})
    peers["b"] = b.address
    b.listen("a")
    a.send("b", push(1), payload(10))
    assert [(d := b.receive(10)) and d.update.round for _ in range(2)] == [0, 1]
    assert a.drain(10)
    a.close()
    b.close()


class CuttingProxy:
    """Between two ends: forwards so many bytes, then resets every connection, once; later ones are left alone."""

    def __init__(self, target: str, cut_after: int) -> None:
        host, _, port = target.rpartition(":")
        self.target, self.left, self.cut = (host, int(port)), cut_after, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.lock, self.open = threading.Lock(), list[socket.socket]()
        self.forwarded = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self.listener.accept()
            except OSError:
                return
            there = socket.create_connection(self.target)
            with self.lock:
                self.open += [here, there]
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=(one, other, one is here), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if counts:
                    self.forwarded += len(data)
                    if not self.cut and self.forwarded > self.left:
                        self.cut = True
                        return self._reset()
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        return None

    def _reset(self) -> None:
        with self.lock:
            for end in self.open:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self.open.clear()

    def close(self) -> None:
        self.listener.close()
        self._reset()


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("cut_after", [100, 700_000, 7_777_777])
def test_a_transfer_goes_on_where_a_connection_broke(cut_after: int, secured: bool, where: Where) -> None:
    a, b = flight(where, tls=secured, give_up_s=20.0)
    proxy = CuttingProxy(b.address, cut_after)
    a.peers["b"] = proxy.address  # type: ignore[index]
    for round in range(3):
        a.send("b", push(round), payload(4_000_000, round))
    for round in range(3):
        got = b.receive(30)
        assert got is not None
        assert (got.update.round, torch.equal(got.payload, payload(4_000_000, round))) == (round, True)
    assert a.drain(20)
    assert b.receive(0.2) is None
    assert proxy.cut
    assert a.traffic["b"].retries > 0 or cut_after == 100, "gRPC itself tries again where not even HTTP/2 had begun"
    assert proxy.forwarded < 12_000_000 + 8 * 2**19, "what was under way when it broke, and no more, went twice"
    a.close()
    b.close()
    proxy.close()
