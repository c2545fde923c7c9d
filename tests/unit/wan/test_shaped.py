"""The imitated WAN, with a clock of its own where time is told, with the real one where threads are."""

import time

import pytest
import torch

from geotrain.sync.messages import Kind, RoundMade, Update
from geotrain.wan.memory import Exchange, MemoryTransport
from geotrain.wan.shaped import HEADER_BYTES, Line, Shaped
from geotrain.wan.transport import header_of, update_of


def push(round: int) -> Update:
    return Update(Kind.PUSH, 0, "a", round)


def test_a_line_takes_bytes_over_rate_and_half_a_round_trip() -> None:
    line = Line(mbit_per_s=8, rtt_ms=30)
    assert line.seconds(1_000_000 - HEADER_BYTES) == pytest.approx(1.0)
    assert line.delay_s == pytest.approx(0.015)


def test_updates_arrive_no_sooner_than_the_line_allows() -> None:
    exchange = Exchange()
    near, far = Shaped(MemoryTransport("a", exchange), lambda to: Line(8, 40)), MemoryTransport("b", exchange)
    began = time.monotonic()
    for round in range(3):
        near.send("b", push(round), torch.zeros(50_000 - HEADER_BYTES, dtype=torch.uint8))
    arrived = [far.receive(5) and time.monotonic() - began for _ in range(3)]
    near.close()
    assert all(at is not None and at >= 0.05 * (n + 1) + 0.02 - 1e-3 for n, at in enumerate(arrived)), arrived


def test_a_closed_line_drops_what_waits() -> None:
    exchange = Exchange()
    near = Shaped(MemoryTransport("a", exchange), lambda to: Line(0.001, 0))
    near.send("b", push(0), torch.zeros(100, dtype=torch.uint8))
    assert not near.drain(0.01)
    near.close()


def test_a_header_survives_the_wire() -> None:
    made = (RoundMade("tokyo", 10**18, 7, 1, -3, 4, 64), RoundMade("paris", 7, 7, 2, 5, 4, 36))
    update = Update(Kind.MERGED, 2, "tokyo", 7, samples=100, last=9, members=("paris", "tokyo"), made=made)
    assert update_of(header_of(update)) == update


@pytest.mark.parametrize(
    "wrong",
    [{"round": -1}, {"round": "7"}, {"round": True}, {"origin": 3}, {"kind": "bomb"}, {"samples": 1e300}, {"last": -2}, {"epoch": None}],
)
def test_a_wrong_header_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="header field|not a valid"):
        update_of({**header_of(push(1)), **wrong})
