"""Small data and small jobs for tests."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.errors import ClusterError, StateDamaged
from geotrain.job import JobSpec, parse_job
from geotrain.run import Run

REGIONS = ("north", "south")


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
    """What flows.train does, in threads instead of tasks."""
    with run:
        run.look_and_plan()
        while True:
            run.introduce(run.seats(lambda: run.in_every_region(run.provision)))
            train(run, before_segment)
            try:
                return conclude(run)
            except (ClusterError, StateDamaged) as error:
                run.end_again(error)


def train(run: Run, before_segment: Callable[[Run, int], None]) -> None:
    run.training = True
    for segment in run.segments_left():
        before_segment(run, segment)
        if run.synchronize(segment, run.in_every_region(run.train, segment)):
            break
        run.check_stop()
        if run.seats_change:
            run.introduce(run.seats(lambda: run.in_every_region(run.provision)))
    run.training = False


def conclude(run: Run) -> dict[str, Any]:
    if run.needs_final_merge:
        assert len(set(run.in_every_region(run.merge_fully, regions=run.present))) == 1
    sums = run.in_every_region(run.evaluate, regions=run.present)
    run.conclude(dict(zip(run.present, sums, strict=True)))
    run.publish()
    return run.report()
