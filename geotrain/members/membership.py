"""Membership: regions are lost and come back while the others train. Who notices, what is told to whom, and where each goes on."""

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from geotrain.checkpoint import Manifest, StoredPart
from geotrain.errors import (
    BadCheckpoint,
    CannotListen,
    CheckpointUnreadable,
    ClusterError,
    ClusterUnreachable,
    GeotrainError,
    ModelMismatch,
    NobodyGoesOn,
    PeerUnreachable,
    Stopped,
    WorkerLeaves,
)
from geotrain.job import JobSpec
from geotrain.members.commits import Commits
from geotrain.members.links import Links
from geotrain.members.roster import Roster
from geotrain.members.standstill import Standstill
from geotrain.members.tally import Tally
from geotrain.partition.orders import Directory, Place, SeatOrder, SeatTaken
from geotrain.partition.partition import Control, Partition
from geotrain.plan.planner import Plan
from geotrain.report.board import Board
from geotrain.report.folder import RunFolder
from geotrain.sync.messages import View

REPLACED_S = 3.0
"""How long a cluster gets to replace a worker before the region goes on with those that are left."""
POLL_S = 0.02
AGAIN_S = 1.0
"""Between two attempts to bring a region back."""

SETTLED_S = 2.0
"""How long the others get to tell what they hold of a region that is lost, beside an inner step."""

AWAY = (ClusterError, CheckpointUnreadable, CannotListen)
"""What a region may come back from; a port may still be held by the process that was lost."""

MakeOrder = Callable[..., SeatOrder]
"""Called with (region, rank, world, rendezvous, view, restore, joins, place)."""


class Membership:
    """The regions of a run while it trains. Methods with a region block; each is called from that region's thread."""

    def __init__(
        self,
        job: JobSpec,
        plan: Plan,
        view: View,
        control: Control,
        board: Board,
        folder: RunFolder,
        partitions: Mapping[str, Partition],
        commits: Commits,
        rolled_back: Callable[[Manifest | None], int],
    ) -> None:
        """`rolled_back`: called when nobody is left, with the checkpoint from which all go on; returns its round."""
        self.job, self.plan, self.control, self.board, self.folder, self.partitions = job, plan, control, board, folder, partitions
        self.commits, self.rolled_back = commits, rolled_back
        self.roster = Roster(control.run, view, job.quorum_of(len(view.regions)))
        self.tally = Tally()
        self.links = Links(job, partitions, folder, lambda: self.roster.view, plan.give_up_s)
        self.standstill = Standstill(plan.stands_still_after_s)
        self._stands_still: dict[str, NobodyGoesOn] = {}
        """Regions that were told to end for that."""
        self._stood_still_at = -1
        """The checkpoint to which the run went back for that."""
        self.for_good = False
        """It stood still once more before another was made."""
        self._first: SeatTaken | None = None
        """Whose model all others must have."""
        self._belong = set(view.regions)
        self._ready: dict[str, tuple[SeatTaken, Place | None]] = {}
        """Regions whose seat was there when the segment was over already, and the place for which it was taken: they come in with the
        next. Where a model takes longer to build than a segment lasts they would never come back otherwise."""
        self._in_segment: set[str] = set()
        """Regions that have entered a segment, and not ended it."""
        self._behind: set[str] = set()
        """Regions that came in and have not shown yet that they were brought up to date."""
        self._lock = threading.RLock()
        """Of who is in, and where they are."""
        self._seating = threading.Lock()
        """One region comes back at a time."""

    @property
    def manifest(self) -> Manifest | None:
        """The last that was committed."""
        return self.commits.last

    @property
    def present(self) -> tuple[str, ...]:
        """The regions that are in."""
        return self.roster.view.regions

    # The beginning.

    def introduce(self, seats: Sequence[SeatTaken], in_every_region: Callable[..., list[Any]], round: int) -> None:
        """All that have a seat begin: with one model, and it is settled how each leader reaches the others. Raises ModelMismatch."""
        for other in seats[1:]:
            check_same_model(seats[0], other, values=self.manifest is None)
        self._first = next(iter(seats), None)
        if self.manifest is not None and {seat.region for seat in seats} != set(self.present):
            self.tally = Tally.of(self.folder, self.manifest.round)  # who has no seat will take one later
        self.links.introduce(seats, in_every_region)
        for seat in seats:
            self._seated(seat)
        if self.manifest is not None:
            self._behind |= {name for name in self.present if (part := self.manifest.part(name)) is None or part.round != round}
            if self._behind:
                self.roster.begin_again()
        self.folder.flush()

    def _seated(self, seat: SeatTaken) -> None:
        self.tally.seated(seat.region, seat.life, seat.cursor, seat.round)
        workers = len(seat.cursor["used"])
        self.folder.event("seated", region=seat.region, round=seat.round, life=seat.life, workers=workers, cursor=seat.cursor)

    # A segment.

    def enter(self, region: str, ticket: int, make_order: MakeOrder) -> tuple[View, Directory] | None:
        """The view in which a region trains now, bringing it back first where it was lost; None: the others ended the segment without it.

        Raises QuorumLost, Stopped.
        """
        while True:
            if region not in self._belong:
                return None
            if region not in self.roster.view.regions:
                self._bring_back(region, ticket, make_order)
            if not self._in_segment and not self.roster.has_ended(region, ticket):
                # what has begun is brought to its end, and checkpointed, below the quorum too
                self.roster.wait_for_quorum(ticket, lambda: self._check_end(ticket), self.job.elastic.give_up_after_s)
            if self.roster.over(ticket):
                self._in_segment.discard(region)
                return None
            with self._lock:
                if region in self.roster.view.regions:
                    self._in_segment.add(region)
                    return self.roster.view, self.links.directory

    def _check_end(self, ticket: int) -> None:
        """While regions are waited for: below the quorum, with nothing under way, there is nothing to drain. Raises Stopped."""
        if self.roster.over(ticket):
            return
        drained = self.control.stop.is_set() and not self.roster.enough and not self._in_segment
        if self.control.abort.is_set() or drained:
            raise Stopped(self.control.run)

    def heard(self, region: str, message: Mapping[str, Any]) -> None:
        """What a leader told."""
        rounds, event = message.get("rounds", ()), message.get("event", {})
        is_in = self.tally.is_in(region, message["life"])
        if is_in and event.get("event") == "healed":
            self.tally.healed(region, event["by"], event["round"])
        if is_in and rounds and region in self._behind:
            self._behind.discard(region)
            self.tally.came_in(region)
        self.tally.heard(region, message["life"], rounds, message.get("settled", {}), message.get("held", ()))
        self._write_told_by_others()
        if not is_in:
            return  # a process that was given up
        if "epoch" in message:
            self.tally.told(region, math.inf if message["closing"] else message["epoch"])
        if "silent" in message:
            self.links.heard(region, message["silent"])
        if "waits_for" in message:
            self._waits(region, message["waits_for"])

    def _waits(self, region: str, what: str | None) -> None:
        """It waits for something, or does not; when all do for too long they go on from the last checkpoint."""
        present = self.present
        if (found := self.standstill.heard(region, what, present)) is None:
            return
        why = "; ".join(f"{name}: {waits_for}" for name, waits_for in found.items())
        self.folder.event("standstill", waits_for=found)
        back_to = self.manifest.round if self.manifest else 0
        self.for_good, self._stood_still_at = back_to == self._stood_still_at, back_to
        self._stands_still.update({other: NobodyGoesOn(other, self.standstill.after_s, why) for other in present})
        for other in present:
            self.partitions[other].tell_abort()

    def why_told_to_end(self, region: str) -> GeotrainError | None:
        """What is wrong with a region whose leader was told to end while the run goes on."""
        stands_still = self._stands_still.pop(region, None)
        return self.links.why_cut_off(region) or (stands_still if region in self.present else None)

    def checkpointed(self) -> None:
        """The run goes back no further than to the last checkpoint."""
        if self.manifest is not None:
            self.tally.checkpointed(self.manifest.round)

    def close(self) -> None:
        """Nobody is told to end any more: the run ends, or all take their seats anew."""
        self.links.close()

    def join(self) -> None:
        """Once the clusters are closed, which ends what waits for them."""
        self.links.join()

    def end(self, region: str, ticket: int, view: View) -> bool:
        """At a segment's end; False: the view has changed, and the region must enter again."""
        self._behind.discard(region)
        self._waits(region, "the others to end the segment")
        over = self.roster.end(region, ticket, view.epoch, self.control.abort)
        self.standstill.goes_on(region)
        if over:
            self._in_segment.discard(region)
        return over

    def lost(self, region: str, error: GeotrainError, round: int) -> None:
        """Its workers, or its cluster, are gone: the others go on in a view without it."""
        self.board.status(region, "lost")
        self.commits.lost(region)
        self.checkpointed()
        self._in_segment.discard(region)
        with self._lock:
            before = self.present
            view = self.roster.lose(region)
            self.tally.lost(region, view.epoch, round)
            self.links.left(region, before, cut_off=isinstance(error, PeerUnreachable))
            self._behind.discard(region)
            self._write_lost(region, error.message)
            if set(view.regions) <= self._behind:  # nobody is left who could bring them up to date
                for other in view.regions:
                    self._behind.discard(other)
                    self._in_segment.discard(other)
                    self.links.forget(other)
                    self.partitions[other].tell_abort()
                    self.commits.lost(other)
                    view = self.roster.lose(other)
                    self.tally.lost(other, view.epoch, round)
                    self._write_lost(other, f"{region} was to bring it up to date")
            self._tell(view)
            if not view.regions:
                self.commits.settle(lambda: None)  # all that is still to come is the manifest
                self.checkpointed()
                self._ready.clear()
                back_to = self.rolled_back(self.manifest)
                self.tally.back_to(back_to)
                self.folder.event("rolled_back", round=back_to, why="no region was left that holds what came later")
            elif not self.roster.enough:
                self.control.turn.set()  # the segment ends early, with a checkpoint
        self.partitions[region].abandon()

    def _write_lost(self, region: str, why: str) -> None:
        self.folder.event("lost", region=region, message=why, held_of_absent=self.tally.held_of_absent())
        self._write_told_by_others()

    def _write_told_by_others(self) -> None:
        """Rounds that a leader made and was lost before it told of them are written down by the word of those who hold them."""
        for made in self.tally.told_by_others():
            self.folder.round_by_others(made)

    def part_with(self, region: str) -> None:
        """It leaves for good, between two segments."""
        with self._lock:
            self._belong.discard(region)
            self.roster.quorum = self.job.quorum_of(len(self._belong))
            view = self.roster.lose(region)
            self.links.forget(region)
            self._tell(view)

    def short_of_workers(self) -> list[str]:
        """Regions that go on with fewer workers than planned, and could have more by now."""
        found = []
        for region in self.present:
            there, planned = len(self.partitions[region].workers), self.plan.region(region).workers
            if there < planned and self.partitions[region].spare():
                found.append(region)
        return found

    def let_go(self, region: str, workers: Collection[str], make_order: MakeOrder) -> None:
        """Between two segments: workers whose machines are taken away leave. Where no other is there the region is away until one is."""
        assert self.manifest is not None
        others = self.partitions[region].let_go(workers)
        self.folder.event("worker_left", region=region, workers=sorted(workers))
        if others:
            self.take_in_workers(region, make_order)
        else:
            self.lost(region, WorkerLeaves(region, ", ".join(sorted(workers))), self.manifest.round)

    def take_in_workers(self, region: str, make_order: MakeOrder) -> None:
        """Between two segments: the workers that are there now get a seat. The region begins the next from its checkpoint."""
        assert self.manifest is not None
        self.board.status(region, "seating its workers anew")
        try:
            self.partitions[region].regroup(self.plan.region(region).workers, 0.0)
            alone = len(self.present) == 1
            with self._seating:
                view = self.roster.begin_again()
                taken = self._seat_with(self.manifest.part(region), region, make_order, view, not alone, None)
                with self._lock:
                    self.links.came(region, taken.wan)
                    self._seated(taken)
                    self._tell(view)
        except AWAY as error:
            self.lost(region, error, self.manifest.round)

    def _tell(self, view: View) -> None:
        self.standstill.changed()
        self.links.settle(view)
        self.folder.event("view", epoch=view.epoch, regions=view.regions, owners=view.owners, quorum=self.roster.quorum)
        self.board.enter(self.stage)
        for region in view.regions:
            self.partitions[region].tell_view(view, self.links.directory)
        self.folder.flush_soon()

    @property
    def stage(self) -> str:
        """What the run is doing, in words."""
        away = sorted(self._belong - set(self.present))
        if not self.roster.enough:
            return f"recovering: waiting for {', '.join(away)}"
        return f"training, degraded: without {', '.join(away)}" if away else "training"

    def _bring_back(self, region: str, ticket: int, make_order: MakeOrder) -> None:
        """Again and again until it has a seat, or the others have ended the segment. Raises QuorumLost, Stopped."""
        unreachable = False
        while not self.roster.over(ticket):
            self._check_end(ticket)
            self.roster.check_quorum(self.job.elastic.give_up_after_s)
            self.board.status(region, "waiting for a worker")
            try:
                if (others := self.links.cut_off.get(region)) is not None:
                    self.board.status(region, f"cut off from {', '.join(others)}")
                    if not self.links.heal(region):
                        self.control.abort.wait(AGAIN_S)
                        continue
                    del self.links.cut_off[region]
                if unreachable:
                    self.partitions[region].reopen(self.plan.region(region).workers)
                    unreachable = False
                if region not in self._ready:
                    self.partitions[region].regroup(self.plan.region(region).workers, REPLACED_S)
                    self.board.status(region, "building the model")
                if self._take_seat_again(region, ticket, make_order) or self.roster.over(ticket):
                    return
            except AWAY as error:
                self.board.status(region, f"lost: {error.message}")
                unreachable = isinstance(error, ClusterUnreachable)
                self.partitions[region].abandon()
            self.control.abort.wait(AGAIN_S)

    def _take_seat_again(self, region: str, ticket: int, make_order: MakeOrder) -> bool:
        """Seat a region's workers and take it in, unless the segment is over by then, or those are gone who could bring it up to date.

        With nobody else in, it goes on from the last checkpoint, if it was there.
        """
        with self._seating:
            self._hear_what_is_held(region)
            alone, part = not self.present, self.manifest.part(region) if self.manifest else None
            if alone and self.manifest is not None and (part is None or part.round != self.manifest.round):
                return False  # another region has what all agreed on
            place = None if alone else self.tally.place(region)
            if alone or (taken := self._seat_ready(region, place)) is None:
                taken = self._seat_with(part, region, make_order, self.roster.with_(region), not alone, place)
                if self._first is not None:
                    check_same_model(self._first, taken, values=False)
            with self._lock:
                if not alone and not self.present:
                    return False
                if (admitted := self.roster.admit(region, ticket)) is None:
                    if not alone:
                        self._ready[region] = taken, place
                    return False
                self.links.came(region, taken.wan)
                if not alone:
                    self._behind.add(region)
                missed = max(0, self.tally.newest() - taken.round)
                self._seated(taken)
                self.folder.event("back", region=region, round=taken.round, missed=missed)
                self._tell(admitted)
        self.board.status(region, "back")
        return True

    def _hear_what_is_held(self, region: str) -> None:
        """Wait, not for long, until the others have told something in a view without it: they take nothing more of its rounds then."""
        until = time.monotonic() + SETTLED_S + max(map(self.plan.step_s, self.present), default=0.0)
        while time.monotonic() < until:
            if self.tally.is_settled(region, [other for other in self.present if other not in self._behind]):
                return
            time.sleep(POLL_S)

    def _seat_ready(self, region: str, place: Place | None) -> SeatTaken | None:
        """The seat that was ready too late for the segment before, if it is still what the region needs."""
        taken, taken_for = self._ready.pop(region, (None, None))
        return taken if taken is not None and taken_for == place and self.partitions[region].workers_are_there() else None

    def _seat_with(
        self, part: StoredPart | None, region: str, make_order: MakeOrder, view: View, joins: bool, place: Place | None
    ) -> SeatTaken:
        try:
            return self._seat(region, make_order, view, part, joins, place)
        except BadCheckpoint as error:
            if not joins:
                raise
            self.folder.event("bad_checkpoint", message=error.message, region=region)
            return self._seat(region, make_order, view, None, True, place)  # the others have what matters

    def _seat(self, region: str, make_order: MakeOrder, view: View, part: StoredPart | None, joins: bool, place: Place | None) -> SeatTaken:
        return self.partitions[region].take_seats(
            lambda rank, world, rendezvous: make_order(region, rank, world, rendezvous, view, part, joins, place)
        )

    def parts_of_absent(self, there: set[str]) -> list[StoredPart]:
        """What the last manifest has of the others."""
        return [part for part in self.manifest.parts if part.region not in there] if self.manifest else []


def check_same_model(first: SeatTaken, other: SeatTaken, *, values: bool) -> None:
    """Raises ModelMismatch where two regions built different models, or, of `values`, begin from other ones."""
    compared = [("shape", first.fingerprint, other.fingerprint), *([("initial values", first.hashes, other.hashes)] if values else [])]
    for what, mine, theirs in compared:
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                detail = f"its {what} differ" if name in mine and name in theirs else "only one of the two has it"
                raise ModelMismatch(other.region, first.region, name, detail)
