"""Batches: a worker's leases streamed as Arrow record batches, read ahead in a thread."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.data.inventory import RowGroup
from geotrain.data.leases import LeaseBook, Window
from geotrain.data.store import open_store
from geotrain.errors import UnreadableShard
from geotrain.job import RegionSpec

CACHE_BYTES = 256 * 2**20
AHEAD = 4


class Reader:
    """Reads row groups of one region's files; keeps the last ones, up to CACHE_BYTES, so that small data is read once."""

    def __init__(self, spec: RegionSpec, columns: list[str]) -> None:
        self.spec, self.columns = spec, columns
        self._kept: OrderedDict[RowGroup, pa.Table] = OrderedDict()
        self._bytes = 0

    def read(self, group: RowGroup) -> pa.Table:
        """The columns of a row group. Raises UnreadableShard."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        fs, path = open_store(self.spec, group.uri)
        try:
            with fs.open(path, "rb") as file:
                table = pq.ParquetFile(file).read_row_group(group.index, columns=self.columns).combine_chunks()
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise UnreadableShard(self.spec.name, group.uri, str(error)) from error
        self._kept[group] = table
        self._bytes += table.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return table


def window_table(book: LeaseBook, window: Window, read: Callable[[RowGroup], pa.Table]) -> pa.Table:
    """The rows of a window in training order."""
    tables = [read(book.groups[lease.group]) for lease in window.leases]
    offsets = np.cumsum([0, *(table.num_rows for table in tables)])
    order = window.order()
    rows = np.empty(len(order), dtype=np.int64)
    for position, lease in enumerate(window.leases):
        rows[order == position] = book.permutation(lease) + offsets[position]
    return pa.concat_tables(tables).take(pa.array(rows)).combine_chunks()


def record_batches(book: LeaseBook, worker: int, batch_size: int, read: Callable[[RowGroup], pa.Table]) -> Iterator[pa.RecordBatch]:
    """A worker's remaining rows of the epoch, `batch_size` at a time; the last batch may be smaller."""
    skip, rest = book.used[worker], None
    for window in book.windows(worker):
        if skip >= window.rows:
            skip -= window.rows
            continue
        table = window_table(book, window, read).slice(skip)
        skip = 0
        table = pa.concat_tables([rest, table]).combine_chunks() if rest is not None and rest.num_rows else table
        whole = table.num_rows - table.num_rows % batch_size
        yield from table.slice(0, whole).to_batches(max_chunksize=batch_size)
        rest = table.slice(whole)
    if rest is not None and rest.num_rows:
        yield rest.combine_chunks().to_batches()[0]


class Prefetched:
    """Runs an iterator in a thread, `AHEAD` items ahead. Errors of the iterator are raised where its items are taken."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="geotrain-batches", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._put(("item", item))
                if self._closed.is_set():
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def take(self) -> Any:
        """The next item, or None at the end."""
        kind, value = self._queue.get()
        if kind == "error":
            raise value
        if kind == "end":
            self._queue.put((kind, value))
        return value

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
