"""TrainingTask: what a user brings. Five methods and the names of the columns they need."""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from torch import Tensor, nn

from geotrain.errors import TaskImportError
from geotrain.metrics import Sums


@runtime_checkable
class TrainingTask(Protocol):
    """One learning problem. Constructed with the job's `task_args` on every worker of every region."""

    columns: Sequence[str]
    """Parquet columns that `batch` reads; nothing else is fetched."""

    def model(self) -> nn.Module:
        """A new model on the CPU, fp32. Called after torch's generator was seeded: the same in every region."""

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The inner optimizer."""

    def batch(self, rows: pa.RecordBatch) -> Any:
        """Arrow columns to tensors: a tensor, or a tuple, list or dict of them. Runs in the prefetch thread."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss over the batch, a scalar to call backward() on."""

    def evaluate(self, model: nn.Module, batch: Any) -> Sums:
        """Sums and counts over the batch, as {"accuracy": (correct, rows)}. Runs in eval mode, without gradients."""


def load_task(region: str, path: str, args: Mapping[str, Any]) -> TrainingTask:
    """Import `module:Name` and construct it. Raises TaskImportError, naming the region and what is wrong."""
    module_name, _, name = path.partition(":")
    try:
        task = getattr(importlib.import_module(module_name), name)(**args)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise TaskImportError(region, path, f"{type(error).__name__}: {error}") from error
    absent = [part for part in ("columns", "model", "optimizer", "batch", "loss", "evaluate") if not hasattr(task, part)]
    if absent:
        raise TaskImportError(region, path, f"it has no {', '.join(absent)}")
    return task
