"""Pace: how many inner steps a region makes in each round."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Pace:
    """A region's inner steps of an epoch, spread evenly over the rounds that all regions share [ours].

    The region with the most steps makes about H between two rounds and the others their share, so that every region
    ends its epoch with the same round and every row counts once per epoch, whatever the sizes of the regions.
    """

    rounds_per_epoch: int
    steps_in: Callable[[int], int]
    """Inner steps that this region's data takes in a given epoch."""

    def steps(self, round: int) -> int:
        """Inner steps in a round; the sum over an epoch's rounds is exactly that epoch's steps."""
        epoch, position = divmod(round, self.rounds_per_epoch)
        total = self.steps_in(epoch)
        return (position + 1) * total // self.rounds_per_epoch - position * total // self.rounds_per_epoch


def rounds_per_epoch(steps: int, every: int) -> int:
    """Rounds in an epoch, given the inner steps of the region that makes the most, and H."""
    return max(1, ceil(steps / every))
