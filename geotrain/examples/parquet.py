"""Spreading generated rows over regions, and writing them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

EVAL_SHARE = 0.2
ROWS_PER_FILE = 4096


def assign(classes: NDArray[np.int64], regions: int, skew: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """[rows] region numbers. With probability `skew` a row goes to the region that its class belongs to (class modulo
    regions), else to any: 0 spreads all classes evenly, 1 keeps every class in one region."""
    home = classes % regions
    anywhere = rng.integers(0, regions, len(classes))
    return np.where(rng.random(len(classes)) < skew, home, anywhere)


def write_regions(
    out: Path, regions: Sequence[str], table: pa.Table, where: NDArray[np.int64], *, rows_per_group: int, seed: int
) -> dict[str, int]:
    """Write each region's rows, a fifth of them held out, as out/<region>/{train,eval}/part-*.parquet."""
    rng = np.random.default_rng(seed)
    written = {}
    for number, region in enumerate(regions):
        rows = rng.permutation(np.flatnonzero(where == number))
        cut = int(len(rows) * EVAL_SHARE)
        for split, chosen in (("eval", rows[:cut]), ("train", rows[cut:])):
            folder = out / region / split
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.parquet"):
                old.unlink()
            for part, start in enumerate(range(0, len(chosen), ROWS_PER_FILE)):
                piece = table.take(pa.array(chosen[start : start + ROWS_PER_FILE]))
                pq.write_table(piece, folder / f"part-{part:04d}.parquet", row_group_size=rows_per_group)
        written[region] = len(rows) - cut
    return written


def fixed_lists(values: NDArray[np.generic]) -> pa.FixedSizeListArray:
    """[rows, width] as an Arrow column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def rows_of_lists(column: pa.Array) -> NDArray[np.generic]:
    """[rows, width] back, without a copy where Arrow allows."""
    values: NDArray[np.generic] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)
