"""`geotrain init`: a small folder that runs as it is, to be changed into one's own."""

from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.errors import JobError

REGIONS = ("north", "south")
ROWS, WIDTH, CLASSES = 2000, 8, 3


def init(folder: Path) -> list[Path]:
    """Write task.py, job.yaml and a little made-up data. Returns the files. Raises JobError rather than overwrite."""
    files = [folder / "task.py", folder / "job.yaml"]
    for file in files:
        if file.exists():
            raise JobError(f"{file} exists already: give `geotrain init` a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.write_text(resources.files("geotrain").joinpath("template", file.name).read_text(encoding="utf-8"), encoding="utf-8")
    return files + [part for number, region in enumerate(REGIONS) for part in _data(folder / "data" / region, number)]


def _data(folder: Path, region: int) -> list[Path]:
    """Three clouds of points in eight dimensions; each region sees some of the clouds more often than the other."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    rng = np.random.default_rng(region + 1)
    labels = rng.choice(CLASSES, size=ROWS, p=np.roll([0.6, 0.3, 0.1], region))
    points = centres[labels] + rng.normal(scale=0.7, size=(ROWS, WIDTH))
    table = pa.table({"x": list(points.astype(np.float32)), "label": labels.astype(np.int8)})
    written = []
    for split, rows in (("train", slice(0, ROWS * 4 // 5)), ("eval", slice(ROWS * 4 // 5, ROWS))):
        file = folder / split / "part-0000.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table[rows], file, row_group_size=200)
        written.append(file)
    return written
