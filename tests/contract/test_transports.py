"""One suite for every transport: what it delivers, once, in order, and what it leaves behind."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from geotrain.errors import PeerUnreachable, UpdateRefused
from geotrain.sync.messages import Kind, Update
from geotrain.wan.flight import FlightTransport
from geotrain.wan.memory import Exchange, MemoryTransport
from geotrain.wan.shaped import Line, Shaped
from geotrain.wan.transport import Transport

LARGEST = 20_000_000
Pair = tuple[Transport, Transport]


def memory(stack: ExitStack) -> Pair:
    exchange = Exchange()
    return MemoryTransport("a", exchange), MemoryTransport("b", exchange)


def flight(stack: ExitStack) -> Pair:
    peers: dict[str, str] = {}
    pair = tuple(FlightTransport(name, "127.0.0.1:0", peers, token="secret", largest_payload=LARGEST, give_up_s=1.0) for name in "ab")
    peers.update(a=pair[0].address, b=pair[1].address)
    return pair  # type: ignore[return-value]


def shaped(inner: Callable[[ExitStack], Pair]) -> Callable[[ExitStack], Pair]:
    def make(stack: ExitStack) -> Pair:
        a, b = inner(stack)
        return Shaped(a, lambda to: Line(2000, 4)), Shaped(b, lambda to: Line(2000, 4))

    return make


KINDS = {"memory": memory, "flight": flight, "shaped memory": shaped(memory), "shaped flight": shaped(flight)}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        a, b = KINDS[request.param](stack)
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


def test_closing_in_the_middle_leaves_no_thread() -> None:
    for make in KINDS.values():
        with ExitStack() as stack:
            a, b = make(stack)
            for round in range(5):
                a.send("b", push(round), payload(5_000_000))
            a.close()
            b.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geotrain-")]


# Only what goes over a network can fail like a network.


def endpoint(
    name: str, peers: dict[str, str], listen: str = "127.0.0.1:0", token: str = "secret", give_up_s: float = 20.0
) -> FlightTransport:
    made = FlightTransport(name, listen, peers, token=token, largest_payload=1_000_000, give_up_s=give_up_s)
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
    b = endpoint("b", peers, listen=address)
    assert [(d := b.receive(20)) and d.update.round for _ in range(5)] == list(range(5))
    assert a.drain(20)
    assert a.traffic["b"].retries > 0
    assert b.receive(0.2) is None
    a.close()
    b.close()


def test_an_update_sent_twice_is_taken_once() -> None:
    peers: dict[str, str] = {}
    a, b = endpoint("a", peers), endpoint("b", peers)
    for _ in range(3):
        a.send("b", push(0), payload(1000))
    assert a.drain(20)
    assert b.receive(1) is not None
    assert b.receive(0.2) is None
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


@pytest.mark.parametrize(("token", "size", "why"), [("wrong", 10, "wrong run token"), ("secret", 2_000_000, "at most 1000000")])
def test_what_does_not_belong_here_is_refused_for_good(token: str, size: int, why: str) -> None:
    peers: dict[str, str] = {}
    a, b = endpoint("a", peers, token=token), endpoint("b", peers)
    a.send("b", push(0), payload(size))
    with pytest.raises(UpdateRefused, match=why):
        for _ in range(100):
            a.receive(0.1)
    assert any(why in reason for reason in b.refused)
    assert b.receive(0) is None
    a.close()
    b.close()
