"""Leases: which worker trains on which rows, and what is committed. A pure state machine over row-group sizes.

At the start of an epoch every row group is lent to a worker: shuffled by (seed, epoch), each to the worker with the fewest rows.
A worker reads its groups in windows; inside a window the rows of each group are permuted and the groups interleaved. So what a
worker used of a group is always a prefix of that group's own permutation, and a lease is settled by one number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geotrain.data.inventory import RowGroup


@dataclass(frozen=True, slots=True)
class Lease:
    """Row group number `group` of the book, from row `start` of its permutation on."""

    group: int
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Window:
    """Leases whose rows are shuffled together."""

    leases: tuple[Lease, ...]
    seed: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(lease.rows for lease in self.leases)

    def order(self) -> NDArray[np.int64]:
        """[rows] for each row in turn, the position in `leases` that it comes from."""
        labels = np.repeat(np.arange(len(self.leases)), [lease.rows for lease in self.leases])
        return np.random.default_rng(self.seed).permutation(labels)


def permuted(rows: int, *, seed: int, epoch: int, group: int) -> NDArray[np.int64]:
    """[rows] row numbers inside row group number `group`, in the order in which an epoch trains on them."""
    return np.random.default_rng((seed, epoch, 3, group)).permutation(rows)


class LeaseBook:
    """The rows of one region in one epoch."""

    def __init__(self, groups: Sequence[RowGroup], *, seed: int, epoch: int, workers: int, mix: int) -> None:
        self.groups, self.seed, self.epoch, self.workers, self.mix = tuple(groups), seed, epoch, workers, mix
        self.start = [0] * len(self.groups)
        """Per group, rows committed before the leases now out were lent."""
        self._lend()

    def _lend(self) -> None:
        self.used = [0] * self.workers
        """Per worker, rows taken of the leases now out."""
        shuffled = np.random.default_rng((self.seed, self.epoch, 1)).permutation(len(self.groups))
        lent: list[list[Lease]] = [[] for _ in range(self.workers)]
        rows = [0] * self.workers
        for group in shuffled.tolist():
            left = self.groups[group].rows - self.start[group]
            if left:
                worker = rows.index(min(rows))
                lent[worker].append(Lease(group, self.start[group], left))
                rows[worker] += left
        self.lent = lent
        self.lent_rows = rows

    def windows(self, worker: int) -> list[Window]:
        """The leases of a worker, in reading order."""
        leases = self.lent[worker]
        parts = [tuple(leases[i : i + self.mix]) for i in range(0, len(leases), self.mix)]
        return [Window(part, (self.seed, self.epoch, 2, part[0].group)) for part in parts]

    def permutation(self, lease: Lease) -> NDArray[np.int64]:
        """[lease.rows] row numbers inside the group, in the order in which they are trained on."""
        rows = self.groups[lease.group].rows
        return permuted(rows, seed=self.seed, epoch=self.epoch, group=lease.group)[lease.start :]

    def steps(self, batch_size: int) -> int:
        """Inner steps that the leases now out take: those of the worker with the most rows."""
        return max(ceil(rows / batch_size) for rows in self.lent_rows)

    def take(self, batch_size: int) -> list[int]:
        """One inner step: every worker takes up to `batch_size` rows of its leases. Returns the rows of each."""
        taken = [min(batch_size, lent - used) for lent, used in zip(self.lent_rows, self.used, strict=True)]
        self.used = [used + rows for used, rows in zip(self.used, taken, strict=True)]
        return taken

    def seek(self, steps: int, batch_size: int) -> None:
        """Be where so many inner steps lead."""
        self.used = [min(steps * batch_size, lent) for lent in self.lent_rows]

    @property
    def spent(self) -> bool:
        """Every row was taken."""
        return self.used == self.lent_rows

    def in_use(self, worker: int) -> list[int]:
        """The row groups of the window that a worker last took rows of."""
        before = 0
        for window in self.windows(worker):
            before += window.rows
            if self.used[worker] <= before:
                return [lease.group for lease in window.leases]
        return []

    def committed(self) -> list[int]:
        """Per group, rows used so far: prefixes of their permutations."""
        done = list(self.start)
        for worker, used in enumerate(self.used):
            left = used
            for window in self.windows(worker):
                taken = min(left, window.rows)
                for position, count in enumerate(np.bincount(window.order()[:taken], minlength=len(window.leases)).tolist()):
                    done[window.leases[position].group] += count
                left -= taken
        return done

    def cursor(self) -> dict[str, Any]:
        """What a checkpoint keeps; all rows used so far count as committed."""
        return {"epoch": self.epoch, "start": self.start, "used": self.used}

    @classmethod
    def at(cls, cursor: dict[str, Any], groups: Sequence[RowGroup], *, seed: int, workers: int, mix: int) -> "LeaseBook":
        """The book as it was. With the same number of workers the same leases are out, else the uncommitted rows are lent anew."""
        book = cls(groups, seed=seed, epoch=cursor["epoch"], workers=len(cursor["used"]), mix=mix)
        book.start = list(cursor["start"])
        book._lend()
        book.used = list(cursor["used"])
        if workers != book.workers:
            book.start, book.workers = book.committed(), workers
            book._lend()
        return book
