from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geotrain.data.batches import Prefetched, Reader, record_batches
from geotrain.data.inventory import take_inventory
from geotrain.data.leases import LeaseBook
from geotrain.errors import UnreadableShard
from geotrain.job import DataSpec, RegionSpec


def region(folder: Path) -> RegionSpec:
    return RegionSpec(name="north", data=DataSpec(train=str(folder)))


def written(folder: Path, rows: int = 95) -> LeaseBook:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"n": np.arange(rows)}), folder / "a.parquet", row_group_size=20)
    found = take_inventory(region(folder), str(folder), ["n"])
    return LeaseBook(found.row_groups(), seed=1, epoch=0, workers=1, mix=2)


def numbers(book: LeaseBook, folder: Path) -> list[list[int]]:
    reader = Reader(region(folder), ["n"])
    return [batch.column("n").to_pylist() for batch in record_batches(book, 0, 8, reader.read, skip=book.used[0])]


def test_batches_hold_every_row_once_and_only_the_last_is_small(tmp_path: Path) -> None:
    batches = numbers(written(tmp_path), tmp_path)
    assert [len(batch) for batch in batches] == [8] * 11 + [7]
    assert sorted(sum(batches, [])) == list(range(95))
    assert sum(batches, []) != list(range(95))


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 11, 12])
def test_a_resumed_stream_goes_on_with_the_same_batches(tmp_path: Path, steps: int) -> None:
    book = written(tmp_path)
    whole = numbers(book, tmp_path)
    for _ in range(steps):
        book.take(8)
    assert numbers(book, tmp_path) == whole[steps:]


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    book = written(tmp_path)
    file = tmp_path / "a.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UnreadableShard, match=r"north.*a\.parquet"):
        numbers(book, tmp_path)


def test_prefetching_raises_where_items_are_taken_and_closes() -> None:
    def items():
        yield 1
        raise ValueError("broken")

    ahead = Prefetched(items())
    assert ahead.take() == 1
    with pytest.raises(ValueError, match="broken"):
        ahead.take()
    ahead.close()


def test_prefetching_stops_in_the_middle() -> None:
    ahead = Prefetched(iter(range(10**9)))
    assert [ahead.take() for _ in range(50)] == list(range(50))
    ahead.close()
