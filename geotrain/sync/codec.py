"""Codecs: a vector of numbers to bytes and back. Orthogonal to strategies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

from geotrain.job import CodecName
from geotrain.sync.quantized import Exponents, Integers
from geotrain.sync.sparse import ChunkedTopK, TopK

BITS: tuple[Literal["bf16", "int8", "int4"], ...] = ("bf16", "int8", "int4")
"""What `auto` chooses from, the most bits first."""


class Codec(Protocol):
    """Encodes 1-D fp32 CPU tensors. What decode(encode(x)) loses is kept by the caller's feedback."""

    @property
    def lossless(self) -> bool:
        """decode(encode(x)) is x."""

    def wire_bytes(self, elements: int) -> int:
        """Exact size of an encoded vector, known before encoding."""

    def encode(self, vector: Tensor) -> Tensor:
        """[elements] fp32 -> [wire_bytes] uint8, in memory of its own."""

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        """[wire_bytes] uint8 -> [elements] fp32; may share memory with the payload. Raises ValueError on bytes that fit no vector."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Numbers as little-endian `dtype`."""

    dtype: torch.dtype

    @property
    def lossless(self) -> bool:
        return self.dtype == torch.float32

    def wire_bytes(self, elements: int) -> int:
        return elements * self.dtype.itemsize

    def encode(self, vector: Tensor) -> Tensor:
        return vector.to(self.dtype, copy=True).view(torch.uint8)

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        if payload.numel() != self.wire_bytes(elements):
            raise ValueError(f"payload of {payload.numel()} bytes, expected {self.wire_bytes(elements)}")
        return payload.view(self.dtype).to(torch.float32)


@dataclass(slots=True)
class Several:
    """One of several codecs, which may change from update to update; the last byte says which. For `codec: auto`."""

    options: Sequence[Codec]
    chosen: int = 0

    @property
    def lossless(self) -> bool:
        return all(option.lossless for option in self.options)

    def wire_bytes(self, elements: int) -> int:
        return self.options[self.chosen].wire_bytes(elements) + 1

    def encode(self, vector: Tensor) -> Tensor:
        payload = self.options[self.chosen].encode(vector)
        return torch.cat([payload, torch.tensor([self.chosen], dtype=torch.uint8)])

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        tag = int(payload[-1]) if payload.numel() else len(self.options)
        if tag >= len(self.options):
            raise ValueError(f"codec number {tag}, there are {len(self.options)}")
        return self.options[tag].decode(payload[:-1], elements)


FP32 = Cast(torch.float32)


def codec_of(name: CodecName, keep: float | None = None) -> Codec:
    """`keep`: the share of numbers that a sparse codec keeps."""
    match name:
        case "fp32":
            return FP32
        case "bf16":
            return Cast(torch.bfloat16)
        case "int8":
            return Integers(8, 1024)
        case "int4":
            return Integers(4, 256)
        case "e3m0":
            return Exponents(256)
        case "topk":
            return TopK(keep or 0.01)
        case "sparseloco":
            return ChunkedTopK(keep or 1 / 64, "bins")
        case "fedzip":
            return ChunkedTopK(keep or 0.1, "centroids")
        case "auto":
            return Several([codec_of(option) for option in BITS])
        case _:
            assert_never(name)
