"""What is staged is what was there then, training goes on while it is written, and a store that fails is said."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from geotrain import checkpoint
from geotrain.checkpoint import StoredPart
from geotrain.errors import OutputUnwritable
from geotrain.partition.staging import Stager


def test_what_is_staged_is_what_was_there_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    stager, weights, goes = Stager("north", told.append), torch.ones(1000), threading.Event()
    write = checkpoint.write_bytes

    def slowly(*args: Any, **more: Any) -> None:
        goes.wait(20)
        write(*args, **more)

    monkeypatch.setattr(checkpoint, "write_bytes", slowly)
    stager.stage(str(tmp_path), 10, {"w": weights}, {"round": 10})
    weights.zero_()
    stager.write({"samples": 5})
    weights.sub_(1)  # training goes on
    assert not told
    goes.set()
    stager.close()
    (message,) = told
    part = StoredPart(**message["stored"])
    assert torch.equal(checkpoint.read_part(part)[0]["w"], torch.ones(1000))
    note = json.loads((tmp_path / "north.done.json").read_text())
    assert (note["done"], StoredPart(**note["part"]), message["staging"]) == ({"samples": 5}, part, 1)


def test_memory_is_taken_beside_training_and_used_by_the_first_staging(tmp_path: Path) -> None:
    stager, weights = Stager("north", lambda message: None), torch.ones(3_000_000)
    assert stager.fresh
    stager.prepare(weights.nbytes + 1000)
    assert not stager.fresh
    assert stager._thread is not None
    stager._thread.join()
    taken = stager._image
    assert len(taken) > weights.nbytes
    stager.stage(str(tmp_path), 10, {"w": weights}, {})
    assert stager._image is taken
    stager.write({})
    stager.close()


def test_the_next_waits_for_the_one_before(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    stager = Stager("north", told.append)
    for round in (10, 20, 30):
        assert stager.stage(checkpoint.folder(str(tmp_path), round), round, {"w": torch.ones(100_000)}, {}) >= 0
        assert len(told) == round // 10 - 1
        stager.write({})
    stager.close()
    assert [message["stored"]["round"] for message in told] == [10, 20, 30]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / "file").write_text("in the way")
    stager = Stager("north", told.append)
    stager.stage(str(tmp_path / "file"), 10, {"w": torch.ones(3)}, {})
    stager.write({})
    stager.close()
    assert "region north cannot write" in OutputUnwritable(*told[0]["unwritten"]).message


def test_what_is_packed_is_what_the_library_reads_and_writes() -> None:
    """Into memory that was used before too, whatever the tensors look like in theirs."""
    grid = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "bool": torch.ones(3, dtype=torch.bool),
        "empty": torch.zeros(0, 4),
        "int": torch.arange(3),
        "one": torch.tensor(2.5),
        "strided": grid[:, 0],
        "transposed": grid.t(),
    }
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"geotrain": '{"round": 7}'})
    used = checkpoint.pack({"larger": torch.ones(1000)})
    for into in (None, bytearray(), used):
        assert bytes(checkpoint.pack(tensors, {"round": 7}, into=into)) == expected
    loaded, facts = checkpoint.tensors_from_bytes(expected)
    assert facts == {"round": 7}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    complex = {"c": torch.ones(2, dtype=torch.complex64), "f8": torch.ones(3).to(torch.float8_e4m3fn)}  # in an order of their own
    loaded, _ = checkpoint.tensors_from_bytes(bytes(checkpoint.pack({**tensors, **complex})))
    assert all(loaded[name].dtype == tensor.dtype and torch.equal(loaded[name].float(), tensor.float()) for name, tensor in tensors.items())
    assert torch.equal(loaded["c"], complex["c"])
    assert loaded["f8"].dtype == torch.float8_e4m3fn
    assert checkpoint.tensors_from_bytes(bytes(checkpoint.pack({}))) == ({}, {})
