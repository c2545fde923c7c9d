"""What a worker does when it is told, by `calls.on_worker`: take its seat, train a segment, give the seat up."""

import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from distributed import get_worker

from geotrain.errors import DeviceFailed, Stopped, WorkerLost
from geotrain.partition import notice
from geotrain.partition.orders import Directory, SeatOrder, SeatTaken, SegmentDone, SegmentOrder
from geotrain.partition.seat import Seat
from geotrain.sync.messages import View

_SEATS: dict[tuple[str, str], Seat] = {}
"""This process's seats, by scope and region: the state that stays resident between segments."""


_CHANGING = threading.RLock()
"""Held while a seat is given up: another takes its port, and its group."""

LEFT_S = 60.0
"""How long a seat that was told to end may be taken back."""

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
    """Make this process's seat; one left over from an earlier attempt is closed first. Raises Stopped for who is not in charge any more."""
    with _CHANGING:
        for scope, region in [key for key, old in _SEATS.items() if (old.order.run, old.order.region) == (order.run, order.region)]:
            if _SEATS[scope, region].order.lease > order.lease:
                raise Stopped(order.run)
            leave(scope, region)
    _stop_profiler()
    with blamed_on_device(order.region):
        seat = Seat(order)
        _SEATS[order.scope, order.region] = seat
        return seat.taken()


def _stop_profiler() -> None:
    """Dask's, which may freeze this process for ever on Python 3.11.

    It asks for the frames of all threads a hundred times a second. CPython before 3.12 may collect garbage while it answers, and wait for
    itself where a thread comes or goes at that moment, as gRPC's do all the time (github.com/python/cpython/issues/106883).
    """
    worker = get_worker()
    if sys.version_info < (3, 12) and (profiler := worker.periodic_callbacks.get("profile")) is not None:
        worker.loop.add_callback(profiler.stop)


def train_segment(scope: str, region: str, order: SegmentOrder) -> SegmentDone | None:
    seat = _seat(scope, region)
    seat.running = True
    try:
        with blamed_on_device(region):
            return seat.segment(order)
    finally:
        seat.running = False
        if seat.lapsed_at is not None:
            leave(scope, region)


def evaluate_seat(scope: str, region: str) -> dict[str, tuple[float, float]]:
    with blamed_on_device(region):
        return _seat(scope, region).evaluate()


def reach(scope: str, region: str, addresses: dict[str, str]) -> dict[str, str | None]:
    """Where there is no seat, there is nobody to whom a link could be cut."""
    if (seat := _SEATS.get((scope, region))) is None:
        return dict.fromkeys(addresses)
    seat.watched_at = time.monotonic()
    return seat.reach(addresses)


def merge_fully(scope: str, region: str, directory: Directory) -> tuple[str, dict[str, dict[str, Any]], float]:
    with blamed_on_device(region):
        return _seat(scope, region).merge_fully(directory)


def write_model(scope: str, region: str, url: str) -> int:
    with blamed_on_device(region):
        return _seat(scope, region).write_model(url)


def _seat(scope: str, region: str) -> Seat:
    if (scope, region) not in _SEATS:
        raise WorkerLost(region, get_worker().address, "giving it something to do: its process was replaced")
    return _SEATS[scope, region]


def ask_stop(scope: str, region: str, ticket: int) -> None:
    """Runs beside the segment: ask the leader to end it at the next round that all can agree on."""
    if (scope, region) in _SEATS:
        _SEATS[scope, region].stop_in = ticket


def watched(scope: str, region: str, known: tuple[View, Directory] | None, stop_in: int | None) -> None:
    """Runs beside the segment: the control plane is there. It says again what it said last, for that may have been lost on its way."""
    if (scope, region) in _SEATS:
        _SEATS[scope, region].watched_at = time.monotonic()
    if known is not None:
        tell_view(scope, region, *known)
    if stop_in is not None:
        ask_stop(scope, region, stop_in)


def tell_view(scope: str, region: str, view: View, directory: Directory) -> None:
    """Runs beside the segment: who is in from now on."""
    seat = _SEATS.get((scope, region))
    if seat is not None and seat.server is not None and view.epoch > seat.server.machine.at.view.epoch:
        seat.news.put((view, directory))


def heed_notices() -> bool:
    """A SIGTERM to this process is told to the control planes of its seats, which take them back before it ends."""

    def noticed() -> None:
        for seat in list(_SEATS.values()):
            seat.reporter.notice()

    return notice.heed(noticed, free=lambda: not _SEATS)


def here() -> None:
    """Answers as soon as the worker has nothing else to do."""


def abort(scope: str, region: str, lives: Collection[int]) -> None:
    """Runs beside the segment of a seat that is one of these: end it at once. It is given up once nobody asks anything of it any more."""
    if holds(scope, region, lives):
        seat = _SEATS[scope, region]
        seat.watched_at = time.monotonic()
        if not seat.aborted.is_set():
            seat.aborted.set()
            _leave_later(scope, region, seat)


def _leave_later(scope: str, region: str, seat: Seat) -> None:
    def look() -> None:
        with _CHANGING:
            if _SEATS.get((scope, region)) is not seat:
                return
            if seat.running or time.monotonic() - seat.watched_at < LEFT_S:
                _leave_later(scope, region, seat)
            else:
                leave(scope, region)

    later = threading.Timer(LEFT_S, look)
    later.daemon = True
    later.start()


def holds(scope: str, region: str, lives: Collection[int]) -> bool:
    """Whether this process has a seat that is one of these."""
    return (scope, region) in _SEATS and _SEATS[scope, region].order.life in lives


def leave(scope: str, region: str) -> None:
    """Give the seat up: threads, port and group."""
    with _CHANGING:
        if (seat := _SEATS.pop((scope, region), None)) is not None:
            seat.close()


def meeting_point() -> str:
    """tcp://host:port on this worker where the region's workers can meet."""
    host = str(get_worker().address).split("://")[1].rpartition(":")[0]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((host, 0))
        return f"tcp://{host}:{free.getsockname()[1]}"
