"""What an enemy, or a broken machine, may send: refused, counted, and the rest goes on. 100,000 mutated messages, from one seed."""

import ast
import json
import random
import resource
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from geotrain.job import CodecName
from geotrain.sync.codec import codec_of
from geotrain.sync.messages import Kind, Update
from geotrain.wan.flight import Door, FlightTransport, part_data
from geotrain.wan.parts import Assembler, Outbox, Part, Sent
from geotrain.wan.sealed import Forged, Seal
from geotrain.wan.transport import Delivery, Identity, Inbox, header_of, update_of

LARGEST = 4096
ME = Identity("run", "b", "secret", "model", 1, frozenset("abc"), LARGEST)
YOU = replace(ME, region="a")
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**15, 1e308, "", "a", "x" * 500, [], [[]], {}, {"a": 1}, ["a"] * 50]


@pytest.fixture(autouse=True)
def nothing_is_unpickled() -> Iterator[None]:
    """Whatever is thrown at the receiving side, nothing ever looks up a name for a pickle."""
    found: list[Any] = []
    armed = [True]

    def hook(event: str, arguments: Any) -> None:
        if armed[0] and event == "pickle.find_class":
            found.append(arguments)

    sys.addaudithook(hook)
    yield
    armed[0] = False
    assert not found


def command_of(sent: Sent) -> bytes:
    return json.dumps({**sent.part.header(), "to": "b", "token": "secret", "model": "model"}).encode()


def honest(round: int) -> Iterator[tuple[bytes, bytes]]:
    """An update in parts, as (header, data)."""
    outbox = Outbox(life=round + 2, part_bytes=1000)
    update = Update(Kind.PUSH, 1, "a", round, samples=3)
    outbox.put(update, torch.full((2500,), round % 256, dtype=torch.uint8), 0.0)
    while (sent := outbox.next()) is not None:
        yield command_of(sent), bytes(sent.data)


def mutated(message: bytes, choose: random.Random) -> bytes:
    """Bits flipped, cut off, spliced, repeated; or a value of the header replaced by another."""
    what = choose.randrange(5)
    if what == 0:
        flipped = bytearray(message)
        for _ in range(choose.randint(1, 8)):
            flipped[choose.randrange(len(flipped))] ^= 1 << choose.randrange(8)
        return bytes(flipped)
    if what == 1:
        return message[: choose.randrange(len(message))]
    if what == 2:
        cut, other = choose.randrange(len(message)), choose.randrange(len(message))
        return message[:cut] + message[other:]
    if what == 3:
        return message * choose.randint(2, 40)
    tree = json.loads(message)
    place = tree["update"] if choose.random() < 0.5 else tree
    place[choose.choice(list(place))] = choose.choice(ODD)
    if choose.random() < 0.2:
        tree.pop(choose.choice(list(tree)))
    return json.dumps(tree).encode()


class Receiver:
    """A transport's receiving side without its network."""

    def __init__(self) -> None:
        self.inbox, self.got = Inbox(), list[Delivery]()
        self.assembler = Assembler(ME.life, LARGEST, 4 * LARGEST, self._take)
        self.door = Door(ME, self.inbox)

    def _take(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        self.assembler.took(delivery)

    def take(self, command: bytes, data: bytes) -> bool:
        """As `do_put` does it. False when it was refused."""
        try:
            part = self.door.open(command, "ipv4:10.0.0.9:4242", None)
        except ValueError:
            return False
        try:
            memory = self.assembler.begin(part)
        except ValueError as error:
            self.inbox.refuse(part.update.origin, str(error))
            return False
        if isinstance(memory, str):
            return True
        if len(data) != part.length or zlib.crc32(data) != part.crc:
            self.inbox.refuse(part.update.origin, "damaged")
            return False
        memory[:] = np.frombuffer(data, dtype=np.uint8)
        self.assembler.fill(part)
        return True


def test_a_hundred_thousand_mutated_messages_do_no_harm() -> None:
    choose, receiver = random.Random(20261121), Receiver()
    pool = [message for round in range(20) for message in honest(round)]
    before = 0
    for number in range(100_000):
        command, data = choose.choice(pool)
        if choose.random() < 0.8:
            receiver.take(mutated(command, choose), data)
        else:
            receiver.take(command, data[: choose.randrange(len(data))])
        if number == 20_000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{grown} kB"
    assert receiver.assembler.held <= 4 * LARGEST
    assert sum(receiver.inbox.refused.values()) > 50_000
    assert len(receiver.inbox.refused) <= Inbox.KINDS_OF_REFUSAL + 1
    # A sender's next life is heard, whatever came before under its name.
    outbox = Outbox(life=2**62, part_bytes=1000)
    for round in (100, 101):
        outbox.put(Update(Kind.PUSH, 1, "a", round), torch.full((2500,), 7, dtype=torch.uint8), 0.0)
    got = len(receiver.got)
    while (sent := outbox.next()) is not None:
        assert receiver.take(command_of(sent), bytes(sent.data))
    assert [delivery.update.round for delivery in receiver.got[got:]] == [100, 101]


def test_ten_thousand_mutated_objects_of_a_mailbox_are_refused() -> None:
    choose = random.Random(7)
    content = Seal(YOU, None).close({"to": "b", "lives": [1, 1], "number": 0, "index": 0, "size": 100}, bytes(100))
    mine = Seal(ME, None)
    assert mine.open(content, "a")[0]["size"] == 100
    for _ in range(10_000):
        forged = bytearray(content)
        if choose.random() < 0.5:
            forged[choose.randrange(len(forged))] ^= 1 << choose.randrange(8)
        else:
            del forged[choose.randrange(len(forged)) :]
        try:
            mine.open(bytes(forged), "a")
        except Forged:
            continue
        first, _, rest = content.partition(b"\n")
        assert bytes(forged).endswith(rest), "only how the proof is written may differ"
        assert json.loads(bytes(forged)[: -len(rest) - 1])["mac"] == json.loads(first)["mac"]


PAYLOADS: list[CodecName] = ["fp32", "bf16", "int8", "int4", "e3m0", "topk", "sparseloco", "fedzip", "auto"]


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_decodes_to_its_length_or_is_refused(name: CodecName) -> None:
    """An authentic region whose machine is broken: never an index out of range, never a number that is not of the vector."""
    choose, codec, elements = random.Random(3), codec_of(name), 3000
    good = codec.encode(torch.randn(elements, generator=torch.Generator().manual_seed(0)))
    for _ in range(300):
        bad = good.clone()
        for _ in range(choose.randint(1, 50)):
            bad[choose.randrange(len(bad))] = choose.randrange(256)
        if choose.random() < 0.3:
            bad = bad[: choose.randrange(len(bad))].clone()
        elif choose.random() < 0.1:
            bad = torch.cat([bad, bad])
        try:
            decoded = codec.decode(bad, elements)
        except ValueError:
            continue
        assert decoded.shape == (elements,)


@pytest.mark.parametrize(
    "batch",
    [
        pa.record_batch([pa.array([b"x", b"y"])], names=["part"]),
        pa.record_batch([pa.array([], pa.binary())], names=["part"]),
        pa.record_batch([pa.array([None], pa.binary())], names=["part"]),
        pa.record_batch([pa.array(["text"])], names=["part"]),
        pa.record_batch([pa.array([7])], names=["part"]),
        pa.record_batch([pa.array([b"x"]), pa.array([b"y"])], names=["part", "more"]),
        None,
    ],
)
def test_only_one_binary_value_is_taken(batch: Any) -> None:
    class Chunk:
        data = batch

    assert part_data([Chunk()]) is None
    assert part_data([]) is None


def test_garbage_on_the_port_does_not_stop_what_is_honest() -> None:
    peers: dict[str, str] = {}
    a, b = (FlightTransport(identity, "127.0.0.1:0", peers, give_up_s=20.0) for identity in (YOU, ME))
    peers.update(a=a.address, b=b.address)
    host, _, port = b.address.rpartition(":")
    choose = random.Random(5)
    for _ in range(50):
        with socket.create_connection((host, int(port))) as stranger:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if choose.random() < 0.5 else b""
            stranger.sendall(preface + choose.randbytes(choose.randint(1, 20_000)))
    a.send("b", Update(Kind.PUSH, 1, "a", 0), torch.arange(100, dtype=torch.uint8))
    got = b.receive(20)
    assert got is not None
    assert got.payload.tolist() == list(range(100))
    a.close()
    b.close()


@pytest.mark.parametrize("value", ODD)
def test_a_header_of_odd_values_is_refused(value: Any) -> None:
    good = header_of(Update(Kind.PUSH, 1, "a", 0))
    for name in good:
        try:
            update = update_of({**good, name: value})
        except ValueError:
            continue
        assert type(getattr(update, name)) in (int, str, tuple, Kind, type(None))
    part = Part(1, 0, 0, Update(Kind.PUSH, 1, "a", 0), 10, 0, 10, 0)
    for name in part.header():
        try:
            Part.of({**part.header(), name: value})
        except ValueError:
            continue


NEVER = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "subprocess", "ctypes"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "load", "loads_pickle", "unpickle"}
RECEIVING = ["geotrain/wan", "geotrain/sync", "geotrain/partition/endpoint.py", "geotrain/partition/server.py"]


def receiving_files() -> Iterator[Path]:
    root = Path(__file__).parents[3]
    for place in RECEIVING:
        yield from [root / place] if place.endswith(".py") else (root / place).glob("*.py")


@pytest.mark.parametrize("file", list(receiving_files()), ids=lambda path: path.name)
def test_nothing_on_the_receiving_path_can_run_what_it_receives(file: Path) -> None:
    checks: dict[type[ast.AST], Callable[[Any], set[str]]] = {
        ast.Import: lambda node: {alias.name.split(".")[0] for alias in node.names} & NEVER,
        ast.ImportFrom: lambda node: {(node.module or "").split(".")[0]} & NEVER,
        ast.Call: lambda node: (
            {node.func.id} & FORBIDDEN_CALLS
            if isinstance(node.func, ast.Name)
            else {f"{node.func.value.id}.{node.func.attr}"} & {"torch.load", "np.load", "numpy.load", "importlib.import_module"}
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            else set()
        ),
    }
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (check := checks.get(type(node), lambda node: set()))(node), (file, check(node))
