"""Your task: what geotrain trains. Change what you need; the names of the methods are what matters."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class MyTask:
    # The Parquet columns that `batch` reads. Nothing else is fetched.
    columns = ("x", "label")
    # Optional: the column that holds the class, for a histogram in the inventory.
    label = "label"

    # Arguments come from `task_args` in job.yaml.
    def __init__(self, lr: float = 0.1, hidden: int = 32) -> None:
        self.lr, self.hidden = lr, hidden

    def model(self):
        """Any nn.Module, on the CPU. It must come out the same in every region: torch is seeded before the call."""
        return nn.Sequential(nn.Linear(8, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 3))

    def optimizer(self, params):
        """Any torch optimizer."""
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def batch(self, rows):
        """A pyarrow.RecordBatch with your columns -> tensors (a tensor, or a tuple, list or dict of them)."""
        x = np.stack(rows.column("x").to_numpy(zero_copy_only=False)).astype(np.float32)
        label = rows.column("label").to_numpy(zero_copy_only=False).astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(label)

    def loss(self, model, batch):
        """The mean loss of a batch."""
        x, label = batch
        return functional.cross_entropy(model(x), label)

    def evaluate(self, model, batch):
        """Held-out metrics as (sum, count): they are added up over all regions, then divided."""
        x, label = batch
        right = (model(x).argmax(1) == label).sum().item()
        return {"accuracy": (right, len(label))}
