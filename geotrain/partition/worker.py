"""What a worker does when it is told, by `calls.on_worker`: take its seat, train a segment, give the seat up."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from distributed import get_worker

from geotrain.errors import DeviceFailed, WorkerLost
from geotrain.partition import notice
from geotrain.partition.orders import Directory, SeatOrder, SeatTaken, SegmentDone, SegmentOrder
from geotrain.partition.seat import Seat
from geotrain.sync.messages import View

_SEATS: dict[tuple[str, str], Seat] = {}
"""This process's seats, by run and region: the state that stays resident between segments."""


DEVICE_FAULTS = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))


@contextmanager
def blamed_on_device(region: str) -> Iterator[None]:
    """What a device raises that is broken or full. CUDA tells of it at whatever call comes next, and is of no use to this process then."""
    try:
        yield
    except Exception as error:
        if (why := device_fault(error)) is None:
            raise
        raise DeviceFailed(region, get_worker().address, why) from error


def device_fault(error: BaseException) -> str | None:
    """What a device or the memory has to do with an error, or with what caused it."""
    first = error.__cause__ if isinstance(error.__cause__, Exception) else error
    said = str(first).partition("\n")[0]
    if isinstance(first, DEVICE_FAULTS) or any(words in said for words in ("CUDA error", "can't allocate memory")):
        return f"{type(first).__name__}: {said}"
    return None


def take_seat(order: SeatOrder) -> SeatTaken:
    """Make this process's seat; one left over from an earlier attempt is closed first."""
    leave(order.run, order.region)
    _stop_profiler()
    with blamed_on_device(order.region):
        seat = Seat(order)
        _SEATS[order.run, order.region] = seat
        return seat.taken()


def _stop_profiler() -> None:
    """Dask's, which may freeze this process for ever on Python 3.11.

    It asks for the frames of all threads a hundred times a second. CPython before 3.12 may collect garbage while it answers, and wait for
    itself where a thread comes or goes at that moment, as gRPC's do all the time (github.com/python/cpython/issues/106883).
    """
    worker = get_worker()
    if sys.version_info < (3, 12) and (profiler := worker.periodic_callbacks.get("profile")) is not None:
        worker.loop.add_callback(profiler.stop)


def train_segment(run: str, region: str, order: SegmentOrder) -> SegmentDone | None:
    seat = _seat(run, region)
    with blamed_on_device(region):
        done = seat.segment(order)
    if seat.lapsed_at is not None:
        leave(run, region)
    return done


def evaluate_seat(run: str, region: str) -> dict[str, tuple[float, float]]:
    with blamed_on_device(region):
        return _seat(run, region).evaluate()


def reach(run: str, region: str, addresses: dict[str, str]) -> dict[str, str | None]:
    """Where there is no seat, there is nobody to whom a link could be cut."""
    return _SEATS[run, region].reach(addresses) if (run, region) in _SEATS else dict.fromkeys(addresses)


def merge_fully(run: str, region: str, directory: Directory) -> tuple[str, dict[str, dict[str, Any]], float]:
    with blamed_on_device(region):
        return _seat(run, region).merge_fully(directory)


def write_model(run: str, region: str, url: str) -> int:
    with blamed_on_device(region):
        return _seat(run, region).write_model(url)


def _seat(run: str, region: str) -> Seat:
    if (run, region) not in _SEATS:
        raise WorkerLost(region, get_worker().address, "giving it something to do: its process was replaced")
    return _SEATS[run, region]


def ask_stop(run: str, region: str, ticket: int) -> None:
    """Runs beside the segment: ask the leader to end it at the next round that all can agree on."""
    if (run, region) in _SEATS:
        _SEATS[run, region].stop_in = ticket


def watched(run: str, region: str) -> None:
    """Runs beside the segment: the control plane is there."""
    if (run, region) in _SEATS:
        _SEATS[run, region].watched_at = time.monotonic()


def tell_view(run: str, region: str, view: View, directory: Directory) -> None:
    """Runs beside the segment: who is in from now on."""
    if (run, region) in _SEATS:
        _SEATS[run, region].news.put((view, directory))


def heed_notices() -> bool:
    """A SIGTERM to this process is told to the control planes of its seats, which take them back before it ends."""

    def noticed() -> None:
        for seat in list(_SEATS.values()):
            seat.reporter.notice()

    return notice.heed(noticed, free=lambda: not _SEATS)


def here() -> None:
    """Answers as soon as the worker has nothing else to do."""


def abort(run: str, region: str) -> None:
    """Runs beside the segment: end it at once."""
    if (run, region) in _SEATS:
        _SEATS[run, region].aborted = True


def leave(run: str, region: str) -> None:
    """Give the seat up: threads, port and group."""
    if (seat := _SEATS.pop((run, region), None)) is not None:
        seat.close()


def meeting_point() -> str:
    """tcp://host:port on this worker where the region's workers can meet."""
    host = str(get_worker().address).split("://")[1].rpartition(":")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((host, 0))
        return f"tcp://{host}:{free.getsockname()[1]}"
