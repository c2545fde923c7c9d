"""Python's own sources as text, and a small GPT.

The data: the standard library of the Python that runs this, as bytes, cut into pieces of 129: 128 to read and each one's next to
predict. Columns: `tokens` (129 x uint8) and `package` (its first folder or module). Whole packages go to one region, as text of one
kind does in life; `skew` 0 deals the pieces out evenly instead.
"""

import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from geotrain.examples.parquet import assign, fixed_lists, rows_of_lists, write_regions

PIECE, BYTES = 129, 256


class Layer(nn.Module):
    """A pre-norm transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, width), nn.Embedding(PIECE - 1, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[rows, length] bytes -> [rows, length, 256] logits of the next."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


class Text:
    """The task. Metrics: `loss` in nats per byte and `next_byte` accuracy."""

    columns = ("tokens",)

    def __init__(self, lr: float = 1e-3, layers: int = 4, width: int = 128, heads: int = 4) -> None:
        self.lr, self.shape = lr, (layers, width, heads)

    def model(self) -> nn.Module:
        return GPT(*self.shape)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def batch(self, rows: pa.RecordBatch) -> Tensor:
        """[rows, 129] bytes."""
        return torch.from_numpy(rows_of_lists(rows.column("tokens")).astype(np.int64))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module, batch: Tensor) -> dict[str, tuple[float, float]]:
        logits, targets = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        return {"loss": (loss.item(), len(targets)), "next_byte": ((logits.argmax(1) == targets).sum().item(), len(targets))}


def sources(limit: int) -> tuple[list[bytes], list[str]]:
    """Pieces of the standard library in the order of its files, and the package of each; at most `limit`."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[bytes] = []
    packages: list[str] = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if {"site-packages", "test", "tests", "idlelib"} & set(parts):
            continue
        text = file.read_bytes()
        cut = [text[i : i + PIECE] for i in range(0, len(text) - PIECE + 1, PIECE - 1)]
        pieces += cut
        packages += [parts[0].removesuffix(".py")] * len(cut)
    step = max(1, len(pieces) // limit)
    return pieces[::step][:limit], packages[::step][:limit]


def make(out: Path, regions: Sequence[str], *, skew: float, rows: int | None, seed: int) -> dict[str, int]:
    """Cut the standard library into pieces (20,000 unless told) and spread its packages over regions."""
    pieces, packages = sources(rows or 20_000)
    tokens = np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(-1, PIECE)
    homes = np.array([zlib.crc32(package.encode()) for package in packages], dtype=np.int64)
    table = pa.table({"tokens": fixed_lists(tokens), "package": packages})
    return write_regions(out, regions, table, assign(homes, len(regions), skew, np.random.default_rng(seed)), rows_per_group=256, seed=seed)
