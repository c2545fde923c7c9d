"""The ledger: from what every seat of a region trained on, which rows counted how often, epoch by epoch. Pure.

Leases are deterministic, so a seat's beginning and its rounds' inner steps name every row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geotrain.data.inventory import RowGroup
from geotrain.data.leases import LeaseBook


@dataclass(frozen=True, slots=True)
class RoundOfRows:
    """Inner steps `done - steps` to `done` of an epoch; negative ones are the last of the epoch before."""

    round: int
    epoch: int
    done: int
    steps: int
    void: bool = False
    """It ended in a NaN or an infinity, and counts for nothing."""


@dataclass(slots=True)
class Seating:
    """A region's seat, from its first round to the first of the next seat."""

    cursor: dict[str, Any]
    """Of the book of leases, as it began."""
    round: int
    rounds: list[RoundOfRows] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EpochOfRows:
    """One region's rows in one epoch."""

    epoch: int
    rows: int
    counted: int
    """Rows in committed rounds."""
    more_than_once: int
    """Of those, in more than one."""
    void: int
    """Rows of rounds that were not committed: trained on for nothing."""
    again: tuple[int, ...]
    """The rounds of these."""
    discarded: int
    """Rows of rounds that ended in a NaN or an infinity."""
    away: bool
    """The region was away for some rounds: rows that it then did not come to are not made up."""

    @property
    def never(self) -> int:
        return self.rows - self.counted - self.discarded


def account(groups: Sequence[RowGroup], seatings: Sequence[Seating], *, seed: int, mix: int, batch_size: int) -> list[EpochOfRows]:
    """What became of a region's rows. A round counts unless the region's next seat begins at or before it, or the seat took it again."""
    rows = sum(group.rows for group in groups)
    counts: dict[int, NDArray[np.int32]] = {}
    void: dict[int, int] = {}
    again: dict[int, set[int]] = {}
    discarded: dict[int, int] = {}
    away = set(range(seatings[0].cursor["epoch"])) if seatings else set()
    """Epochs, to begin with those before the region came."""
    end = 0
    for number, seating in enumerate(seatings):
        until = min((later.round for later in seatings[number + 1 :]), default=None)
        taken = _Rows(groups, seating.cursor, seed, mix, batch_size)
        expected, last = seating.round, seating.cursor["epoch"]
        newest = {record.round: record for record in seating.rounds}
        for record in sorted(seating.rounds, key=lambda record: record.round):
            if record.round > expected:
                away |= set(range(last, record.epoch + 1))
            expected, last, end = record.round + 1, record.epoch, max(end, record.epoch)
            for epoch, positions in taken.of(record):
                counts.setdefault(epoch, np.zeros(rows, dtype=np.int32))
                if record.void and (until is None or record.round < until):
                    discarded[epoch] = discarded.get(epoch, 0) + positions.size
                elif record is newest[record.round] and (until is None or record.round < until):
                    np.add.at(counts[epoch], positions, 1)
                elif positions.size:
                    void[epoch] = void.get(epoch, 0) + positions.size
                    again.setdefault(epoch, set()).add(record.round)
    found = []
    for epoch in range(end + 1 if counts else 0):
        count = counts.get(epoch, np.zeros(rows, dtype=np.int32))
        found.append(
            EpochOfRows(
                epoch=epoch,
                rows=rows,
                counted=int((count > 0).sum()),
                more_than_once=int((count > 1).sum()),
                void=void.get(epoch, 0),
                again=tuple(sorted(again.get(epoch, ()))),
                discarded=discarded.get(epoch, 0),
                away=epoch in away,
            )
        )
    return found


class _Rows:
    """Which rows the inner steps of a seat took, as positions in the region's row groups laid end to end, each in its permutation."""

    def __init__(self, groups: Sequence[RowGroup], cursor: dict[str, Any], seed: int, mix: int, batch_size: int) -> None:
        self.groups, self.cursor, self.seed, self.mix, self.batch_size = groups, cursor, seed, mix, batch_size
        self.starts = np.concatenate([[0], np.cumsum([group.rows for group in groups])])
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
