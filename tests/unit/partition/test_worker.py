import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from geotrain.errors import TaskFailed
from geotrain.partition import worker
from geotrain.partition.worker import device_fault
from tests.making import Clock


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: str(error)[:10],
)
def test_a_device_is_blamed_for_what_it_raises_and_for_what_the_task_raised_for_it(error: Exception) -> None:
    assert (device_fault(error) or "").startswith(type(error).__name__)
    failed = TaskFailed("north", "loss or backward", "")
    failed.__cause__ = error
    assert device_fault(failed) == device_fault(error)


def test_a_task_is_blamed_for_its_own() -> None:
    assert device_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert device_fault(TaskFailed("north", "loss or backward", "")) is None


class Seat(SimpleNamespace):
    """One of that life."""

    def __init__(self, life: int) -> None:
        super().__init__(order=SimpleNamespace(life=life), aborted=threading.Event(), closed=threading.Event())
        self.lapsed_at, self.running = None, False

    def close(self) -> None:
        self.closed.set()


def seated(monkeypatch: pytest.MonkeyPatch, seat: Seat) -> Seat:
    monkeypatch.setitem(worker._SEATS, ("run-1", "north"), cast(Any, seat))
    return seat


def test_a_seat_that_was_told_to_end_and_that_nobody_takes_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LEFT_S", 0.05)
    seat = seated(monkeypatch, Seat(7))
    worker.abort("run-1", "north", {8})
    assert not seat.aborted.is_set(), "another was meant"
    worker.abort("run-1", "north", {7})
    assert seat.aborted.is_set()
    assert seat.closed.wait(30)
    assert not worker.holds("run-1", "north", {7})


def test_one_whose_links_are_still_looked_at_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LEFT_S", 0.05)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=(clock := Clock())))
    seat = seated(monkeypatch, Seat(7))
    seat.reach = lambda addresses: addresses
    worker.abort("run-1", "north", {7})
    assert not seat.closed.wait(0.3)
    clock.now += 0.04
    worker.reach("run-1", "north", {})
    clock.now += 0.04
    assert not seat.closed.wait(0.3)
    clock.now += 0.04
    assert seat.closed.wait(30)


def test_the_next_seat_in_its_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LEFT_S", 0.05)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=(clock := Clock())))
    seat = seated(monkeypatch, Seat(7))
    worker.abort("run-1", "north", {7})
    next_one = seated(monkeypatch, Seat(8))
    clock.now += 1.0
    assert not next_one.closed.wait(0.5)
    assert not seat.closed.is_set(), "who took its place has closed it"


def test_a_seat_that_nobody_watches_is_given_up_however_its_segment_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seat = seated(monkeypatch, Seat(7))

    def segment(_: Any) -> None:
        seat.lapsed_at = 0.0
        raise RuntimeError

    seat.segment = segment
    with pytest.raises(RuntimeError):
        worker.train_segment("run-1", "north", cast(Any, None))
    assert seat.closed.is_set()
