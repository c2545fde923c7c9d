"""MergeMachine: merge rounds, in which every fragment has one owner that merges and all take the same outer step.

A region contributes to round r after its inner steps of r. The merge of r is applied when it is due: at once (blocking), `tau` inner
steps into round r + 1 (streaming), or after the contribution to r + 1 (one round delayed). All apply merges in the order of rounds,
so two regions that applied the same number of rounds in one lineage of views hold the same agreed parameters, to the bit.
"""

from dataclasses import dataclass, field, replace
from typing import assert_never

from geotrain.sync.agree import FullMerge
from geotrain.sync.messages import (
    Adopt,
    Apply,
    Discard,
    Event,
    Instruction,
    Kind,
    Merge,
    MergeAsked,
    Produce,
    Readdress,
    Received,
    Return,
    RoundMade,
    SegmentBegins,
    Send,
    Settle,
    StepDone,
    StopAsked,
    Tick,
    Update,
    View,
    ViewBegins,
    ViewChanged,
    Wake,
)
from geotrain.sync.progress import KEPT, Progress, keep_early
from geotrain.sync.strategy import Merging, discount

Place = tuple[int, int]
"""(round, fragment)"""


@dataclass(slots=True)
class MergeMachine:
    """One partition of a merge strategy."""

    at: Progress
    strategy: Merging
    applied: int = -1
    """The next round to apply; -1 at first: the round that the region is in."""
    lineage: int = -1
    """The last view in which this region was up to date; None of them before it has joined."""
    mine: dict[Place, Update] = field(default_factory=dict)
    """Own contributions of which it is not known yet whether a merge took them."""
    returned: dict[int, tuple[RoundMade, ...]] = field(default_factory=dict)
    """Fragment -> the last rounds that merges went on without; they are in what is contributed to it next."""
    collected: dict[Place, dict[str, Update]] = field(default_factory=dict)
    """The owner's: contributions to fragments not merged yet."""
    merged: dict[Place, Update] = field(default_factory=dict)
    """Merges that are here and not applied yet."""
    waiting_for: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    """At the beginning of a view: per region (lineage, applied), None until it has said so. Empty once this region is up to date."""
    state: Update | None = None
    """A STATE that came before all had said where they are."""
    early: list[Update] = field(default_factory=list)
    """Updates of views that this region has not heard of yet."""
    full: FullMerge | None = None
    """Under way."""
    fulls: int = 0
    """Full merges done in this view."""
    _interrupted: bool = False
    """A full merge was under way when the view changed: it begins again."""
    _quorum_at: dict[Place, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.applied < 0:
            self.applied = self.at.round

    @property
    def run_length(self) -> int:
        """Inner steps until this region has something to decide."""
        at, tau = self.at, self.strategy.tau
        if self.applied < at.round and tau and at.steps < tau:
            return min(tau, at.quota) - at.steps
        return at.quota - at.steps

    def handle(self, event: Event) -> list[Instruction]:
        match event:
            case StepDone():
                self.at.count(event)
                return self._advance(event.now)
            case Received():
                return self._received(event.update, event.now)
            case SegmentBegins():
                self.at.begin_segment(event)
                return self._advance(event.now)
            case Tick():
                return self._merge_all(event.now) + self._advance(event.now)
            case ViewChanged():
                return self._change_view(event.view, event.now) if event.view.epoch > self.at.view.epoch else []
            case MergeAsked():
                return self._merge_fully()
            case StopAsked():
                self.at.stop_asked = True
                return []
            case _:
                assert_never(event)

    def fragments(self, round: int) -> range:
        """The fragments whose turn it is."""
        first = round % self.strategy.turns * self.strategy.shards
        return range(first, first + self.strategy.shards)

    # Going on: what this region may do next.

    def _advance(self, now: float) -> list[Instruction]:
        """Apply what is due, contribute what is full, end the segment, or let the region step."""
        at = self.at
        out: list[Instruction] = []
        while not self.waiting_for and not at.over:
            if self.applied < at.round and self._is_due(self.applied):
                if not self._is_here(self.applied):
                    return out + at.hold(f"round {self.applied}: waiting for the merge")
                out += self._apply()
            elif at.round >= at.end:
                return out + at.finish()
            elif at.round_is_full or self._is_here(at.round):
                out += self._contribute(now)
            else:
                return out + at.resume()
        return out

    def _is_here(self, round: int) -> bool:
        return bool(self.merged) and all((round, fragment) in self.merged for fragment in self.fragments(round))

    def _is_due(self, round: int) -> bool:
        """Whether the region may make no further step before it applies this round, which it has contributed to."""
        at, tau = self.at, self.strategy.tau
        if at.round >= at.end or self._is_here(at.round):
            return True
        return at.round > round + 1 or (tau is not None and at.steps >= min(tau, at.quota))

    def _contribute(self, now: float) -> list[Instruction]:
        """End the round: full, or cut short because all of it was merged without this region."""
        at = self.at
        out: list[Instruction] = []
        last = at.round + (1 if self.strategy.tau == 0 else 2) if at.stop_asked else None
        places = [(at.round, fragment) for fragment in self.fragments(at.round)]
        for place in places:
            made = (*self.returned.pop(place[1], ()), at.made())
            mine = Update(Kind.CONTRIBUTION, at.view.epoch, at.region, at.round, place[1], at.samples, last, made=made)
            self.mine[place] = mine
            out.append(Produce(mine))
            if place not in self.merged:
                out += self._deliver(mine)
        out.append(at.close_round(now))
        return [*out, *(step for place in places for step in self._merge_if_complete(place, now))]

    def _deliver(self, mine: Update) -> list[Instruction]:
        owner = self.at.view.owner(mine.fragment)
        if owner != self.at.region:
            return [Send(mine, owner)]
        self.collected.setdefault((mine.round, mine.fragment), {})[mine.origin] = mine
        return []

    def _apply(self) -> list[Instruction]:
        """The outer step of one round. A contribution that the merge went on without is given back, down-weighted."""
        at = self.at
        out: list[Instruction] = []
        staleness = 1 if self.strategy.tau is None else 0
        whole = all(len(self.merged[self.applied, fragment].members) == len(at.view.regions) for fragment in self.fragments(self.applied))
        early = whole and self.strategy.tau != 0 and self.applied == at.round - 1 and at.end <= at.round < at.until
        for fragment in self.fragments(self.applied):
            place = (self.applied, fragment)
            merged, mine = self.merged.pop(place), self.mine.pop(place)
            if at.region in merged.members:
                out.append(Settle(mine))
            else:
                out.append(Return(mine, discount(1)))
                self.returned[fragment] = (*self.returned.get(fragment, ()), *mine.made)[-KEPT:]
            out.append(Apply(merged, 1.0, staleness, early=early))
            at.end_before(merged.last)
        self.applied += 1
        return out

    def postpone(self, round: int, fragment: int) -> Update:
        """A merge that was applied early, and is taken back: it will be applied when it is due. Returns its header."""
        at, place = self.at, (round, fragment)
        self.mine[place] = Update(Kind.CONTRIBUTION, at.view.epoch, at.region, round, fragment)
        self.merged[place] = Update(Kind.MERGED, at.view.epoch, at.view.owner(fragment), round, fragment, members=at.view.regions)
        self.applied = min(self.applied, round)
        return self.merged[place]

    # The owner's part.

    def _received(self, update: Update, now: float) -> list[Instruction]:
        at = self.at
        if update.epoch != at.view.epoch:
            if (discard := at.other_view(update)) is not None:
                return [discard]
            return keep_early(self.early, update)
        place = (update.round, update.fragment)
        match update.kind:
            case Kind.CONTRIBUTION:
                return out + self._advance(now) if (out := self._collect(update, place, now)) else []
            case Kind.MERGED:
                if self._is_past(update.round) or place in self.merged:
                    return [Discard(update, "already applied")]
                if update.origin != at.view.owner(update.fragment) or update.fragment not in self.fragments(update.round):
                    return [Discard(update, "not of the fragment's owner")]
                self.merged[place] = update
                return self._advance(now)
            case Kind.HELLO:
                if self.waiting_for.get(update.origin, 0) is not None:
                    return [Discard(update, "already heard")]
                self.waiting_for[update.origin] = (update.lineage, update.round)
                return self._catch_up(now)
            case Kind.STATE:
                if not self.waiting_for or self.state is not None:
                    return [Discard(update, "not asked for")]
                self.state = update
                return self._catch_up(now)
            case Kind.REPLICA | Kind.AGREED:
                if update.fragment < self.fulls:
                    return [Discard(update, "already applied")]
                return self._after_full(self.full.received(update)) if self.full else keep_early(self.early, update)
            case Kind.PUSH:
                return [Discard(update, "a push in a merge strategy")]
            case _:
                assert_never(update.kind)

    def _collect(self, update: Update, place: Place, now: float) -> list[Instruction]:
        if self.at.view.owner(update.fragment) != self.at.region or update.fragment not in self.fragments(update.round):
            return [Discard(update, "not the owner")]
        if self._is_past(update.round) or place in self.merged:
            return [Discard(update, "already merged")]
        there = self.collected.setdefault(place, {})
        if update.origin in there or not self.at.view.has(update.origin):
            return [Discard(update, "already here")]
        there[update.origin] = update
        return self._merge_if_complete(place, now) if not self.waiting_for else []

    def _merge_all(self, now: float) -> list[Instruction]:
        return [step for place in sorted(self.collected) for step in self._merge_if_complete(place, now)] if not self.waiting_for else []

    def _merge_if_complete(self, place: Place, now: float) -> list[Instruction]:
        """Merge a fragment once all contributed, or a quorum did and the grace time is over; rounds in their order.

        The order matters to what the owner keeps from one merge to the next: its residual, and what a penalty compares with.
        """
        there, everyone = self.collected.get(place), len(self.at.view.regions)
        quorum = min(self.strategy.quorum or everyone, everyone)
        before = (place[0] - self.strategy.turns, place[1])
        if not there or len(there) < quorum or (before[0] >= self.applied and before not in self.merged):
            return []
        since = self._quorum_at.setdefault(place, now)
        if len(there) == everyone or now >= since + self.strategy.grace_s:
            return self._merge(place) + self._merge_if_complete((place[0] + self.strategy.turns, place[1]), now)
        return [Wake(since + self.strategy.grace_s)] if since == now else []

    def _merge(self, place: Place) -> list[Instruction]:
        at, (round, fragment) = self.at, place
        there = self.collected.pop(place)
        del self._quorum_at[place]
        members = tuple(sorted(there))
        parts = tuple(there[region] for region in members)
        last = min((part.last for part in parts if part.last is not None), default=None)
        samples = sum(part.samples for part in parts)
        made = tuple(made for part in parts for made in part.made)
        merged = Update(Kind.MERGED, at.view.epoch, at.region, round, fragment, samples, last, members, made)
        self.merged[place] = merged
        return [Merge(merged, parts), *(Send(merged, other) for other in at.view.others(at.region))]

    # Views.

    def _change_view(self, view: View, now: float) -> list[Instruction]:
        """Say how far this region is, and hear how far the others are, before anything is merged in the new view.

        Contributions that no merge is known to have taken are sent again, so a round whose owner was lost is taken again.
        """
        at = self.at
        out: list[Instruction] = []
        while self.applied < at.round and self._is_here(self.applied):
            out += self._apply()
        stale = [part for there in self.collected.values() for part in there.values() if part.origin != at.region]
        stale += [*self.merged.values(), *([self.state] if self.state else [])]
        if self.full is not None:
            self._interrupted = True
            out += self.full.abandon()
        out += [Discard(update, "the view changed") for update in stale]
        self.collected.clear()
        self.merged.clear()
        self._quorum_at.clear()
        at.view, self.state, self.full, self.fulls = view, None, None, 0
        at.over = False
        self.waiting_for = dict.fromkeys(view.regions)
        self.waiting_for[at.region] = (self.lineage, self.applied)
        out += [ViewBegins(view), *at.hold(f"view {view.epoch}: finding out who is ahead")]
        hello = Update(Kind.HELLO, view.epoch, at.region, self.applied, lineage=self.lineage)
        out += [Send(hello, other) for other in view.others(at.region)]
        early, self.early = self.early, []
        for update in early:
            out += self._received(update, now)
        return out + self._catch_up(now) if self.waiting_for else out

    def _catch_up(self, now: float) -> list[Instruction]:
        """Once all have said where they are: send the furthest's state to those behind, or take it, and go on."""
        at, heard = self.at, [said for said in self.waiting_for.values() if said is not None]
        if len(heard) < len(at.view.regions):
            return []
        best = max(heard)
        if self.waiting_for[at.region] != best:
            return self._adopt(self.state, now) if self.state else []
        behind = [region for region in at.view.others(at.region) if self.waiting_for[region] != best]
        first = min(region for region, said in self.waiting_for.items() if said == best)
        state = Update(Kind.STATE, at.view.epoch, at.region, self.applied, last=at.last)
        out: list[Instruction] = [Send(state, other) for other in behind] if first == at.region else []
        for place, old in sorted(self.mine.items()):
            new = replace(old, epoch=at.view.epoch)
            self.mine[place] = new
            out.append(Readdress(old, new))
            if place not in self.merged:
                out += self._deliver(new)
        return out + self._up_to_date(now)

    def _adopt(self, state: Update, now: float) -> list[Instruction]:
        """Go on from a peer's state. What this region had contributed and not seen merged is void: a merge may have taken it."""
        at = self.at
        out: list[Instruction] = [Discard(update, "the view went on from a peer's state") for update in self.mine.values()]
        self.mine.clear()
        self.returned.clear()
        self.applied = state.round
        at.start_over(state.round)
        at.end_before(state.last)
        return [*out, Adopt(state), *self._up_to_date(now)]

    def _up_to_date(self, now: float) -> list[Instruction]:
        self.waiting_for, self.state, self.lineage = {}, None, self.at.view.epoch
        self.at.fresh = False
        past = [self.merged.pop(place) for place in list(self.merged) if place[0] < self.applied]
        past += [part for place in list(self.collected) if place[0] < self.applied for part in self.collected.pop(place).values()]
        out: list[Instruction] = [Discard(update, "already merged") for update in past]
        if self._interrupted:
            self._interrupted = False
            return out + self._merge_fully()
        return [*out, *self._merge_all(now), *self._advance(now)]

    def _is_past(self, round: int) -> bool:
        """Not known before this region knows whose state the view goes on from."""
        return round < self.applied and not self.waiting_for

    # The full merge at the end.

    def _merge_fully(self) -> list[Instruction]:
        at = self.at
        at.over = False
        self.full = FullMerge(at, self.fulls)
        out = [*at.hold("full merge"), *self.full.begin()]
        early, self.early = self.early, []
        for update in early:
            out += self.full.received(update)
        return self._after_full(out)

    def _after_full(self, out: list[Instruction]) -> list[Instruction]:
        if self.full is None or self.full.agreed is None:
            return out
        self.full, self.fulls = None, self.fulls + 1
        return out + self.at.finish()
