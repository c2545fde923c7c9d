"""Where a worker is in its rows: forth, back, and in leases lent anew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geotrain.data.batches import Reader
from geotrain.data.inventory import take_inventory
from geotrain.job import parse_job
from geotrain.partition.trainer import Rows
from tests.making import job_tree, write_points

STEPS = 20
"""Of 200 rows in batches of 10."""


@pytest.fixture
def make(tmp_path: Path) -> Any:
    write_points(tmp_path / "north" / "train", 200, files=2)
    job = parse_job(job_tree(tmp_path, ("north",)))
    made: list[Rows] = []

    def make(rank: int = 0, world: int = 1) -> Rows:
        groups = take_inventory(job.region("north"), job.region("north").data.train, ("x", "y"), None).row_groups()
        reader = Reader(job.region("north"), ["y"])
        made.append(Rows(groups, reader, job.train, rank, world, lambda batch: batch.column("y").to_numpy(zero_copy_only=False).copy()))
        return made[-1]

    yield make
    for rows in made:
        rows.close()


def steps(rows: Rows, count: int) -> list[np.ndarray]:
    return [rows.next()[0] for _ in range(count)]


def same(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    return len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("epoch", "done"), [(0, 0), (0, 7), (1, 0), (1, 5), (1, -3), (2, 4)])
def test_followed_to_a_place_they_go_on_as_if_they_had_come_there(make: Any, epoch: int, done: int) -> None:
    there = epoch * STEPS + done
    expected = steps(make(), there + 6)[there:]
    for made in (0, 9, STEPS, STEPS + 2):
        rows = make()
        steps(rows, made)
        rows.follow(epoch, done)
        assert rows.done(epoch) == done
        assert same(steps(rows, 6), expected), f"from {made}"


def test_where_they_are_they_stay_without_reading_again(make: Any) -> None:
    rows = make()
    steps(rows, 7)
    stream = rows.stream
    rows.follow(0, 7)
    assert rows.stream is stream
    steps(rows, STEPS - 7)
    rows.follow(1, 0)
    assert rows.stream is stream, "the end of an epoch is the beginning of the next"


def test_another_number_of_workers_takes_exactly_what_is_left(make: Any) -> None:
    first = make()
    taken = np.concatenate(steps(first, 8))
    cursor = {**first.book(0).cursor(), "used": [0]}
    rest = []
    for rank in range(2):
        rows = make(rank, world=2)
        rows.restore(cursor, at=(0, 8))
        assert rows.done(0) == 0, "lent anew"
        rest += [batch for batch in steps(rows, rows.steps_in(0)) if batch is not None]
    everything = np.concatenate([taken, *rest])
    assert everything.size == 200
    assert np.array_equal(np.sort(everything), np.sort(np.concatenate(steps(make(), STEPS))))
