"""Generated click logs and a DeepFM.

The data: eight categorical fields of 1,000 values each, popular values far more frequent (Zipf). The ground truth is a
factorization machine of rank 4 with known weights; a click is drawn with the probability that it gives. Columns: `fields`
(8 x int32), `click` (uint8) and `truth` (float32, the true probability): the log loss of `truth` is the best that any model can reach.
Regions differ in which values are popular.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from geotrain.examples.parquet import assign, fixed_lists, rows_of_lists, write_regions

Batch = tuple[Tensor, Tensor, Tensor]
FIELDS, VALUES, RANK = 8, 1000, 4


class DeepFM(nn.Module):
    """A factorization machine and a small network on shared embeddings (Guo et al., arXiv 1703.04247)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Embedding(FIELDS * VALUES, 1)
        self.embedding = nn.Embedding(FIELDS * VALUES, dim)
        nn.init.zeros_(self.first.weight)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.deep = nn.Sequential(nn.Linear(FIELDS * dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, fields: Tensor) -> Tensor:
        """[rows, FIELDS] value numbers -> [rows] logits."""
        vectors = self.embedding(fields)
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
        logits: Tensor = self.bias + self.first(fields).sum((1, 2)) + pairs + self.deep(vectors.flatten(1)).squeeze(1)
        return logits


class Clicks:
    """The task. Metrics: `log_loss`, and `best_log_loss` of the true probabilities for comparison.

    `sparse`: Adagrad, which leaves embeddings alone that no row touched, for `sync.sparse_embeddings`; else Adam.
    """

    columns = ("fields", "click", "truth")
    label = "click"

    def __init__(self, lr: float = 0.01, dim: int = 8, hidden: int = 32, sparse: bool = False) -> None:
        self.lr, self.dim, self.hidden, self.sparse = lr, dim, hidden, sparse

    def model(self) -> nn.Module:
        return DeepFM(self.dim, self.hidden)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(params, lr=self.lr) if self.sparse else torch.optim.Adam(params, lr=self.lr)

    def batch(self, rows: pa.RecordBatch) -> Batch:
        """Value numbers [rows, FIELDS] counted through all fields, clicks [rows], true probabilities [rows]."""
        fields = torch.from_numpy(rows_of_lists(rows.column("fields")).astype(np.int64)) + torch.arange(FIELDS) * VALUES
        clicks, truth = (
            torch.from_numpy(rows.column(name).to_numpy(zero_copy_only=False).astype(np.float32)) for name in ("click", "truth")
        )
        return fields, clicks, truth

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        fields, clicks, truth = batch
        loss = functional.binary_cross_entropy_with_logits(model(fields), clicks, reduction="sum")
        best = functional.binary_cross_entropy(truth, clicks, reduction="sum")
        return {"log_loss": (loss.item(), len(clicks)), "best_log_loss": (best.item(), len(clicks))}


def true_probability(fields: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """[rows] click probabilities of the ground-truth factorization machine."""
    weights = rng.normal(scale=0.5, size=(FIELDS, VALUES))
    factors = rng.normal(scale=0.45, size=(FIELDS, VALUES, RANK))
    every = np.arange(FIELDS)
    vectors = factors[every, fields]
    pairs = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1)
    probability: NDArray[np.float64] = 1 / (1 + np.exp(1.0 - weights[every, fields].sum(1) - pairs))
    return probability


def make(out: Path, regions: Sequence[str], *, skew: float, rows: int | None, seed: int) -> dict[str, int]:
    """Generate logs (50,000 rows unless told). Rows belong together by the value of their first field."""
    rng = np.random.default_rng(seed)
    count = rows or 50_000
    popularity = 1 / np.arange(1, VALUES + 1) ** 1.1
    fields = rng.choice(VALUES, size=(count, FIELDS), p=popularity / popularity.sum())
    truth = np.clip(true_probability(fields, rng), 1e-6, 1 - 1e-6)
    clicks = (rng.random(count) < truth).astype(np.uint8)
    table = pa.table({"fields": fixed_lists(fields.astype(np.int32)), "click": clicks, "truth": truth.astype(np.float32)})
    return write_regions(out, regions, table, assign(fields[:, 0], len(regions), skew, rng), rows_per_group=1024, seed=seed)
