"""The ledger finds what is trained twice, never, or for nothing."""

from typing import Any

import pyarrow as pa
import pytest

from geotrain.data.batches import record_batches
from geotrain.data.inventory import RowGroup
from geotrain.data.leases import LeaseBook
from geotrain.data.ledger import EpochOfRows, RoundOfRows, Seating, account, named

GROUPS = tuple(RowGroup(f"file-{number}", 0, rows) for number, rows in enumerate((30, 17, 40, 13)))
SETTINGS: dict[str, Any] = {"seed": 5, "mix": 2, "batch_size": 10}


def cursor(epoch: int = 0, workers: int = 1) -> dict[str, Any]:
    return LeaseBook(GROUPS, seed=5, epoch=epoch, workers=workers, mix=2).cursor()


def rounds(first: int, last: int, steps: int = 5, of: int = 10) -> list[RoundOfRows]:
    """`of` steps make an epoch."""
    return [RoundOfRows(n, n * steps // of, n * steps % of + steps, steps) for n in range(first, last)]


def sums(found: list[EpochOfRows]) -> list[tuple[int, int, int, int]]:
    return [(one.counted, one.more_than_once, one.never, one.again) for one in found]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_undisturbed_run_counts_every_row_once(workers: int) -> None:
    steps = LeaseBook(GROUPS, seed=5, epoch=0, workers=workers, mix=2).steps(10)
    every = [RoundOfRows(epoch * steps + n, epoch, n + 1, 1) for epoch in range(2) for n in range(steps)]
    found = account(GROUPS, [Seating(cursor(workers=workers), 0, every)], **SETTINGS)
    assert sums(found) == [(100, 0, 0, 0)] * 2


def test_rounds_lost_with_a_seat_are_void_and_trained_again() -> None:
    before = Seating(cursor(), 0, rounds(0, 5))
    after = Seating({**cursor(1), "used": [50]}, 3, rounds(3, 6))
    found = account(GROUPS, [before, after], **SETTINGS)
    assert sums(found) == [(100, 0, 0, 0), (100, 0, 0, 50), (100, 0, 0, 50)]
    assert [one.rounds_again for one in found] == [[], [3], [4]]


def test_rounds_that_nobody_holds_are_void_though_no_later_seat_took_them_again() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, rounds(0, 5), until=3)], **SETTINGS)
    assert sums(found) == [(100, 0, 0, 0), (50, 0, 50, 0), (0, 0, 100, 0)]
    assert [one.away for one in found] == [False, True, True]
    assert [spent.round for one in found for spent in one.spent] == [3, 4]


def test_a_round_that_a_seat_took_again_counts_once() -> None:
    found = account(
        GROUPS, [Seating(cursor(), 0, [RoundOfRows(0, 0, 5, 5), RoundOfRows(0, 0, 5, 5), RoundOfRows(1, 0, 10, 5)])], **SETTINGS
    )
    assert sums(found) == [(100, 0, 0, 50)]
    assert found[0].rounds_again == [0]


def test_a_round_trained_twice_is_found() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, [*rounds(0, 2), RoundOfRows(2, 0, 10, 5)])], **SETTINGS)
    assert sums(found) == [(100, 50, 0, 0)]


def test_a_round_left_out_is_found() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, [RoundOfRows(0, 0, 5, 5), RoundOfRows(1, 1, 5, 5)])], **SETTINGS)
    assert sums(found) == [(50, 0, 50, 0), (50, 0, 50, 0)]
    assert not any(one.away for one in found)


def test_rounds_that_went_on_without_the_region_are_told_apart() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, [*rounds(0, 2), *rounds(6, 8)])], **SETTINGS)
    assert sums(found) == [(100, 0, 0, 0), (0, 0, 100, 0), (0, 0, 100, 0), (100, 0, 0, 0)]
    assert [one.away for one in found][1:3] == [True, True]


def test_another_number_of_workers_takes_what_is_left() -> None:
    lent = LeaseBook(GROUPS, seed=5, epoch=0, workers=1, mix=2)
    lent.seek(4, 10)
    again = LeaseBook.at(lent.cursor(), GROUPS, seed=5, workers=2, mix=2)
    left = again.steps(10)
    found = account(
        GROUPS, [Seating(cursor(), 0, rounds(0, 1, steps=4)), Seating(again.cursor(), 1, [RoundOfRows(1, 0, left, left)])], **SETTINGS
    )
    assert sums(found) == [(100, 0, 0, 0)]


def test_steps_owed_from_the_epoch_before_belong_to_it() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, [RoundOfRows(0, 0, 7, 7), RoundOfRows(1, 1, 5, 8)])], **SETTINGS)
    assert sums(found) == [(100, 0, 0, 0), (50, 0, 50, 0)]


def test_a_round_that_ended_in_a_nan_is_discarded() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, [RoundOfRows(0, 0, 5, 5, void=True), RoundOfRows(1, 0, 10, 5)])], **SETTINGS)
    assert [(one.counted, one.discarded, one.never, one.again) for one in found] == [(50, 50, 0, 0)]


def test_what_ended_in_a_nan_and_was_lost_with_its_seat_is_trained_again() -> None:
    before = Seating(cursor(), 0, [RoundOfRows(0, 0, 5, 5), RoundOfRows(1, 0, 10, 5, void=True)])
    after = Seating({**cursor(), "used": [50]}, 2, [RoundOfRows(2, 0, 10, 5)])
    found = account(GROUPS, [before, after], **SETTINGS)
    assert [(one.counted, one.discarded, one.never, one.again) for one in found] == [(100, 0, 0, 50)]
    assert [spent.why for spent in found[0].spent] == ["void"]


def test_what_ended_in_a_nan_was_lost_and_is_not_trained_again_is_missed() -> None:
    before = Seating(cursor(), 0, [RoundOfRows(0, 0, 5, 5), RoundOfRows(1, 0, 10, 5, void=True)])
    found = account(GROUPS, [before, Seating({**cursor(1), "used": [0]}, 1, [RoundOfRows(1, 1, 5, 5)])], **SETTINGS)
    assert [(one.counted, one.discarded, one.never) for one in found][0] == (50, 0, 50)


def test_what_was_lost_and_never_made_up_is_not_called_trained_again() -> None:
    found = account(GROUPS, [Seating(cursor(), 0, rounds(0, 2)), Seating({**cursor(), "used": [100]}, 1, rounds(2, 4))], **SETTINGS)
    assert [(one.counted, one.never, one.again) for one in found] == [(50, 50, 0), (100, 0, 0)]


def test_the_rows_that_were_trained_again_are_named() -> None:
    """As the reader of the batches takes them: every row says where it is from."""
    before, after = Seating(cursor(), 0, rounds(0, 2)), Seating(cursor(), 0, rounds(0, 2))
    (found,) = account(GROUPS, [before, after], **SETTINGS)

    def read(group: RowGroup) -> pa.Table:
        return pa.table({"file": [group.uri] * group.rows, "row": range(group.rows)})

    book = LeaseBook(GROUPS, seed=5, epoch=0, workers=1, mix=2)
    trained = [(row["file"], row["row"]) for batch in record_batches(book, 0, 10, read) for row in batch.to_pylist()]
    for half, spent in enumerate(found.spent):
        numbers, rows = named(GROUPS, spent.positions, seed=5, epoch=0)
        assert [(GROUPS[n].uri, row) for n, row in zip(numbers, rows.tolist(), strict=True)] == trained[half * 50 :][:50]


def test_the_epochs_before_a_region_came_are_not_missed() -> None:
    found = account(GROUPS, [Seating({**cursor(2), "used": [50]}, 0, rounds(5, 8))], **SETTINGS)
    assert [(one.counted, one.away) for one in found] == [(0, True), (0, True), (50, True), (100, False)]
