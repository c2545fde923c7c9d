"""Codecs: a vector of numbers to bytes and back. Orthogonal to strategies."""

from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

CodecName = Literal["fp32", "bf16"]


class Codec(Protocol):
    """Encodes 1-D fp32 CPU tensors. What decode(encode(x)) loses is kept by the caller's ErrorFeedback."""

    @property
    def lossless(self) -> bool:
        """decode(encode(x)) is x."""

    def wire_bytes(self, elements: int) -> int:
        """Exact size of an encoded vector, known before encoding."""

    def encode(self, vector: Tensor) -> Tensor:
        """[elements] fp32 -> [wire_bytes] uint8, in memory of its own."""

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        """[wire_bytes] uint8 -> [elements] fp32; may share memory with the payload. Raises ValueError on a wrong size."""


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


def codec_of(name: CodecName) -> Codec:
    match name:
        case "fp32":
            return Cast(torch.float32)
        case "bf16":
            return Cast(torch.bfloat16)
        case _:
            assert_never(name)


@dataclass(slots=True)
class ErrorFeedback:
    """e += x; s = C(e); e -= s; send s. So sum of decoded + residual = sum of produced, whatever the codec drops."""

    codec: Codec
    residual: Tensor | None = None

    def encode(self, vector: Tensor) -> Tensor:
        """[elements] fp32 -> payload."""
        if self.codec.lossless:
            return self.codec.encode(vector)
        if self.residual is None:
            self.residual = torch.zeros_like(vector)
        self.residual += vector
        payload = self.codec.encode(self.residual)
        self.residual -= self.codec.decode(payload, vector.numel())
        return payload
