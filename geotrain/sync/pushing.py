"""PushMachine: send after every round and go on; apply what comes when it comes.

A region holds only to stay within the staleness bound, and to drain at a segment's end. A view begins with a full merge, since the
crash of a region can leave its last update with some of the others and not with all.
"""

from dataclasses import dataclass, field
from typing import assert_never

from geotrain.sync.agree import FullMerge
from geotrain.sync.messages import (
    Apply,
    Discard,
    Event,
    Instruction,
    Kind,
    MergeAsked,
    Produce,
    Received,
    SegmentBegins,
    Send,
    StepDone,
    StopAsked,
    Tick,
    Update,
    View,
    ViewBegins,
    ViewChanged,
)
from geotrain.sync.progress import Progress, keep_early
from geotrain.sync.strategy import Pushing
from geotrain.sync.topology import diameter, sources, targets


@dataclass(slots=True)
class PushMachine:
    """One partition of a push strategy."""

    at: Progress
    strategy: Pushing
    heard: dict[str, int] = field(default_factory=dict)
    """Per region that sends here, the first round not heard of yet: all before it were received."""
    apart: dict[str, set[int]] = field(default_factory=dict)
    """Per region that sends here, rounds received out of order."""
    early: list[Update] = field(default_factory=list)
    """Updates of views that this region has not heard of yet, or that came before the view's full merge was done."""
    full: FullMerge | None = None
    """Under way."""
    fulls: int = 0
    """Full merges done in this view."""

    def __post_init__(self) -> None:
        self.at.remember(self.strategy.max_staleness + 2)
        self._hear_from(self.at.round)

    def _hear_from(self, round: int) -> None:
        """Expect everything from this round on."""
        self.heard = dict.fromkeys(sources(self.strategy.topology, self.at.view, self.at.region), round)
        self.apart = {region: set() for region in self.heard}

    @property
    def run_length(self) -> int:
        """Inner steps until this region has something to decide."""
        return self.at.quota - self.at.steps

    def handle(self, event: Event) -> list[Instruction]:
        match event:
            case StepDone():
                self.at.count(event)
                return self._push(event.now) + self._go_on(event.now) if self.at.round_is_full else []
            case Received():
                return self._received(event.update, event.now)
            case SegmentBegins():
                self.at.begin_segment(event)
                return self._go_on(event.now)
            case ViewChanged():
                return self._change_view(event.view, event.now) if event.view.epoch > self.at.view.epoch else []
            case MergeAsked():
                self.at.over = False
                return self._merge_fully(event.now)
            case StopAsked():
                self.at.stop_asked = True
                return []
            case Tick():
                return []
            case _:
                assert_never(event)

    def _go_on(self, now: float) -> list[Instruction]:
        """What this region may do next: end the segment, wait for the others, push an empty round, or step."""
        at, out = self.at, list[Instruction]()
        while self.full is None and not at.over:
            slowest = min(self.heard.values(), default=at.round)
            if at.round >= at.end:
                return out + (at.finish() if slowest >= at.end else at.hold("draining"))
            if at.round - slowest > self.strategy.max_staleness:
                return out + at.hold(f"{at.round - slowest} rounds ahead of the slowest region")
            out += at.resume()
            if not at.round_is_full:
                return out
            out += self._push(now)
        return out

    def _push(self, now: float) -> list[Instruction]:
        """Send this round.

        A wish to stop names a round that nobody can have passed: a region is at most max_staleness + 1 rounds beyond what it
        has heard from its sources, they as far beyond theirs, and the wish travels with the updates.
        """
        at, strategy = self.at, self.strategy
        if at.stop_asked:
            at.end_before(at.round + diameter(strategy.topology, at.view) * (1 + strategy.max_staleness))
        mine = Update(Kind.PUSH, at.view.epoch, at.region, at.round, samples=at.samples, last=at.last, made=(at.made(),))
        sends = [Send(mine, other) for other in targets(strategy.topology, at.view, at.region)]
        return [Produce(mine), *sends, at.close_round(now)]

    def _received(self, update: Update, now: float) -> list[Instruction]:
        at = self.at
        if (discard := at.other_view(update)) is not None:
            return [discard]
        of_a_full = update.kind in (Kind.REPLICA, Kind.AGREED)
        if update.epoch == at.view.epoch:
            if of_a_full and update.fragment < self.fulls:
                return [Discard(update, "already applied")]
            if of_a_full and self.full is not None:
                return self._after_full(self.full.received(update), now)
            if not of_a_full and self.full is None:
                return self._applied(update, now)
        return keep_early(self.early, update)

    def _applied(self, update: Update, now: float) -> list[Instruction]:
        at = self.at
        if update.kind is not Kind.PUSH or update.origin not in self.heard:
            return [Discard(update, "not a push of a neighbour")]
        if update.round < self.heard[update.origin] or update.round in self.apart[update.origin]:
            return [Discard(update, "already applied")]
        self._note(update)
        for made in update.made:
            at.heard_of(made)
        at.end_before(update.last)
        staleness = max(0, at.round - 1 - update.round)
        out: list[Instruction] = [Apply(update, self.strategy.weight(staleness, len(at.view.regions)), staleness)]
        return out + self._go_on(now) if at.held else out

    def _note(self, update: Update) -> None:
        apart = self.apart[update.origin]
        apart.add(update.round)
        while self.heard[update.origin] in apart:
            apart.remove(self.heard[update.origin])
            self.heard[update.origin] += 1

    def _change_view(self, view: View, now: float) -> list[Instruction]:
        out = self.full.abandon() if self.full else []
        self.at.view, self.fulls, self.at.over = view, 0, False
        return [*out, ViewBegins(view), *self._merge_fully(now)]

    def _merge_fully(self, now: float) -> list[Instruction]:
        at = self.at
        out = at.hold(f"view {at.view.epoch}: full merge")
        self.full = FullMerge(at, self.fulls)
        out += self._after_full(self.full.begin(), now)
        return out + self._hear_early(now)

    def _hear_early(self, now: float) -> list[Instruction]:
        early, self.early = self.early, []
        return [step for update in early for step in self._received(update, now)]

    def _after_full(self, out: list[Instruction], now: float) -> list[Instruction]:
        """Once agreed, all go on from the same parameters and the same round."""
        if self.full is None or self.full.agreed is None:
            return out
        at, round, self.full = self.at, self.full.agreed, None
        at.fresh, self.fulls = False, self.fulls + 1
        if at.round < round:
            if at.steps:
                out = [*out, at.close_round(now)]  # what was learned in it is in the mean
            at.jump(round)
        self._hear_from(round)
        return [*out, *self._hear_early(now), *self._go_on(now)]
