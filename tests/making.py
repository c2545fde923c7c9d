"""Small data and small jobs for tests."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.job import JobSpec, parse_job
from geotrain.run import InThreads, Run, locate_and_plan, train_and_publish

REGIONS = ("north", "south")


class Clock:
    """That goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def write_points(folder: Path, rows: int, *, seed: int = 0, group: int = 20, files: int = 1, nan_at: int | None = None) -> None:
    """`x` (4 x float32) and `y` = a known linear function of it, as Parquet."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5, 3.0], dtype=np.float32)).astype(np.float32)
    if nan_at is not None:
        x[nan_at] = np.nan
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        piece = slice(part * rows // files, (part + 1) * rows // files)
        table = pa.table({"x": list(x[piece]), "y": y[piece]})
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=group)


def job_tree(root: Path, regions: Sequence[str] = REGIONS, **changes: Any) -> dict[str, Any]:
    """A job on points under `root`, as a tree."""
    tree: dict[str, Any] = {
        "name": "points",
        "task": "tests.points:Points",
        "regions": [
            {
                "name": name,
                "data": {"train": str(root / name / "train"), "eval": str(root / name / "eval")},
                "devices": [{"kind": "cpu", "count": 1, "usd_per_hour": 0.1}],
            }
            for name in regions
        ],
        "train": {"batch_size": 10, "epochs": 4, "seed": 3},
        "sync": {"strategy": "ma", "every": 2},
        "schedule": {"segment_rounds": 10},
        "output": {"url": str(root / "runs")},
    }
    return {**tree, **changes}


def points_job(root: Path, regions: Sequence[str] = REGIONS, rows: Mapping[str, int] | None = None, **changes: Any) -> JobSpec:
    """The job, with its data written: 200 rows a region unless told."""
    for number, name in enumerate(regions):
        if not (root / name).exists():
            write_points(root / name / "train", (rows or {}).get(name, 200), seed=number)
            write_points(root / name / "eval", 40, seed=100 + number)
    return parse_job(job_tree(root, regions, **changes))


def conduct(run: Run, before_segment: Callable[[Run, int], None] = lambda run, segment: None) -> dict[str, Any]:
    """A whole run, without Prefect."""
    with run:
        stages = _Watched(run, before_segment)
        locate_and_plan(run, stages)
        return train_and_publish(run, stages)


class _Watched(InThreads):
    def __init__(self, run: Run, before_segment: Callable[[Run, int], None]) -> None:
        super().__init__(run)
        self.before_segment = before_segment

    def each(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        if stage is Run.train:
            self.before_segment(self.run, *args)
        return super().each(stage, *args, regions=regions)
