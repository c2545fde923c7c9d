"""The tally: how far every region has come in its rows, and what of that is in what the regions hold. So a region that lost its state
goes on with the first row that nobody has learned from, and after a checkpoint to which all went back, with the first row after that.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geotrain.partition.orders import Place
from geotrain.report.folder import RunFolder


@dataclass(slots=True)
class _Seat:
    life: int
    cursor: dict[str, Any]
    """Of its book of leases, when it was taken."""
    round: int
    """Its first."""
    closed: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Round -> (epoch, inner steps made of it after the round, rows of the round)."""


class Tally:
    """Thread-safe."""

    def __init__(self) -> None:
        self._seats: dict[str, list[_Seat]] = {}
        """Of each region, the oldest first: those that the run may go back to."""
        self._settled: dict[str, int] = {}
        """Region -> the first of its rounds that no other region holds."""
        self._lock = threading.Lock()

    def seated(self, region: str, life: int, cursor: dict[str, Any], round: int) -> None:
        """It begins there."""
        with self._lock:
            self._seats.setdefault(region, []).append(_Seat(life, cursor, round))

    def heard(self, region: str, rounds: Sequence[Mapping[str, Any]], settled: Mapping[str, int]) -> None:
        """What a leader told. Of its own rounds only the others' word counts: theirs is what it will be given."""
        with self._lock:
            seats = {seat.life: seat for seat in self._seats.get(region, ())}
            for record in rounds:
                if (seat := seats.get(record["life"])) is not None:
                    seat.closed[record["round"]] = record["epoch"], record["done"], record["samples"]
            for other, first in settled.items():
                if other != region:
                    self._settled[other] = max(first, self._settled.get(other, 0))

    def place(self, region: str) -> Place | None:
        """Where a region goes on that lost its state while others went on; None: it never had a seat."""
        with self._lock:
            if not (seats := self._seats.get(region)):
                return None
            seat = seats[-1]
            if (last := _last_before(seat, self._settled.get(region, 0))) is None:
                return Place(seat.cursor, seat.round)
            return Place(seat.cursor, last + 1, seat.closed[last][:2])

    def newest(self) -> int:
        """The first round that no region has told of yet."""
        with self._lock:
            return max((max(seats[-1].closed) + 1 for seats in self._seats.values() if seats[-1].closed), default=0)

    def samples_held(self, region: str, since: int) -> int:
        """Rows of its last seat, from a round on, that another region holds."""
        with self._lock:
            seats, settled = self._seats.get(region), self._settled.get(region, 0)
            return sum(rows for round, (_, _, rows) in seats[-1].closed.items() if since <= round < settled) if seats else 0

    def back_to(self, round: int) -> None:
        """The run goes on from a checkpoint: what came later is void, and so are seats that were taken later."""
        with self._lock:
            self._settled = {region: min(first, round) for region, first in self._settled.items()}
            for seats in self._seats.values():
                del seats[_at(seats, round) + 1 :]
                for seat in seats:
                    seat.closed = {closed: what for closed, what in seat.closed.items() if closed < round}

    def checkpointed(self, round: int) -> None:
        """The run goes back no further than that."""
        with self._lock:
            for region, seats in self._seats.items():
                del seats[: _at(seats, round)]
                for seat in seats:
                    last = _last_before(seat, min(round, self._settled.get(region, 0)))
                    seat.closed = {closed: what for closed, what in seat.closed.items() if last is None or closed >= last}

    @classmethod
    def of(cls, folder: RunFolder, round: int) -> "Tally":
        """As it was when the checkpoint before a round was made."""
        tally = cls()
        for event in folder.lines("events.jsonl"):
            if event["event"] == "seated":
                tally.seated(event["region"], event["life"], event["cursor"], event["round"])
        for record in folder.lines("rounds.jsonl"):
            tally.heard(record["region"], [record], record.get("settled", {}) if record["round"] < round else {})
        tally.back_to(round)
        return tally


def _at(seats: Sequence[_Seat], round: int) -> int:
    """The number of the seat that a region had at a round: the last that began by then, or else the first."""
    return max((number for number, seat in enumerate(seats) if seat.round <= round), default=0)


def _last_before(seat: _Seat, round: int) -> int | None:
    """Its last round before that one."""
    return max((closed for closed in seat.closed if closed < round), default=None)
