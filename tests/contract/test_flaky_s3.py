"""A bucket that throttles, fails and dawdles: the mailbox and checkpoints get through, and do not ask more than they said."""

import uuid

import pytest
import torch

from geotrain import checkpoint
from geotrain.checkpoint import Manifest
from geotrain.job import Mailbox
from geotrain.sync.messages import Kind, Update
from geotrain.wan.mailbox import PART_BYTES, MailboxTransport
from geotrain.wan.transport import Identity
from tests.s3 import Flaky

TROUBLES = {
    "throttled": {"slow_down": 4},
    "failing": {"broken": 4},
    "late": {"late": 5},
    "all of it": {"slow_down": 5, "broken": 7, "late": 11},
}


def pair(url: str) -> tuple[MailboxTransport, MailboxTransport]:
    peers: dict[str, str] = {}
    box = Mailbox(url=url)
    a, b = (
        MailboxTransport(Identity("run", name, "secret", "model", 1, frozenset("ab"), 10 * PART_BYTES), box, peers, {"a": box, "b": box})
        for name in "ab"
    )
    peers.update(a=a.address, b=b.address)
    b.listen("a")
    return a, b


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_mailbox_gets_through(flaky: Flaky, bucket: str, trouble: str) -> None:
    vars(flaky).update(TROUBLES[trouble])
    a, b = pair(f"s3://{bucket}/{uuid.uuid4().hex}")
    sizes = [10, PART_BYTES + 1, 3 * PART_BYTES, 0, 1000]
    for round, size in enumerate(sizes):
        a.send("b", Update(Kind.PUSH, 1, "a", round), torch.full((size,), round, dtype=torch.uint8))
    got = [b.receive(60) for _ in sizes]
    assert [delivery and (delivery.update.round, delivery.payload.numel()) for delivery in got] == list(enumerate(sizes))
    assert a.drain(60)
    assert not b.inbox.news()
    vars(flaky).update(slow_down=0, broken=0, late=0)
    a.close()
    b.close()


def test_requests_of_an_update_are_as_many_as_it_says(flaky: Flaky, bucket: str) -> None:
    a, b = pair(f"s3://{bucket}/{uuid.uuid4().hex}")
    a.send("b", Update(Kind.PUSH, 1, "a", 0), torch.zeros(10, dtype=torch.uint8))
    assert b.receive(20) is not None
    assert a.drain(20)
    before = flaky.requests.copy()
    parts = 3
    for round in range(1, 6):
        a.send("b", Update(Kind.PUSH, 1, "a", round), torch.zeros(parts * PART_BYTES, dtype=torch.uint8))
        assert b.receive(20) is not None
        assert a.drain(20)
    asked = flaky.requests - before
    assert asked["PUT"] == 5 * (parts + 1), "the parts, and the acknowledgement"
    assert asked["POST"] + asked["DELETE"] <= 5 * parts
    assert asked["GET"] <= 5 * (parts + 40)
    assert a.link("b").requests + b.link("a").requests >= asked["PUT"] + asked["GET"] - before["GET"] - 60
    a.close()
    b.close()


@pytest.mark.parametrize("trouble", TROUBLES)
def test_checkpoints_get_through(flaky: Flaky, bucket: str, trouble: str) -> None:
    url = f"s3://{bucket}/{uuid.uuid4().hex}"
    vars(flaky).update(TROUBLES[trouble])
    for round in (10, 20):
        where = checkpoint.join(checkpoint.folder(url, round), "north.safetensors")
        part = checkpoint.write_part("north", where, round, {"w": torch.full((300, 2), float(round))}, {"round": round})
        checkpoint.commit(url, Manifest("r", round // 10, round, 0, 100, None, {}, {}, (part,)))
    checkpoint.prune(url, 1)
    latest = checkpoint.latest(url)
    assert latest is not None
    assert latest.round == 20
    assert torch.equal(checkpoint.read_part(latest.part("north"))[0]["w"], torch.full((300, 2), 20.0))
