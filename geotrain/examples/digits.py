"""Handwritten digits and a LeNet.

The data: scikit-learn's bundled digits, 1,797 images of 8 x 8 pixels with values 0 to 16, ten classes. Columns: `image`
(64 x uint8, row by row) and `label` (uint8). About 62,000 parameters; 0.97 accuracy after some 20 epochs.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from geotrain.examples.parquet import assign, fixed_lists, rows_of_lists, write_regions

Batch = tuple[Tensor, Tensor]


class LeNet(nn.Sequential):
    """LeNet-5's plan on 8 x 8 pixels: two convolutions, two pools, three dense layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 256),
            nn.ReLU(),
            nn.Linear(256, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


class Digits:
    """The task."""

    columns = ("image", "label")
    label = "label"

    def __init__(self, lr: float = 0.05, momentum: float = 0.0) -> None:
        self.lr, self.momentum = lr, momentum

    def model(self) -> nn.Module:
        return LeNet()

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)

    def batch(self, rows: pa.RecordBatch) -> Batch:
        """Images [rows, 1, 8, 8] in 0..1, labels [rows]."""
        images = torch.from_numpy(rows_of_lists(rows.column("image")).astype(np.float32)).div_(16.0)
        labels = torch.from_numpy(rows.column("label").to_numpy(zero_copy_only=False).astype(np.int64))
        return images.view(-1, 1, 8, 8), labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        images, labels = batch
        logits = model(images)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        return {"accuracy": ((logits.argmax(1) == labels).sum().item(), len(labels)), "loss": (loss.item(), len(labels))}


def make(out: Path, regions: Sequence[str], *, skew: float, rows: int | None, seed: int) -> dict[str, int]:
    """Spread the digits over regions."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = images[:rows].astype(np.uint8), labels[:rows].astype(np.uint8)
    table = pa.table({"image": fixed_lists(images), "label": labels})
    where = assign(labels.astype(np.int64), len(regions), skew, np.random.default_rng(seed))
    return write_regions(out, regions, table, where, rows_per_group=64, seed=seed)
