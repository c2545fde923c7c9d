"""Few bits per number, with a scale per chunk: int8 and int4 (absolute maximum), E3M0 (powers of two around the median).

Layout: the scales, fp32, one per chunk; then the numbers, two to a byte where they have four bits. Work goes in blocks that stay in
the cache: a whole tensor at once takes twice as long.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Elements worked on at a time; a multiple of every chunk."""


def check(payload: Tensor, expected: int) -> None:
    if payload.numel() != expected:
        raise ValueError(f"payload of {payload.numel()} bytes, expected {expected}")


def blocks(elements: int, chunk: int) -> Iterator[tuple[slice, slice, int]]:
    """(elements, their scales, chunk size) of each block; the last chunk may be short and is then a block of its own."""
    whole = elements // chunk * chunk
    for start in range(0, whole, BLOCK):
        stop = min(start + BLOCK, whole)
        yield slice(start, stop), slice(start // chunk, stop // chunk), chunk
    if whole < elements:
        yield slice(whole, elements), slice(whole // chunk, whole // chunk + 1), elements - whole


def pack(codes: Tensor) -> Tensor:
    """[n] uint8 below 16 -> [ceil(n / 2)] bytes, the first of each two in the low half."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | (codes[1::2] << 4)


def unpack(packed: Tensor, elements: int) -> Tensor:
    codes = torch.empty(2 * packed.numel(), dtype=torch.uint8)
    codes[0::2], codes[1::2] = packed & 15, packed >> 4
    return codes[:elements]


@dataclass(frozen=True, slots=True)
class Integers:
    """Signed integers of 8 or 4 bits; the scale of a chunk is its absolute maximum over 127 or 7."""

    bits: int
    chunk: int
    lossless = False

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def wire_bytes(self, elements: int) -> int:
        return -(-elements // self.chunk) * 4 + (elements * self.bits + 7) // 8

    def encode(self, vector: Tensor) -> Tensor:
        n, out = vector.numel(), torch.empty(self.wire_bytes(vector.numel()), dtype=torch.uint8)
        split = -(-n // self.chunk) * 4
        scales, numbers = out[:split].view(torch.float32), out[split:]
        for part, which, chunk in blocks(n, self.chunk):
            rows = vector[part].view(-1, chunk)
            scale = rows.abs().amax(1).div_(self.top)
            scales[which] = scale
            safe = torch.where(scale > 0, scale, torch.ones_like(scale))
            rounded = rows.div(safe[:, None]).round_().clamp_(-self.top, self.top).view(-1)
            if self.bits == 8:
                numbers[part] = rounded.to(torch.int8).view(torch.uint8)
            else:
                numbers[part.start // 2 : (part.stop + 1) // 2] = pack(rounded.add_(8).to(torch.uint8))
        return out

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        check(payload, self.wire_bytes(elements))
        split = -(-elements // self.chunk) * 4
        scales, numbers = payload[:split].view(torch.float32), payload[split:]
        out = torch.empty(elements)
        for part, which, chunk in blocks(elements, self.chunk):
            if self.bits == 8:
                values = numbers[part].view(torch.int8).to(torch.float32)
            else:
                values = unpack(numbers[part.start // 2 : (part.stop + 1) // 2], part.stop - part.start).to(torch.float32).sub_(8)
            torch.mul(values.view(-1, chunk), scales[which][:, None], out=out[part].view(-1, chunk))
        return out


@dataclass(frozen=True, slots=True)
class Exponents:
    """E3M0, four bits: a sign and a power of two from 2^-2 to 2^3 times the chunk's median |x| over x != 0, or zero.

    Streaming DiLoCo's payload (arXiv 2501.18512), with the bit layout of its public third-party code: e = clip(round(log2(|x| /
    scale)), -2, 3); |x| / scale < 1/8 is 0; code = sign << 3 | (e + 3). The scale per chunk is ours.
    """

    chunk: int
    lossless = False

    def wire_bytes(self, elements: int) -> int:
        return -(-elements // self.chunk) * 4 + (elements + 1) // 2

    def encode(self, vector: Tensor) -> Tensor:
        n, out = vector.numel(), torch.empty(self.wire_bytes(vector.numel()), dtype=torch.uint8)
        split = -(-n // self.chunk) * 4
        scales, numbers = out[:split].view(torch.float32), out[split:]
        for part, which, chunk in blocks(n, self.chunk):
            rows = vector[part].view(-1, chunk)
            size = rows.abs()
            scale = torch.where(size > 0, size, torch.nan).nanmedian(1).values.nan_to_num_(0.0)
            scales[which] = scale
            ratio = size.div_(torch.where(scale > 0, scale, torch.ones_like(scale))[:, None])
            exponent = ratio.log2().round_().clamp_(-2, 3).add_(3)
            code = torch.where(ratio < 0.125, torch.zeros_like(exponent), exponent).to(torch.uint8)
            code |= (rows < 0).to(torch.uint8) << 3
            numbers[part.start // 2 : (part.stop + 1) // 2] = pack(code.view(-1))
        return out

    def decode(self, payload: Tensor, elements: int) -> Tensor:
        check(payload, self.wire_bytes(elements))
        split = -(-elements // self.chunk) * 4
        scales, numbers = payload[:split].view(torch.float32), payload[split:]
        table = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 0.0])
        table = torch.cat([table, -table])
        out = torch.empty(elements)
        for part, which, chunk in blocks(elements, self.chunk):
            codes = unpack(numbers[part.start // 2 : (part.stop + 1) // 2], part.stop - part.start)
            torch.mul(table[codes.to(torch.int32)].view(-1, chunk), scales[which][:, None], out=out[part].view(-1, chunk))
        return out
