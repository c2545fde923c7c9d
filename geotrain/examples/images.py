"""Generated images and a ResNet.

The data: 32 x 32 RGB images of ten classes. Each class has a pattern of low spatial frequencies; an image is its class's
pattern, shifted at random, under noise. Columns: `image` (3,072 x uint8, channels first) and `label` (uint8). The ground truth is
known: with the shift undone the nearest pattern is the class, so accuracy 1.0 is possible. About 11.2 million parameters.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from geotrain.examples.parquet import assign, fixed_lists, rows_of_lists, write_regions

Batch = tuple[Tensor, Tensor]
Norm = Callable[[int], nn.Module]
"""Channels -> a normalisation."""
SIDE, CLASSES = 32, 10


class Block(nn.Module):
    """A basic residual block (He et al., arXiv 1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            norm(outer),
            nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            norm(outer),
        )
        same = stride == 1 and inner == outer
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.skip(x))


class ResNet(nn.Sequential):
    """ResNet-18 for 32 x 32 images: widths w, 2w, 4w, 8w, two blocks each; w = 64 has 11.2 million parameters."""

    def __init__(self, width: int, norm: Norm) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
        inner = width
        for level in range(4):
            outer = width * 2**level
            layers += [Block(inner, outer, 1 if level == 0 else 2, norm), Block(outer, outer, 1, norm)]
            inner = outer
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, CLASSES))


class Images:
    """The task. `side`: images are scaled down to this many pixels, for a machine without a GPU.

    `norm`: `batch`, or `group` (eight groups), which has no statistics of its own to average.
    """

    columns = ("image", "label")
    label = "label"

    def __init__(self, lr: float = 0.05, width: int = 64, side: int = SIDE, norm: Literal["batch", "group"] = "batch") -> None:
        self.lr, self.width, self.side = lr, width, side
        self.norm: Norm = nn.BatchNorm2d if norm == "batch" else functools.partial(nn.GroupNorm, 8)

    def model(self) -> nn.Module:
        return ResNet(self.width, self.norm)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=5e-4)

    def batch(self, rows: pa.RecordBatch) -> Batch:
        """Images [rows, 3, side, side] in -1..1, labels [rows]."""
        images = torch.from_numpy(rows_of_lists(rows.column("image")).astype(np.float32)).view(-1, 3, SIDE, SIDE)
        if self.side != SIDE:
            images = functional.adaptive_avg_pool2d(images, self.side)
        labels = torch.from_numpy(rows.column("label").to_numpy(zero_copy_only=False).astype(np.int64))
        return images.div_(127.5).sub_(1.0), labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        logits = model(batch[0])
        loss = functional.cross_entropy(logits, batch[1], reduction="sum")
        return {"accuracy": ((logits.argmax(1) == batch[1]).sum().item(), len(logits)), "loss": (loss.item(), len(logits))}


def patterns(rng: np.random.Generator) -> NDArray[np.float64]:
    """[classes, 3, side, side] patterns of low spatial frequencies, in about -1..1."""
    spectrum = np.zeros((CLASSES, 3, SIDE, SIDE), dtype=np.complex128)
    spectrum[:, :, :4, :4] = rng.normal(size=(CLASSES, 3, 4, 4)) + 1j * rng.normal(size=(CLASSES, 3, 4, 4))
    images = np.fft.ifft2(spectrum).real
    scaled: NDArray[np.float64] = images / np.abs(images).max(axis=(1, 2, 3), keepdims=True)
    return scaled


def make(out: Path, regions: Sequence[str], *, skew: float, rows: int | None, seed: int) -> dict[str, int]:
    """Generate images (4,000 unless told) and spread them over regions."""
    rng = np.random.default_rng(seed)
    count, base = rows or 4000, patterns(rng)
    labels = rng.integers(0, CLASSES, count)
    shifts = rng.integers(0, SIDE, (count, 2))
    images = np.stack([np.roll(base[label], shift, axis=(1, 2)) for label, shift in zip(labels, shifts, strict=True)])
    noisy = images + rng.normal(scale=0.35, size=images.shape)
    pixels = np.clip(127.5 + 90 * noisy, 0, 255).astype(np.uint8).reshape(count, -1)
    table = pa.table({"image": fixed_lists(pixels), "label": labels.astype(np.uint8)})
    return write_regions(out, regions, table, assign(labels, len(regions), skew, rng), rows_per_group=256, seed=seed)
