"""What every RoundMachine counts: rounds, inner steps, samples, and whether it may step."""

from collections import deque
from dataclasses import dataclass, field

from geotrain.sync.messages import (
    Discard,
    Hold,
    Instruction,
    Resume,
    RoundClosed,
    RoundMade,
    SegmentBegins,
    SegmentOver,
    StepDone,
    Update,
    View,
)
from geotrain.sync.pace import Pace

KEPT = 8
"""Rounds of which it is remembered where they began: more than a region can be ahead of what all hold."""


@dataclass(slots=True)
class Progress:
    """Where a region is."""

    region: str
    view: View
    pace: Pace
    round: int = 0
    """The round that this region is in."""
    done: int = 0
    """Inner steps of this epoch in the rounds before; negative where some of the epoch before are still to be made."""
    rows: int = 1
    """This region's weight in a full merge."""
    fresh: bool = False
    """It joins without anything learned: its first full merge only gives to it."""
    life: int = 0
    """Of its seat."""
    first: int = 0
    until: int = 0
    """The segment that is under way."""
    steps: int = 0
    samples: int = 0
    held: bool = True
    waits_for: str = ""
    """Why it is held."""
    over: bool = True
    last: int | None = None
    """The agreed early end, once anybody asked."""
    stop_asked: bool = False
    lately: deque[RoundMade] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Its last rounds."""
    newest: dict[str, RoundMade] = field(default_factory=dict)
    """Other region -> the last of its rounds that came here, of a push strategy."""
    _quota: int | None = None
    _began: dict[int, int] = field(default_factory=dict)
    """`done` at the beginning of the last rounds."""

    def __post_init__(self) -> None:
        self._began[self.round] = self.done

    @property
    def quota(self) -> int:
        """Inner steps of this round."""
        if self._quota is None:
            self._quota = self.pace.steps(self.round, self.done)
        return self._quota

    @property
    def round_is_full(self) -> bool:
        return self.steps >= self.quota

    @property
    def end(self) -> int:
        """The segment ends before this round."""
        return self.until if self.last is None else min(self.until, self.last)

    def take_pace(self, pace: Pace) -> None:
        """Between two segments: another number of inner steps per round from here on."""
        assert not self.steps, (self.region, self.round, self.steps)
        self.pace, self._quota = pace, None

    def begin_segment(self, event: SegmentBegins) -> None:
        self.over = False
        if event.again:
            return
        self.until, self.last, self.stop_asked = event.until, None, False
        self.first = self.round if event.first is None else event.first

    def end_before(self, last: int | None) -> None:
        """Somebody wishes the segment to end before round `last`."""
        if last is not None and last > self.first:
            self.last = last if self.last is None else min(self.last, last)

    def count(self, event: StepDone) -> None:
        assert not self.held, f"{self.region} stepped while held in round {self.round}"
        self.steps += event.steps
        self.samples = 0 if event.void else self.samples + event.samples
        assert self.steps <= self.quota, (self.region, self.round, self.steps)

    def remember(self, rounds: int) -> None:
        """So many of its last rounds at least."""
        self.lately = deque(self.lately, maxlen=max(KEPT, rounds))

    def heard_of(self, made: RoundMade) -> None:
        """That round came here, or more of it."""
        if (before := self.newest.get(made.region)) is None or (before.round, before.steps) < (made.round, made.steps):
            self.newest[made.region] = made

    def made(self) -> RoundMade:
        """The round that this region is in, so far."""
        epoch = self.pace.epoch(self.round)
        return RoundMade(self.region, self.life, self.round, epoch, self.done + self.steps, self.steps, self.samples)

    def close_round(self, now: float) -> RoundClosed:
        closed = RoundClosed(self.made(), now)
        self.lately.append(closed.made)
        self.jump(self.round + 1)
        return closed

    def jump(self, round: int) -> None:
        """Go to the beginning of a round; steps made so far stay made, steps missed by the end of an epoch are owed to the next."""
        epoch, following = self.pace.epoch(self.round), self.pace.epoch(round)
        self.done += self.steps
        if following == epoch + 1:
            self.done = min(0, self.done - self.pace.steps_in(epoch))
        elif following != epoch:
            self.done = 0
        self._begin_round(round)

    def _begin_round(self, round: int) -> None:
        self.round, self.steps, self.samples, self._quota = round, 0, 0, None
        self._began[round] = self.done
        for old in [known for known in self._began if known < round - KEPT]:
            del self._began[old]

    def start_over(self, round: int) -> None:
        """Be at the beginning of a round, without what was learned since: its rows are to be trained on again.

        Of a later round: the steps of the round under way are owed.
        """
        self.steps = 0
        self.lately = deque((made for made in self.lately if made.round < round), maxlen=self.lately.maxlen)
        if round <= self.round and round in self._began:
            self.done = self._began[round]
            self._begin_round(round)
        else:
            self.jump(round)

    def hold(self, reason: str) -> list[Instruction]:
        """Say so once."""
        self.waits_for = reason
        if self.held:
            return []
        self.held = True
        return [Hold(reason)]

    def resume(self) -> list[Instruction]:
        was_held, self.held = self.held, False
        return [Resume()] if was_held else []

    def finish(self) -> list[Instruction]:
        self.held = self.over = True
        return [SegmentOver(self.round)]

    def other_view(self, update: Update) -> Discard | None:
        """What to say to an update of an older view."""
        if update.epoch < self.view.epoch:
            return Discard(update, f"of view {update.epoch}, this is view {self.view.epoch}")
        return None


def keep_early(early: list[Update], update: Update) -> list[Instruction]:
    """Put an update aside whose time has not come; of two copies one."""
    if any(update.key == kept.key for kept in early):
        return [Discard(update, "already here")]
    early.append(update)
    return []
