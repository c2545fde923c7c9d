"""Updates in parts: whatever is lost, late, twice or out of order, and whoever begins again, each arrives once and whole."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from geotrain.sync.messages import Kind, Update
from geotrain.wan.parts import AHEAD, Assembler, Outbox, Part, Sent
from geotrain.wan.timing import MOST_CONNECTIONS, PART_BYTES, LinkTiming
from geotrain.wan.transport import Delivery


def outbox_of(life: int = 1) -> Outbox:
    """Ten bytes a part."""
    return Outbox(life, part_bytes=10)


def push(round: int) -> Update:
    return Update(Kind.PUSH, 1, "a", round, samples=5)


def payload(size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Receiver:
    """The receiving end as a transport drives it."""

    def __init__(self, room: int = 1000, life: int = 1) -> None:
        self.got: list[Delivery] = []
        self.assembler = Assembler(life, 100, room, self.got.append)

    def take(self, sent: Sent) -> tuple[str, int]:
        part = Part.of(sent.part.header())
        memory = self.assembler.begin(part)
        if isinstance(memory, str):
            return memory, self.assembler.life
        memory[:] = sent.data
        return self.assembler.fill(part), self.assembler.life


SIZES = st.lists(st.integers(0, 45), min_size=1, max_size=6)


@given(SIZES, st.integers(0, 10**6), st.floats(0, 0.6), st.booleans())
def test_whatever_is_lost_each_update_arrives_once_in_order(sizes: list[int], seed: int, loss: float, restarts: bool) -> None:
    """Parts are lost on the way, answers are lost on the way back, or come late; the receiver may lose its memory once."""
    chance, outbox, receiver = random.Random(seed), outbox_of(1), Receiver()
    for number, size in enumerate(sizes):
        outbox.put(push(number), payload(size, number), 0.0)
    under_way: list[tuple[Sent, tuple[str, int] | None]] = []
    done: list[int] = []
    lost_memory_after = chance.randrange(10) if restarts else -1
    before: list[Delivery] = []
    for turn in range(10_000):
        if not outbox.pending:
            break
        if turn == lost_memory_after:
            before = receiver.got
            receiver = Receiver(life=2)
        if len(under_way) < 4 and (sent := outbox.next()) is not None:
            under_way.append((sent, None if chance.random() < loss else receiver.take(sent)))
            continue
        sent, answer = under_way.pop(chance.randrange(len(under_way)))
        if answer is None or chance.random() < loss / 2:
            outbox.failed(sent)
        else:
            done += [outgoing.number for outgoing in outbox.answered(sent, answer[1])]
    got = [delivery.update.round for delivery in before] + [delivery.update.round for delivery in receiver.got]
    assert not outbox.pending
    assert done == list(range(len(sizes)))
    assert sorted(set(got)) == list(range(len(sizes)))
    assert [delivery.update.round for delivery in receiver.got] == sorted({delivery.update.round for delivery in receiver.got})
    if not restarts:
        assert got == list(range(len(sizes)))
    for delivery in before + receiver.got:
        assert torch.equal(delivery.payload, payload(sizes[delivery.update.round], delivery.update.round))
    for delivery in receiver.got:
        receiver.assembler.took(delivery)
    assert receiver.assembler.held == 0


def send_all(outbox: Outbox, receiver: Receiver) -> None:
    while (sent := outbox.next()) is not None:
        outbox.answered(sent, receiver.take(sent)[1])


def test_a_sender_that_begins_again_sends_nothing_twice() -> None:
    receiver = Receiver()
    first = outbox_of(1)
    first.put(push(0), payload(30, 0), 0.0)
    send_all(first, receiver)
    first.put(push(1), payload(30, 1), 0.0)
    half = first.next()
    assert half is not None
    receiver.take(half)
    again = outbox_of(2)
    for round in (0, 1, 2):
        again.put(push(round), payload(30, round), 0.0)
    send_all(again, receiver)
    assert [delivery.update.round for delivery in receiver.got] == [0, 1, 2]
    late = first.next()
    assert late is not None
    with pytest.raises(ValueError, match="earlier life of a"):
        receiver.take(late)


def test_a_receiver_without_room_asks_to_wait_until_some_is_taken_but_what_is_next_waits_for_nothing_else() -> None:
    receiver, outbox = Receiver(room=100), outbox_of(1)
    for round in range(3):
        outbox.put(push(round), payload(60, round), 0.0)
    first = [sent for _ in range(6) if (sent := outbox.next())]
    second = outbox.next()
    assert second is not None
    assert receiver.take(first[0])[0] == "taken"
    assert receiver.take(second)[0] == "later"
    for sent in first[1:]:
        assert receiver.take(sent)[0] == "taken"
    assert [delivery.update.round for delivery in receiver.got] == [0]
    assert receiver.take(second)[0] == "later"
    receiver.assembler.took(receiver.got[0])
    assert receiver.take(second)[0] == "taken"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 101}, "at most 100"),
        ({"size": 10**15, "offset": 10**12}, "at most 100"),
        ({"number": AHEAD + 1}, "is next"),
        ({"offset": -1}, "part field offset"),
        ({"offset": 30}, "30\\+10 of 30 bytes"),
        ({"length": 2**20, "size": 2**21}, "0\\+1048576 of 2097152"),
        ({"length": 0}, "an empty part"),
        ({"base": 1}, "base 1"),
        ({"life": True}, "part field life"),
        ({"update": None}, "part field update"),
    ],
)
def test_what_no_honest_sender_sends_is_refused(change: dict[str, Any], why: str) -> None:
    receiver, outbox = Receiver(), outbox_of(1)
    outbox.put(push(0), payload(30, 0), 0.0)
    sent = outbox.next()
    assert sent is not None
    with pytest.raises(ValueError, match=why):
        receiver.assembler.begin(Part.of(sent.part.header() | change))
    assert receiver.assembler.held == 0


def test_another_update_under_the_same_number_is_refused() -> None:
    receiver, outbox, other = Receiver(), outbox_of(1), outbox_of(1)
    outbox.put(push(0), payload(30, 0), 0.0)
    other.put(push(1), payload(30, 0), 0.0)
    first, second = outbox.next(), other.next()
    assert first is not None
    assert second is not None
    receiver.take(first)
    with pytest.raises(ValueError, match="another than its earlier parts"):
        receiver.take(second)


def pace_on(rate: Any, seconds: float, believed: float = 1e6) -> LinkTiming:
    """A pace after so many seconds on a link whose goodput is a function of the connections."""
    rtt = 0.1
    pace, now = LinkTiming(rtt, believed), 0.0
    while now < seconds:
        now += PART_BYTES / rate(pace.connections)
        pace.answered(rtt + pace.parts * PART_BYTES / rate(pace.connections), PART_BYTES, now)
    return pace


def test_connections_are_as_many_as_fill_the_pipe() -> None:
    one = 3e6 / 0.1  # what a connection's buffer carries
    assert pace_on(lambda n: min(n * one, 62.5e6), 60).connections == MOST_CONNECTIONS, "a long pipe: several for each that would do"
    assert LinkTiming(0.1, 62.5e6).connections == MOST_CONNECTIONS, "when that is believed, from the first part on"
    assert pace_on(lambda n: 12.5e6, 60).connections == 1
    assert pace_on(lambda n: min(n * 3e6, 12e6), 300, believed=30e6).connections in (4, 5, 6)
    assert pace_on(lambda n: min(n * 3e6, 12e6), 300, believed=12e6).connections == 3, "most of what was believed"


def test_patience_follows_the_link() -> None:
    fast, slow = pace_on(lambda n: 12.5e6, 30, 0.03), pace_on(lambda n: 625e3, 60, 0.03)
    assert fast.patience_s(6) < 6
    assert slow.patience_s(6) > 10
    assert slow.patience_s(6) < 60
