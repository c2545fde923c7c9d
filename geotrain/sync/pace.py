"""Pace: how many inner steps a region makes in each round."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True, slots=True)
class Pace:
    """A region's inner steps of an epoch, spread evenly over the epoch's rounds [ours].

    With the rounds that all regions share, the region with the most steps makes about H between two rounds and the others their
    share, so that every region ends its epoch with the same round and every row counts once per epoch, whatever the sizes of the
    regions. With rounds of its own per epoch (`every: balanced`) a region passes its data at its own speed.
    """

    rounds_per_epoch: int
    steps_in: Callable[[int], int]
    """Inner steps that this region's data takes in a given epoch."""
    since: int = 0
    """The first round for which this holds."""
    epoch_then: int = 0
    left_then: int | None = None
    """Rounds left of that epoch then; None: all."""

    def steps(self, round: int, done: int) -> int:
        """Inner steps in a round before which `done` steps of its epoch were made.

        What is left is spread over the rounds that are left, so steps missed in a round that was cut short are made up, and an
        epoch's steps are exactly its own.
        """
        epoch, left = self.place(round)
        return ceil((self.steps_in(epoch) - done) / left)

    def epoch(self, round: int) -> int:
        return self.place(round)[0]

    def place(self, round: int) -> tuple[int, int]:
        """(epoch, rounds left of it, this one included)."""
        first = self.rounds_per_epoch if self.left_then is None else self.left_then
        if round - self.since < first:
            return self.epoch_then, first - (round - self.since)
        epochs, position = divmod(round - self.since - first, self.rounds_per_epoch)
        return self.epoch_then + 1 + epochs, self.rounds_per_epoch - position


@dataclass(frozen=True, slots=True)
class PaceChange:
    """From a round on another H, in all regions."""

    round: int
    epoch: int
    left: int
    """Rounds left of that epoch, that one included."""
    rounds_per_epoch: int
    every: int
    rounds: int
    """Of the whole run, from then on."""


def pace_since(change: PaceChange, steps_in: Callable[[int], int]) -> Pace:
    return Pace(change.rounds_per_epoch, steps_in, change.round, change.epoch, change.left)


def rounds_per_epoch(steps: int, every: int) -> int:
    """Rounds in an epoch, given the inner steps of the region that makes the most, and H."""
    return max(1, ceil(steps / every))


def balanced(seconds_per_step: Mapping[str, float], every: int) -> dict[str, int]:
    """Inner steps per region and round in proportion to speed, so that all end a round together; the fastest makes `every`."""
    fastest = min(seconds_per_step.values())
    return {region: max(1, round(every * fastest / s)) for region, s in seconds_per_step.items()}


def compass(seconds_per_step: Mapping[str, float], most: int, least: int = 1) -> dict[str, int]:
    """Inner steps per region by FedCompass's group arithmetic (arXiv 2309.14675, code), for regions that push on their own.

    The fastest opens a group with `most` steps, due at T = most * s. Each other region, from fast to slow, joins the group
    that allows it the most steps, q = floor(T / s) in [least, most], or opens one of its own with `most`.
    """
    steps: dict[str, int] = {}
    due: list[float] = []
    for region in sorted(seconds_per_step, key=lambda region: (seconds_per_step[region], region)):
        s = seconds_per_step[region]
        choices = [q for t in due if least <= (q := floor(t / s * (1 + 1e-9))) <= most]
        steps[region] = max(choices, default=most)
        if not choices:
            due.append(most * s)
    return steps
