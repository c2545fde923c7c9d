"""RoundMachine: when to exchange and what to accept. Events in, instructions out; it never sees a number of the model.

Two patterns cover the strategies. In a *push* a region sends after its last inner step of a round and goes on, applying what
comes when it comes. In a *merge* every region contributes to a round, the owner merges, and all take the same outer step.

What both guarantee, given a transport that loses nothing for ever: an update is applied at most once; it is applied or discarded
with a reason; a segment ends with the same round everywhere; after it no update is under way.
"""

from dataclasses import dataclass, field
from typing import assert_never

from geotrain.sync.messages import (
    Apply,
    Discard,
    Event,
    Hold,
    Instruction,
    Kind,
    Merge,
    Produce,
    Received,
    Resume,
    RoundClosed,
    SegmentBegins,
    SegmentOver,
    Send,
    StepDone,
    StopAsked,
    Update,
    View,
)
from geotrain.sync.pace import Pace
from geotrain.sync.strategy import Merging, Pushing, Strategy


@dataclass(slots=True)
class Progress:
    """What both machines count."""

    region: str
    view: View
    pace: Pace
    round: int = 0
    """The round that this region is in."""
    until: int = 0
    steps: int = 0
    samples: int = 0
    held: bool = True
    over: bool = True
    last: int | None = None
    """The agreed early end, once anybody asked."""

    @property
    def round_is_full(self) -> bool:
        return self.steps >= self.pace.steps(self.round)

    def end(self) -> int:
        """The segment ends before this round."""
        return self.until if self.last is None else min(self.until, self.last)

    def count(self, step: StepDone) -> None:
        assert not self.held, f"{self.region} stepped while held in round {self.round}"
        self.steps += 1
        self.samples += step.samples

    def close_round(self, now: float) -> RoundClosed:
        closed = RoundClosed(self.round, self.samples, now)
        self.round, self.steps, self.samples = self.round + 1, 0, 0
        return closed

    def hold(self, reason: str) -> list[Instruction]:
        self.held = True
        return [Hold(reason)]

    def resume(self) -> list[Instruction]:
        was_held, self.held = self.held, False
        return [Resume()] if was_held else []

    def finish(self) -> list[Instruction]:
        self.held = self.over = True
        return [SegmentOver(self.round)]


@dataclass(slots=True)
class MergeMachine:
    """Merge rounds with one owner: contribute, hold, apply what the owner merged."""

    at: Progress
    contributions: dict[str, Update] = field(default_factory=dict)
    """The owner's: what came for the round that it is in."""
    contributed: bool = False
    stop_asked: bool = False

    def handle(self, event: Event) -> list[Instruction]:
        match event:
            case SegmentBegins():
                self.at.until, self.at.last, self.at.over = event.until, None, False
                self.stop_asked = False
                return self._open(event.now)
            case StepDone():
                self.at.count(event)
                return self._contribute(event.now) if self.at.round_is_full else []
            case Received():
                return self._received(event.update, event.now)
            case StopAsked():
                self.stop_asked = True
                return []
            case _:
                assert_never(event)

    def _open(self, now: float) -> list[Instruction]:
        """Begin a round, or end the segment; a region with no inner step in this round contributes at once."""
        if self.at.round >= self.at.end():
            return self.at.finish()
        resumed = self.at.resume()
        return resumed if not self.at.round_is_full else resumed + self._contribute(now)

    def _contribute(self, now: float) -> list[Instruction]:
        at = self.at
        last = at.round + 1 if self.stop_asked else None
        mine = Update(Kind.CONTRIBUTION, at.view.epoch, at.region, at.round, samples=at.samples, last=last)
        self.contributed = True
        out: list[Instruction] = [Produce(mine), *at.hold(f"round {at.round}: waiting for the merge")]
        if at.region != at.view.owner:
            return [*out, Send(mine, at.view.owner)]
        self.contributions[at.region] = mine
        return out + self._merge_if_complete(now)

    def _received(self, update: Update, now: float) -> list[Instruction]:
        if update.epoch != self.at.view.epoch:
            return [Discard(update, f"of view {update.epoch}, this is view {self.at.view.epoch}")]
        match update.kind:
            case Kind.CONTRIBUTION:
                if self.at.region != self.at.view.owner:
                    return [Discard(update, "not the owner")]
                if update.round != self.at.round or update.origin in self.contributions:
                    return [Discard(update, "already merged" if update.round < self.at.round else "already here")]
                self.contributions[update.origin] = update
                return self._merge_if_complete(now)
            case Kind.MERGED:
                if update.round != self.at.round or not self.contributed:
                    return [Discard(update, "already applied")]
                return self._commit(update, now)
            case Kind.PUSH:
                return [Discard(update, "a push in a merge strategy")]
            case _:
                assert_never(update.kind)

    def _merge_if_complete(self, now: float) -> list[Instruction]:
        at = self.at
        if set(self.contributions) != set(at.view.regions):
            return []
        parts = tuple(self.contributions[region] for region in sorted(self.contributions))
        wishes = [part.last for part in parts if part.last is not None]
        merged = Update(
            Kind.MERGED,
            at.view.epoch,
            at.region,
            at.round,
            samples=sum(part.samples for part in parts),
            last=min(wishes, default=None),
        )
        sends = [Send(merged, other) for other in at.view.others(at.region)]
        return [Merge(merged, parts), *sends, *self._commit(merged, now)]

    def _commit(self, merged: Update, now: float) -> list[Instruction]:
        self.contributions.clear()
        self.contributed = False
        self.at.last = merged.last
        return [Apply(merged, 1.0, 0), self.at.close_round(now), *self._open(now)]


@dataclass(slots=True)
class PushMachine:
    """Push rounds: send and go on; hold only to stay within the staleness bound, and to drain at a segment's end."""

    at: Progress
    strategy: Pushing
    heard: dict[str, int] = field(default_factory=dict)
    """Per neighbour, the first round not heard of yet: all before it were received."""
    early: dict[str, set[int]] = field(default_factory=dict)
    """Per neighbour, rounds received out of order."""
    stop_asked: bool = False

    def __post_init__(self) -> None:
        for other in self.at.view.others(self.at.region):
            self.heard.setdefault(other, self.at.round)
            self.early.setdefault(other, set())

    def handle(self, event: Event) -> list[Instruction]:
        match event:
            case SegmentBegins():
                self.at.until, self.at.last, self.at.over = event.until, None, False
                self.stop_asked = False
                return self._go_on(event.now)
            case StepDone():
                self.at.count(event)
                return self._push(event.now) + self._go_on(event.now) if self.at.round_is_full else []
            case Received():
                return self._received(event.update, event.now)
            case StopAsked():
                self.stop_asked = True
                return []
            case _:
                assert_never(event)

    def _go_on(self, now: float) -> list[Instruction]:
        """What this region may do next: end the segment, wait for the others, push an empty round, or step."""
        at = self.at
        out: list[Instruction] = []
        while True:
            slowest = min(self.heard.values(), default=at.round)
            if at.round >= at.end():
                return out + (at.finish() if slowest >= at.end() else at.hold("draining"))
            if at.round - slowest > self.strategy.max_staleness:
                return out + at.hold(f"{at.round - slowest} rounds ahead of the slowest region")
            out += at.resume()
            if not at.round_is_full:
                return out
            out += self._push(now)

    def _push(self, now: float) -> list[Instruction]:
        """Send this round to all neighbours.

        A wish to stop names a round that nobody can have passed: a region is at most max_staleness + 1 rounds beyond what it
        has heard, and it hears the wish with this update.
        """
        at = self.at
        if self.stop_asked:
            wish = at.round + 1 + self.strategy.max_staleness
            at.last = wish if at.last is None else min(at.last, wish)
        mine = Update(Kind.PUSH, at.view.epoch, at.region, at.round, samples=at.samples, last=at.last)
        sends = [Send(mine, other) for other in at.view.others(at.region)]
        return [Produce(mine), *sends, at.close_round(now)]

    def _received(self, update: Update, now: float) -> list[Instruction]:
        at = self.at
        if update.epoch != at.view.epoch:
            return [Discard(update, f"of view {update.epoch}, this is view {at.view.epoch}")]
        if update.kind is not Kind.PUSH or update.origin not in self.heard:
            return [Discard(update, "not a push of a neighbour")]
        if update.round < self.heard[update.origin] or update.round in self.early[update.origin]:
            return [Discard(update, "already applied")]
        self._note(update)
        if update.last is not None:
            at.last = update.last if at.last is None else min(at.last, update.last)
        staleness = max(0, at.round - 1 - update.round)
        out: list[Instruction] = [Apply(update, self.strategy.weight(staleness, len(at.view.regions)), staleness)]
        return out + self._go_on(now) if at.held and not at.over else out

    def _note(self, update: Update) -> None:
        early = self.early[update.origin]
        early.add(update.round)
        while self.heard[update.origin] in early:
            early.remove(self.heard[update.origin])
            self.heard[update.origin] += 1


RoundMachine = MergeMachine | PushMachine


def round_machine(strategy: Strategy, region: str, view: View, pace: Pace, first_round: int = 0) -> RoundMachine:
    """The machine of one partition, before `first_round`."""
    at = Progress(region, view, pace, round=first_round)
    match strategy:
        case Merging():
            return MergeMachine(at)
        case Pushing():
            return PushMachine(at, strategy)
        case _:
            assert_never(strategy)
