"""The ledger: from what every seat of a region trained on, which rows counted how often, epoch by epoch. Pure.

Leases are deterministic, so a seat's beginning and its rounds' inner steps name every row. A position is a row's place in its epoch: the
region's row groups laid end to end, each in its permutation of that epoch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geotrain.data.inventory import RowGroup
from geotrain.data.leases import LeaseBook, permuted


@dataclass(frozen=True, slots=True)
class RoundOfRows:
    """Inner steps `done - steps` to `done` of an epoch; negative ones are the last of the epoch before."""

    round: int
    epoch: int
    done: int
    steps: int
    void: bool = False
    """It ended in a NaN or an infinity, and counts for nothing."""
    samples: int = 0
    """Rows."""


@dataclass(slots=True)
class Seating:
    """A region's seat, from its first round to the first of the next seat."""

    cursor: dict[str, Any]
    """Of the book of leases, as it began."""
    round: int
    rounds: list[RoundOfRows] = field(default_factory=list)
    until: float = math.inf
    """The first of its rounds that nobody holds: the run went back to a checkpoint before it, or the region was lost with it."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Rows that were trained on in a round that did not count."""

    round: int
    why: Literal["lost", "void"]
    """The round was lost with a seat; or it ended in a NaN or an infinity."""
    stands: bool
    """It was not lost: a void one stands, and its rows are discarded."""
    positions: NDArray[np.int64]
    again: NDArray[np.bool_]
    """[positions] those that counted in another round: trained again."""


@dataclass(frozen=True, slots=True)
class EpochOfRows:
    """One region's rows in one epoch."""

    epoch: int
    rows: int
    counted: int
    """Rows in committed rounds."""
    more_than_once: int
    """Of those, in more than one."""
    spent: tuple[Spent, ...]
    away: bool
    """The region was away for some rounds: rows that it then did not come to are not made up."""

    @property
    def again(self) -> int:
        """Rows of rounds that did not count and were trained again; one twice lost is two."""
        return sum(int(spent.again.sum()) for spent in self.spent)

    @property
    def rounds_again(self) -> list[int]:
        """The rounds of these."""
        return sorted({spent.round for spent in self.spent if spent.again.any()})

    @property
    def discarded(self) -> int:
        """Rows that counted in no round, for theirs ended in a NaN or an infinity."""
        left_out = [spent.positions[~spent.again] for spent in self.spent if spent.why == "void" and spent.stands]
        return int(np.unique(np.concatenate(left_out)).size) if left_out else 0

    @property
    def never(self) -> int:
        return self.rows - self.counted - self.discarded


def rounds_of(seatings: Sequence[Seating]) -> Iterator[tuple[int, RoundOfRows, bool]]:
    """(number of the seat, a round that it made, whether that counts), in order.

    A round counts unless a later seat of the region begins at or before it, nobody holds it, or the seat took it again.
    """
    for number, seating in enumerate(seatings):
        until = min((later.round for later in seatings[number + 1 :]), default=math.inf)
        newest = {record.round: record for record in seating.rounds}
        for record in sorted(seating.rounds, key=lambda record: record.round):
            yield number, record, record is newest[record.round] and record.round < min(until, seating.until)


def account(groups: Sequence[RowGroup], seatings: Sequence[Seating], *, seed: int, mix: int, batch_size: int) -> list[EpochOfRows]:
    """What became of a region's rows."""
    rows = sum(group.rows for group in groups)
    counts: dict[int, NDArray[np.int32]] = {}
    spent: dict[int, list[tuple[int, Literal["lost", "void"], bool, NDArray[np.int64]]]] = {}
    away = set(range(seatings[0].cursor["epoch"])) if seatings else set()
    """Epochs, to begin with those before the region came."""
    at, expected, last, end = -1, 0, 0, 0
    for number, record, stands in rounds_of(seatings):
        seating = seatings[number]
        if number != at:
            at, expected, last = number, seating.round, seating.cursor["epoch"]
            taken = _Rows(groups, seating.cursor, seed, mix, batch_size)
        gone = number == len(seatings) - 1 and record.round >= seating.until
        if record.round > expected or gone:  # it made no such round, or took no seat to make it again
            away |= set(range(last, record.epoch + 1))
        expected, last, end = record.round + 1, record.epoch, max(end, record.epoch)
        for epoch, positions in taken.of(record):
            counts.setdefault(epoch, np.zeros(rows, dtype=np.int32))
            if stands and not record.void:
                np.add.at(counts[epoch], positions, 1)
            elif positions.size:
                spent.setdefault(epoch, []).append((record.round, "void" if record.void else "lost", stands, positions))
    found = []
    for epoch in range(end + 1 if counts else 0):
        count = counts.get(epoch, np.zeros(rows, dtype=np.int32))
        found.append(
            EpochOfRows(
                epoch=epoch,
                rows=rows,
                counted=int((count > 0).sum()),
                more_than_once=int((count > 1).sum()),
                spent=tuple(Spent(at, why, stands, these, count[these] > 0) for at, why, stands, these in spent.get(epoch, ())),
                away=epoch in away,
            )
        )
    return found


def named(
    groups: Sequence[RowGroup], positions: NDArray[np.int64], *, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([positions] the number of the row group that each is in, [positions] its row there), for positions of an epoch."""
    starts = _starts(groups)
    inside = np.searchsorted(starts, positions, side="right") - 1
    rows = np.empty_like(positions)
    for number in np.unique(inside).tolist():
        here = inside == number
        rows[here] = permuted(groups[number].rows, seed=seed, epoch=epoch, group=number)[positions[here] - starts[number]]
    return inside, rows


def _starts(groups: Sequence[RowGroup]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([group.rows for group in groups])]).astype(np.int64)


class _Rows:
    """Which rows the inner steps of a seat took, as positions."""

    def __init__(self, groups: Sequence[RowGroup], cursor: dict[str, Any], seed: int, mix: int, batch_size: int) -> None:
        self.groups, self.cursor, self.seed, self.mix, self.batch_size = groups, cursor, seed, mix, batch_size
        self.starts = _starts(groups)
        self._streams: dict[int, tuple[LeaseBook, list[NDArray[np.int64]]]] = {}

    def of(self, record: RoundOfRows) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(epoch, positions) of a round, which may end one epoch and begin the next."""
        first = record.done - record.steps
        if first < 0:
            book, _ = self._stream(record.epoch - 1)
            steps = book.steps(self.batch_size)
            yield record.epoch - 1, self._taken(record.epoch - 1, steps + first, steps + min(0, record.done))
        if record.done > 0:
            yield record.epoch, self._taken(record.epoch, max(0, first), record.done)

    def _taken(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        _, streams = self._stream(epoch)
        return np.concatenate([stream[first * self.batch_size : last * self.batch_size] for stream in streams])

    def _stream(self, epoch: int) -> tuple[LeaseBook, list[NDArray[np.int64]]]:
        if epoch not in self._streams:
            workers = len(self.cursor["used"])
            if epoch == self.cursor["epoch"]:
                book = LeaseBook.at(self.cursor, self.groups, seed=self.seed, workers=workers, mix=self.mix)
            else:
                book = LeaseBook(self.groups, seed=self.seed, epoch=epoch, workers=workers, mix=self.mix)
            self._streams = {kept: stream for kept, stream in self._streams.items() if kept >= epoch - 1}
            self._streams[epoch] = book, [self._positions(book, worker) for worker in range(workers)]
        return self._streams[epoch]

    def _positions(self, book: LeaseBook, worker: int) -> NDArray[np.int64]:
        """[rows lent to the worker] in the order in which it trains on them."""
        out = [np.empty(0, dtype=np.int64)]
        for window in book.windows(worker):
            order = window.order()
            positions = np.empty(window.rows, dtype=np.int64)
            for number, lease in enumerate(window.leases):
                positions[order == number] = self.starts[lease.group] + lease.start + np.arange(lease.rows)
            out.append(positions)
        return np.concatenate(out)
