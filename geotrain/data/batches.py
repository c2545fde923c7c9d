"""Batches: a worker's leases streamed as Arrow record batches, read ahead in a thread."""

import queue
import threading
import time
from collections import OrderedDict, deque
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
from geotrain.stores import STORE_ERRORS, patiently

CACHE_BYTES = 256 * 2**20
BURST, BURST_S = 16, 0.01
"""The most items handed over at once, and the most time that is spent on gathering them."""
BURSTS_AHEAD = 2


class Reader:
    """Reads row groups of one region's files; keeps the last ones, up to CACHE_BYTES, so that small data is read once."""

    def __init__(self, spec: RegionSpec, columns: list[str]) -> None:
        self.spec, self.columns = spec, columns
        self.over = threading.Event()
        """Set while nobody wants what is being read: a store that fails is not waited for any longer."""
        self._kept: OrderedDict[RowGroup, pa.Table] = OrderedDict()
        self._bytes = 0

    def read(self, group: RowGroup) -> pa.Table:
        """The columns of a row group. A store that fails for a while is waited for. Raises UnreadableShard."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        fs, path = open_store(self.spec, group.uri)

        def read() -> pa.Table:
            with fs.open(path, "rb") as file:
                return pq.ParquetFile(file).read_row_group(group.index, columns=self.columns).combine_chunks()

        try:
            table = patiently(read, self.over)
        except (pa.ArrowException, IndexError, *STORE_ERRORS) as error:
            raise UnreadableShard(self.spec.name, group.uri, error) from error
        self._kept[group] = table
        self._bytes += table.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return table


def window_table(book: LeaseBook, window: Window, read: Callable[[RowGroup], pa.Table]) -> pa.Table:
    """The rows of a window in training order."""
    tables = [read(book.groups[lease.group]) for lease in window.leases]
    offsets = np.cumsum([0, *(table.num_rows for table in tables)])
    rows = np.empty(window.rows, dtype=np.int64)
    by_lease = np.argsort(window.order(), kind="stable")
    rows[by_lease] = np.concatenate([book.permutation(lease) + start for lease, start in zip(window.leases, offsets, strict=False)])
    return pa.concat_tables(tables).take(pa.array(rows)).combine_chunks()


def record_batches(
    book: LeaseBook, worker: int, batch_size: int, read: Callable[[RowGroup], pa.Table], skip: int = 0
) -> Iterator[pa.RecordBatch]:
    """A worker's rows of the epoch after the first `skip`, `batch_size` at a time; the last batch may be smaller."""
    rest = None
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
    """Runs an iterator in a thread, some items ahead. Errors of the iterator are raised where its items are taken.

    Items that are quick to make are handed over in bursts: two threads that meet at every item take turns at the interpreter's
    lock, which costs a small model's training step more than making its batch does.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._queue: queue.Queue[tuple[list[Any], BaseException | None]] = queue.Queue(BURSTS_AHEAD)
        self._burst: deque[Any] = deque()
        self._error: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), name="geotrain-batches", daemon=True)
        self._thread.start()

    def _fill(self, items: Iterator[Any]) -> None:
        burst: list[Any] = []
        began = time.monotonic()
        try:
            for item in items:
                burst.append(item)
                if len(burst) == BURST or time.monotonic() - began > BURST_S:
                    self._put(burst, None)
                    if self._closed.is_set():
                        return
                    burst, began = [], time.monotonic()
            self._put(burst, StopIteration())
        except BaseException as error:
            self._put(burst, error)

    def _put(self, burst: list[Any], error: BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put((burst, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def take(self, waiting: Callable[[], None] = lambda: None) -> Any:
        """The next item. `waiting`: called now and then while there is none. Raises what the iterator raised; StopIteration at its end."""
        while not self._burst:
            if self._error is not None:
                raise self._error
            try:
                burst, self._error = self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._closed.is_set():
                    raise StopIteration("closed") from None
                waiting()
                continue
            self._burst.extend(burst)
        return self._burst.popleft()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
