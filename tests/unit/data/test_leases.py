from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from geotrain.data.inventory import RowGroup
from geotrain.data.leases import LeaseBook

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def book(sizes: list[int], workers: int = 1, mix: int = 3, epoch: int = 0) -> LeaseBook:
    return LeaseBook([RowGroup(f"f{i}", 0, rows) for i, rows in enumerate(sizes)], seed=5, epoch=epoch, workers=workers, mix=mix)


def rows_of(book: LeaseBook, worker: int) -> list[tuple[int, int]]:
    """(group, row) in training order, all that is lent to a worker."""
    rows = []
    for window in book.windows(worker):
        left = {i: list(book.permutation(lease)) for i, lease in enumerate(window.leases)}
        rows += [(window.leases[i].group, left[i].pop(0)) for i in window.order().tolist()]
    return rows


@given(SIZES, st.integers(1, 4), st.integers(1, 4))
def test_every_row_is_lent_exactly_once(sizes: list[int], workers: int, mix: int) -> None:
    leases = book(sizes, workers, mix)
    seen = Counter(row for worker in range(workers) for row in rows_of(leases, worker))
    assert seen == Counter((group, row) for group, rows in enumerate(sizes) for row in range(rows))


@given(SIZES, st.integers(1, 3), st.integers(1, 8))
def test_steps_are_just_enough(sizes: list[int], workers: int, batch: int) -> None:
    leases = book(sizes, workers)
    total = sum(sum(leases.take(batch)) for _ in range(leases.steps(batch)))
    assert total == sum(sizes)
    assert sum(leases.take(batch)) == 0


@given(SIZES, st.integers(1, 3), st.integers(1, 8), st.integers(0, 20))
def test_a_cursor_brings_the_same_leases_back(sizes: list[int], workers: int, batch: int, steps: int) -> None:
    leases = book(sizes, workers)
    for _ in range(steps):
        leases.take(batch)
    again = LeaseBook.at(leases.cursor(), leases.groups, seed=5, workers=workers, mix=3)
    assert [rows_of(again, w) for w in range(workers)] == [rows_of(leases, w) for w in range(workers)]
    assert again.used == leases.used


@given(SIZES, st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 20))
def test_with_other_workers_only_what_is_left_is_lent(sizes: list[int], before: int, after: int, batch: int, steps: int) -> None:
    leases = book(sizes, before)
    for _ in range(steps):
        leases.take(batch)
    used = [row for worker in range(before) for row in rows_of(leases, worker)[: leases.used[worker]]]
    again = LeaseBook.at(leases.cursor(), leases.groups, seed=5, workers=after, mix=3)
    left = [row for worker in range(after) for row in rows_of(again, worker)[again.used[worker] :]]
    assert Counter(used + left) == Counter((group, row) for group, rows in enumerate(sizes) for row in range(rows))


def test_epochs_differ_and_repeat() -> None:
    assert rows_of(book([20] * 5), 0) == rows_of(book([20] * 5), 0)
    assert rows_of(book([20] * 5), 0) != rows_of(book([20] * 5, epoch=1), 0)


def test_groups_of_a_window_are_mixed() -> None:
    first = [group for group, _ in rows_of(book([50] * 4, mix=4), 0)[:40]]
    assert len(set(first)) == 4
    assert np.max(np.bincount(first)) < 25
