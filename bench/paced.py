"""A task whose model has a given size and whose inner step takes a given time: for measuring exchanges, not learning."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn


class Paced:
    """`model_mb` megabytes of parameters, fp32; every step sleeps `sleep_ms` beside what its few operations take."""

    columns = ("x",)

    def __init__(self, model_mb: float = 1.0, sleep_ms: float = 20.0, made: str | None = None) -> None:
        """`made`: a file that gets a line for every model that is made, so that a measurement knows how far a run is."""
        self.elements, self.sleep_s, self.made = round(model_mb * 250_000), sleep_ms / 1000, made

    def model(self) -> nn.Module:
        if self.made:
            with Path(self.made).open("a", encoding="utf-8") as file:
                file.write("made\n")
        return nn.ParameterDict({"w": nn.Parameter(torch.zeros(self.elements))})

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    def batch(self, rows: pa.RecordBatch) -> Tensor:
        return torch.from_numpy(np.array(rows.column("x")))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(self.sleep_s)
        weights: Tensor = model["w"]  # type: ignore[index]
        return (weights[: len(batch)] * batch).mean()

    def evaluate(self, model: nn.Module, batch: Tensor) -> dict[str, tuple[float, float]]:
        return {}


def write_rows(folder: Path, rows: int) -> None:
    """Numbers to step over."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"x": np.random.default_rng(0).normal(size=rows).astype(np.float32)})
    pq.write_table(table, folder / "rows.parquet", row_group_size=50)
