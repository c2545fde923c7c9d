"""Fragments: which elements of the flat vector are synchronized together, and at whose turn.

The vector is [parameters..., floating-point buffers...]. Fragment `turn * shards + shard` is shard `shard` of what is synchronized at
turn `turn`. Turns are of equal size and each takes tensors from all over the model, which does a little better than contiguous
layers (Streaming DiLoCo, arXiv 2501.18512); the assignment is ours. Shards cut a turn in proportion to what their owners can carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Range = tuple[int, int]
"""[start, stop) in the flat vector."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of the vector: ranges of parameters, then ranges of buffers, each in rising order."""

    parameters: tuple[Range, ...]
    buffers: tuple[Range, ...]

    @property
    def ranges(self) -> tuple[Range, ...]:
        return (*self.parameters, *self.buffers)

    @property
    def parametric(self) -> int:
        """How many of its elements are parameters."""
        return _size(self.parameters)

    @property
    def buffered(self) -> int:
        """How many of its elements are buffers."""
        return _size(self.buffers)

    @property
    def elements(self) -> int:
        return self.parametric + self.buffered

    def difference(self, left: Tensor, right: Tensor) -> Tensor:
        """left - right on this fragment, [elements], where left is; both are whole vectors."""
        out, at = left.new_empty(self.elements), 0
        for a, b in self.ranges:
            torch.sub(left[a:b], right[a:b].to(left.device), out=out[at : at + b - a])
            at += b - a
        return out


def make_fragments(tensors: Sequence[int], parameters: int, turns: int = 1, shares: Sequence[float] = (1.0,)) -> tuple[Fragment, ...]:
    """Fragments of a vector made of tensors of these sizes, of which the first `parameters` elements are parameters.

    `shares`: the size of each shard, relative to the others.
    """
    total = sum(tensors)
    turns_p = _turns(_pieces(tensors, 0, parameters, turns), turns)
    turns_b = _turns(_pieces(tensors, parameters, total, turns), turns)
    shards = [(_cut(p, shares), _cut(b, shares)) for p, b in zip(turns_p, turns_b, strict=True)]
    return tuple(Fragment(p, b) for ps, bs in shards for p, b in zip(ps, bs, strict=True))


def _size(ranges: Sequence[Range]) -> int:
    return sum(b - a for a, b in ranges)


def _pieces(tensors: Sequence[int], start: int, stop: int, turns: int) -> list[Range]:
    """The tensors within [start, stop), large ones cut so that turns can be of equal size."""
    largest = max(1, -(-(stop - start) // (4 * turns))) if turns > 1 else max(1, stop - start)
    pieces = []
    for a, b in pairwise([0, *accumulate(tensors)]):
        if a >= start and b <= stop:
            pieces += [(at, min(at + largest, b)) for at in range(a, b, largest)]
    return pieces


def _turns(pieces: Sequence[Range], turns: int) -> list[list[Range]]:
    """Each piece, the largest first, to the turn with the least so far."""
    taken: list[list[Range]] = [[] for _ in range(turns)]
    sizes = [0] * turns
    for piece in sorted(pieces, key=lambda piece: (piece[0] - piece[1], piece[0])):
        turn = sizes.index(min(sizes))
        taken[turn].append(piece)
        sizes[turn] += piece[1] - piece[0]
    return [_joined(sorted(ranges)) for ranges in taken]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for a, b in ranges:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return joined


def _cut(ranges: Sequence[Range], shares: Sequence[float]) -> list[tuple[Range, ...]]:
    """Consecutive parts of the ranges, in proportion to the shares."""
    size, total = _size(ranges), sum(shares)
    ends = [round(size * part / total) for part in accumulate(shares)]
    return [_between(ranges, a, b) for a, b in pairwise([0, *ends])]


def _between(ranges: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """The elements number start..stop of the ranges, counted through."""
    found, before = [], 0
    for a, b in ranges:
        low, high = max(start - before, 0), min(stop - before, b - a)
        if low < high:
            found.append((a + low, a + high))
        before += b - a
    return tuple(found)
