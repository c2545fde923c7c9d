"""What a run's folder proves of its data: every row of every epoch in exactly one committed round, or what came in between."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.data.inventory import Inventory, RowGroup
from geotrain.data.ledger import EpochOfRows, Seating, account, named, rounds_of
from geotrain.errors import OutputUnwritable
from geotrain.report.folder import RunFolder
from geotrain.report.seats import seats_of

SPENT = pa.schema(
    [
        ("region", pa.string()),
        ("epoch", pa.int64()),
        ("round", pa.int64()),
        ("why", pa.string()),
        ("again", pa.bool_()),
        ("file", pa.string()),
        ("row_group", pa.int64()),
        ("row", pa.int64()),
    ]
)


def ledger(folder: RunFolder) -> dict[str, Any]:
    """{"balanced": ..., "regions": [{region, epoch, rows, ...}], "why": [...]}.

    Balanced: no row counts twice in an epoch, and every row of a finished epoch counts once, but for those of rounds for which the
    region was away, or that ended in a NaN. Raises NothingToResume for a run that trained nothing.
    """
    regions = []
    for region, _, epochs in _accounts(folder):
        for one in epochs:
            finished = one.epoch < epochs[-1].epoch
            kind = "away" if one.away else "never" if finished else "to_come"
            regions.append(
                {
                    "region": region,
                    "epoch": one.epoch,
                    "rows": one.rows,
                    "once": one.counted - one.more_than_once,
                    "more_than_once": one.more_than_once,
                    "never": 0,
                    "away": 0,
                    "to_come": 0,
                    kind: one.never,
                    "discarded": one.discarded,
                    "again": one.again,
                    "spent": sum(spent.positions.size for spent in one.spent),
                    "rounds_again": one.rounds_again,
                }
            )
    why = [event for event in folder.lines("events.jsonl") if event["event"] in ("lost", "lost_at_end", "rolled_back", "resumed")]
    balanced = all(not row["more_than_once"] and not row["never"] for row in regions)
    return {"run": folder.run, "balanced": balanced, "regions": regions, "why": why}


def write_spent_rows(folder: RunFolder, path: Path) -> int:
    """Name every row that was trained on in a round that did not count, in a Parquet file with the columns of SPENT; returns how many.

    `why`: the round was `lost` with a worker, or is `void` for it ended in a NaN; `again`: it was trained again, in a round that counted.
    `row`: counted from the beginning of its row group. Raises NothingToResume for a run that trained nothing, OutputUnwritable.
    """
    try:
        with pq.ParquetWriter(path, SPENT) as file:
            return _write_spent_rows(folder, file)
    except OSError as error:
        raise OutputUnwritable("this command", str(path), error) from error


def _write_spent_rows(folder: RunFolder, file: pq.ParquetWriter) -> int:
    seed, written = folder.job().train.seed, 0
    for region, groups, epochs in _accounts(folder):
        files, indices = np.array([group.uri for group in groups]), np.array([group.index for group in groups])
        for one in epochs:
            for spent in one.spent:
                numbers, rows = named(groups, spent.positions, seed=seed, epoch=one.epoch)
                same = {"region": region, "epoch": one.epoch, "round": spent.round, "why": spent.why}
                columns = {name: pa.repeat(value, rows.size) for name, value in same.items()}
                columns |= {"again": spent.again, "file": files[numbers], "row_group": indices[numbers], "row": rows}
                file.write_table(pa.table(columns, schema=SPENT))
                written += rows.size
    return written


def samples_counted(folder: RunFolder, round: int) -> dict[str, int]:
    """Region -> rows of the rounds that count, where the run goes on from the checkpoint before a round."""
    seatings = _seatings(folder, round)
    return {region: sum(record.samples for _, record, counts in rounds_of(seats) if counts) for region, seats in seatings.items()}


def _accounts(folder: RunFolder) -> Iterator[tuple[str, tuple[RowGroup, ...], list[EpochOfRows]]]:
    """For every region its row groups, and what became of them in every epoch."""
    job, inventories = folder.job(), folder.read_json("inventory.json")
    train = job.train
    for region, seats in sorted(_seatings(folder).items()):
        groups = tuple(Inventory.from_dict(inventories[region][0]).row_groups())
        yield region, groups, account(groups, seats, seed=train.seed, mix=train.mix_row_groups, batch_size=train.batch_size)


def _seatings(folder: RunFolder, back_to: float = math.inf) -> dict[str, list[Seating]]:
    """Region -> its seats, the oldest first, with their rounds, and up to where these count."""
    return {region: [lives[life] for life in sorted(lives)] for region, lives in seats_of(folder, back_to)[0].items()}
