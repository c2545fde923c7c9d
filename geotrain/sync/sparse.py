"""Few numbers of many: top-k as DGC selects it, chunked top-k with short indices and two-bit values (SparseLoCo, FedZip), and the
touched rows of embedding tables.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geotrain.sync.quantized import check

Table = tuple[int, int, int]
"""An embedding table in the flat vector: (start, rows, width)."""

SAMPLE = 100
"""One element in so many is looked at to guess the threshold."""


def largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k largest |values|, rising.

    As in DGC (arXiv 1712.01887): a threshold from a strided 1 % sample, then exactly k of the survivors.
    """
    size = np.abs(values)
    candidates: NDArray[np.int64] | None = None
    if 0 < k < len(size) // 4 and len(size) >= 64 * SAMPLE:
        sample = size[::SAMPLE]
        wanted = min(len(sample) - 1, int(1.5 * k / SAMPLE) + 8)
        threshold = np.partition(sample, len(sample) - 1 - wanted)[len(sample) - 1 - wanted]
        candidates = np.flatnonzero(size >= threshold)
    if candidates is None or len(candidates) < k:
        candidates = np.arange(len(size))
    if len(candidates) > k:
        kept = np.argpartition(size[candidates], len(candidates) - k)[len(candidates) - k :]
        candidates = np.sort(candidates[kept])
    return candidates


@dataclass(frozen=True, slots=True)
class TopK:
    """The `keep` share of largest numbers: positions as int32, then values as bf16. Six bytes for each number kept."""

    keep: float
    lossless = False

    def kept(self, elements: int) -> int:
        return min(elements, max(1, round(self.keep * elements)))

    def wire_bytes(self, elements: int) -> int:
        return 6 * self.kept(elements)

    def encode(self, vector: Tensor) -> Tensor:
        positions = largest(vector.numpy(), self.kept(vector.numel()))
        values = vector[torch.from_numpy(positions)].to(torch.bfloat16)
        return torch.cat([torch.from_numpy(positions.astype(np.int32)).view(torch.uint8), values.view(torch.uint8)])

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        """Of a payload made with any `keep`: while DGC warms up, the share falls from round to round."""
        k, rest = divmod(payload.numel(), 6)
        if rest or k > elements:
            raise ValueError(f"payload of {payload.numel()} bytes for {elements} numbers")
        positions = payload[: 4 * k].view(torch.int32).to(torch.int64)
        if k and (int(positions.min()) < 0 or int(positions.max()) >= elements):
            raise ValueError(f"a position outside of the {elements} numbers")
        out = torch.zeros(elements)
        out[positions] = payload[4 * k :].view(torch.bfloat16).to(torch.float32)
        return out


CHUNK = 4096
"""Positions inside a chunk take 12 bits."""


@dataclass(frozen=True, slots=True)
class ChunkedTopK:
    """The `keep` share of largest numbers of each chunk of 4096, 14 bits each: a 12-bit position and a 2-bit value.

    `bins`: SparseLoCo's values (arXiv 2508.15706): sign, and below or above the middle of what was kept, each of the four standing
    for its mean. `centroids`: FedZip's (arXiv 2102.01593): the nearest of three centroids found by k-means. Where FedZip
    codes with Huffman, fields here have a fixed length [ours], so that the size is known before encoding.
    Layout: four means, fp32; then four numbers in every seven bytes.
    """

    keep: float
    values: Literal["bins", "centroids"]
    lossless = False

    def kept(self, elements: int) -> tuple[int, int]:
        """(numbers kept of a whole chunk, of the last, shorter one)"""
        rest = elements % CHUNK
        return max(1, round(self.keep * CHUNK)), min(rest, max(1, round(self.keep * rest)))

    def _total(self, elements: int) -> int:
        whole, last = self.kept(elements)
        return elements // CHUNK * whole + last

    def wire_bytes(self, elements: int) -> int:
        return 16 + -(-self._total(elements) // 4) * 7

    def encode(self, vector: Tensor) -> Tensor:
        n = vector.numel()
        k, last = self.kept(n)
        chunks = n // CHUNK
        rows = vector[: chunks * CHUNK].view(chunks, CHUNK)
        inside = rows.abs().topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        kept = [rows.gather(1, inside).view(-1)]
        positions = [inside.view(-1)]
        if last:
            tail = vector[chunks * CHUNK :]
            where = tail.abs().topk(last, sorted=False).indices.sort().values
            kept.append(tail[where])
            positions.append(where)
        numbers = torch.cat(kept).numpy()
        codes, means = (four_bins if self.values == "bins" else three_centroids)(numbers)
        words = (torch.cat(positions).numpy().astype(np.uint64) << np.uint64(2)) | codes.astype(np.uint64)
        padded = np.zeros(-(-len(words) // 4) * 4, dtype=np.uint64)
        padded[: len(words)] = words
        four = padded.reshape(-1, 4)
        packed = four[:, 0] | four[:, 1] << np.uint64(14) | four[:, 2] << np.uint64(28) | four[:, 3] << np.uint64(42)
        body = np.ascontiguousarray(packed.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :7]).reshape(-1)
        return torch.cat([torch.from_numpy(means.astype("<f4").view(np.uint8).copy()), torch.from_numpy(body)])

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        check(payload, self.wire_bytes(elements))
        means = payload[:16].view(torch.float32)
        body = np.zeros((-(-self._total(elements) // 4), 8), dtype=np.uint8)
        body[:, :7] = payload[16:].numpy().reshape(-1, 7)
        packed = body.reshape(-1).view("<u8")
        words = np.stack([packed >> np.uint64(14 * i) & np.uint64(0x3FFF) for i in range(4)], axis=1).reshape(-1)[: self._total(elements)]
        words = words.astype(np.int64)
        k, last = self.kept(elements)
        chunk = np.repeat(np.arange(elements // CHUNK + (last > 0)), [k] * (elements // CHUNK) + [last] * (last > 0))
        positions = chunk * CHUNK + (words >> 2)
        if len(positions) and positions.max() >= elements:
            raise ValueError(f"a position outside of the {elements} numbers")
        out = torch.zeros(elements)
        out[torch.from_numpy(positions)] = means[torch.from_numpy(words & 3)]
        return out


def four_bins(numbers: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(code of each number, the mean that each code stands for): negative or not, small or large."""
    size = np.abs(numbers)
    middle = np.median(size) if len(size) else 0.0
    codes = (numbers >= 0) * 2 + (size > middle)
    return codes, _means(numbers, codes)


def three_centroids(numbers: NDArray[np.float32], sweeps: int = 8) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(code of each number, centroids): one-dimensional k-means by Lloyd's sweeps, begun at three quantiles."""
    if not len(numbers):
        return np.zeros(0, dtype=np.int64), np.zeros(4)
    centroids = np.quantile(numbers, [1 / 6, 1 / 2, 5 / 6])
    codes = np.zeros(len(numbers), dtype=np.int64)
    for _ in range(sweeps):
        codes = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, numbers)
        means = _means(numbers, codes)[:3]
        centroids = np.sort(np.where(np.bincount(codes, minlength=3)[:3] > 0, means, centroids))
    codes = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, numbers)
    return codes, np.append(centroids, 0.0)


def _means(numbers: NDArray[np.float32], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[4] mean of the numbers with each code; 0 where there are none."""
    sums = np.bincount(codes, weights=numbers, minlength=4)
    counts = np.bincount(codes, minlength=4)
    return sums / np.maximum(counts, 1)


class Inner(Protocol):
    """What codes the numbers that are left."""

    @property
    def lossless(self) -> bool: ...

    def wire_bytes(self, elements: int) -> int: ...

    def encode(self, vector: Tensor) -> Tensor: ...

    def decode(self, payload: Tensor, elements: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TouchedRows:
    """Of embedding tables only the rows that changed, and everything else, through another codec [ours].

    A row that no sample touched has a gradient of zero; with an optimizer that leaves it alone then (SGD, Adagrad; not Adam, whose
    momentum goes on) most rows of a round are zero. Layout: rows touched per table, int32; their numbers, int32; the rest.
    """

    inner: Inner
    tables: tuple[Table, ...]

    @property
    def lossless(self) -> bool:
        return self.inner.lossless

    def wire_bytes(self, elements: int) -> int:
        """The most: with every row touched. `measure` is exact."""
        return 4 * (len(self.tables) + sum(rows for _, rows, _ in self.tables)) + self.inner.wire_bytes(elements)

    def measure(self, vector: Tensor) -> int:
        """Exact size of this vector, encoded, before encoding it."""
        touched = [len(rows) for rows in self._touched(vector)]
        numbers = self._dense(vector.numel()) + sum(n * width for n, (_, _, width) in zip(touched, self.tables, strict=True))
        return 4 * (len(self.tables) + sum(touched)) + self.inner.wire_bytes(numbers)

    def expected(self, elements: int, share: float) -> int:
        """Size with this share of every table's rows touched."""
        rows = [round(share * rows) for _, rows, _ in self.tables]
        numbers = self._dense(elements) + sum(n * width for n, (_, _, width) in zip(rows, self.tables, strict=True))
        return 4 * (len(self.tables) + sum(rows)) + self.inner.wire_bytes(numbers)

    def _touched(self, vector: Tensor) -> list[Tensor]:
        """Per table, the numbers of its rows that are not zero, rising."""
        return [vector[a : a + rows * width].view(rows, width).any(1).nonzero().view(-1) for a, rows, width in self.tables]

    def _dense(self, elements: int) -> int:
        return elements - sum(rows * width for _, rows, width in self.tables)

    def _between(self, elements: int) -> list[tuple[int, int]]:
        """The parts of the vector outside of the tables."""
        edges = [0, *(edge for a, rows, width in sorted(self.tables) for edge in (a, a + rows * width)), elements]
        return [(a, b) for a, b in zip(edges[0::2], edges[1::2], strict=True) if a < b]

    def encode(self, vector: Tensor) -> Tensor:
        touched = self._touched(vector)
        kept = [vector[a:b] for a, b in self._between(vector.numel())]
        kept += [vector[a : a + n * width].view(n, width)[rows].view(-1) for rows, (a, n, width) in zip(touched, self.tables, strict=True)]
        head = torch.cat([torch.tensor([len(rows) for rows in touched]), *touched]).to(torch.int32)
        return torch.cat([head.view(torch.uint8), self.inner.encode(torch.cat(kept))])

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        count = len(self.tables)
        counts = payload[: 4 * count].view(torch.int32).tolist() if payload.numel() >= 4 * count else []
        if len(counts) != count or any(not 0 <= n <= rows for n, (_, rows, _) in zip(counts, self.tables, strict=True)):
            raise ValueError(f"payload of {payload.numel()} bytes with {counts} rows of {count} tables")
        split = 4 * (count + sum(counts))
        numbers = payload[4 * count : split].view(torch.int32).to(torch.int64).split(counts)
        rest = self._dense(elements) + sum(n * width for n, (_, _, width) in zip(counts, self.tables, strict=True))
        values, out, at = self.inner.decode(payload[split:], rest), torch.zeros(elements), 0
        for a, b in self._between(elements):
            out[a:b] = values[at : at + b - a]
            at += b - a
        for rows, (a, n, width) in zip(numbers, self.tables, strict=True):
            if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= n):
                raise ValueError(f"a row outside of a table of {n}")
            out[a : a + n * width].view(n, width)[rows] = values[at : at + len(rows) * width].view(-1, width)
            at += len(rows) * width
        return out
