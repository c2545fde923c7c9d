"""Segment after segment, and what changes between two of them."""

import time
from collections.abc import Iterator, Mapping, Sequence

from geotrain.checkpoint import Manifest
from geotrain.errors import (
    ClusterError,
    DeviceFailed,
    Diverged,
    GeotrainError,
    NobodyGoesOn,
    NonFiniteLoss,
    StateDamaged,
    Stopped,
    WorkerLost,
)
from geotrain.members.replanner import Newcomer, workers_of
from geotrain.metrics import add_sums, means
from geotrain.partition.orders import SegmentDone, SegmentOrder
from geotrain.partition.partition import WORKERS_CHECK_S
from geotrain.run.seating import Seating
from geotrain.sync.strategy import Merging, strategy_of

MOST_ENDS = 3
"""How often the end of a run is begun, each time with new seats."""


class Training(Seating):
    """A run whose regions have their seats."""

    def segments_left(self) -> Iterator[int]:
        """Numbers of the segments still to train; they count from 1. One that ended early comes again."""
        assert self.plan is not None
        if self.trained:
            return
        while self.round < self.plan.rounds:
            yield self.plan.segment_of(self.round)

    def train(self, region: str, segment: int) -> SegmentDone | None:
        """A region's part of a segment, however often it is lost meanwhile; None when the others ended it without this region.

        Raises TaskError, WanError, StateError, QuorumLost, Stopped.
        """
        assert self.plan is not None
        self.board.enter(self.membership.stage)
        until, ticket = self.plan.segment_end(segment), self._ticket
        while (now := self.membership.enter(region, ticket, self._seat_order)) is not None:
            view, directory = now
            self.board.status(region, "running")
            order = SegmentOrder(segment, ticket, until, self.plan.change_at(self.round), view, directory, self.round, self.folder.url)
            try:
                done = self.partitions[region].train(order, self.plan.hangs_after_s(region))
            except ClusterError as error:
                if isinstance(error, DeviceFailed):
                    self._trust_once_more(region, error)
                self.membership.lost(region, error, self.round)
                continue
            except Stopped:
                if self.control.abort.is_set():
                    raise
                if (why := self.membership.why_told_to_end(region)) is not None:
                    if isinstance(why, NobodyGoesOn) and self.membership.for_good:
                        raise why from None
                    self.membership.lost(region, why, self.round)
                elif region in self.present:
                    silent = WorkerLost(region, self.partitions[region].workers[0], "it heard nothing of this process and gave up")
                    self.membership.lost(region, silent, self.round)
                continue  # it was told to begin again
            except (NonFiniteLoss, StateDamaged) as error:
                self._trust_once_more(region, error)  # a bad machine may be the reason, or an optimizer that has lost its way
                self.membership.lost(region, error, self.round)
                continue
            self.board.status(region, f"segment {segment} done")
            if self.membership.end(region, ticket, view):
                return done
        return None

    def _trust_once_more(self, region: str, error: GeotrainError) -> None:
        """Raises the error where the region has not trained for a whole segment since the last one of its kind."""
        if region in self._spoilt:
            raise error
        self._spoilt.add(region)
        self._spoilt_now.add(region)

    def synchronize(self, segment: int, parts: Sequence[SegmentDone | None]) -> bool:
        """The barrier: agreed, metrics known, a checkpoint under way. True when training is over.

        The checkpoint is committed while the next segment trains; whatever else follows waits for it. Raises Diverged, OutputUnwritable.
        """
        assert self.plan is not None
        done = [part for part in parts if part is not None]
        rounds = {part.round for part in done}
        hashes = {part.region: part.sha256[:12] for part in done}
        if len(rounds) != 1 or (isinstance(self.strategy, Merging) and len(set(hashes.values())) != 1):
            self._roll_back(Diverged(max(rounds), hashes), done)
            return False
        self._diverged = False
        self.round = rounds.pop()
        self.commits.settle(self._check_parts)  # of the segment before: its manifest has the parts of those that are away
        self.membership.checkpointed()
        for part in done:
            self.accounts.segment(part)
        for region, samples in self.membership.tally.rows_made_up().items():
            self.accounts.rows(region, samples)
        self.metrics = means(add_sums([part.metrics for part in sorted(done, key=lambda part: part.region)]))
        self.board.metrics = self.metrics
        manifest = Manifest(
            run=self.id,
            segment=segment,
            round=self.round,
            epoch=self.membership.roster.view.epoch,
            samples=self.accounts.samples,
            parent=self.warm_start.number if self.warm_start else None,
            metrics=self.metrics,
            totals={region: dict(sums) for region, sums in self.accounts.totals.items()},  # as they are now: it is written later
            parts=tuple(self.membership.parts_of_absent({part.region for part in done})),
        )
        absent = self.membership.tally.checkpoints(self.round, [part.region for part in done])
        self.commits.begin(manifest, {part.region: (part.life, part.staging) for part in done}, self._check_parts)
        facts = {"metrics": self.metrics, "hashes": hashes, "samples": manifest.samples, "held_of_absent": absent}
        self.folder.event("segment", segment=segment, round=self.round, stall_s=max(part.stall_s for part in done), **facts)
        self.folder.flush(must=False)
        self._ticket += 1
        self._spoilt -= {part.region for part in done if part.samples} - self._spoilt_now
        self._spoilt_now.clear()
        over = self.round >= self.plan.rounds or self._goal_reached(self.metrics)
        short = [] if over else self.membership.short_of_workers()
        changes = short or self.leaving or self._noticed or self.replanner.waits
        if over or changes or self.control.stop.is_set() or self.control.turn.is_set():
            self._between_segments(short, over=over)
            self.folder.flush(must=False)
        return over

    def _roll_back(self, error: Diverged, parts: Sequence[SegmentDone]) -> None:
        """All take their seats anew, as of the last checkpoint; a second time before another is made the error is raised."""
        if self._diverged:
            raise error
        self._diverged = True
        for part in parts:
            self.accounts.add(part.region, part.traffic)  # for nothing, but it is paid for
        self.commits.settle(self._check_parts)
        self._begin_again(error.message, trained=True)

    def _begin_again(self, why: str, *, trained: bool) -> None:
        """From the last checkpoint, wherever that is. `trained`: something came after it."""
        self._epoch = self.membership.roster.view.epoch + 1
        self._ticket += 1
        self._take_up_here()
        if trained:
            self.folder.event("rolled_back", round=self._rolled_back(self.commits.last), why=why)
            self.folder.flush(must=False)

    def check_stop(self) -> None:
        """Between two segments. Raises Stopped where that is wanted, once what was trained is committed.

        A checkpoint that was lost with a region is made up for by that of another segment, which ends as soon as it can.
        """
        if self.control.stop.is_set():
            self.commits.settle(self._check_parts)
            if (self.commits.last.round if self.commits.last else 0) == self.round or self.seats_change:
                raise Stopped(self.id)

    def _between_segments(self, short: Sequence[str], *, over: bool) -> None:
        """What needs the checkpoint. One that was lost with a region is made up for by the next segment's."""
        self.commits.settle(self._check_parts)
        if self.commits.last is None or self.commits.last.round != self.round:
            return
        self.control.turn.clear()
        for region in sorted(self.leaving & set(self.regions)):
            self._part_with(region)
        if not over and not self.control.stop.is_set():
            self._replan()
        if self.seats_change or over or self.control.stop.is_set():
            return
        noticed, self._noticed = self._noticed, {}
        for region in sorted(noticed.keys() & set(self.present)):
            self.membership.let_go(region, noticed[region], self._seat_order)
        if short := [region for region in short if region in self.present and region not in noticed]:
            self.in_every_region(self.membership.take_in_workers, self._seat_order, regions=short)

    def _check_parts(self) -> None:
        """While a checkpoint is waited for: nobody else looks at the workers then. Raises Stopped."""
        if self.control.abort.is_set():
            raise Stopped(self.id)
        if time.monotonic() - self._looked_at < WORKERS_CHECK_S:
            return
        self._looked_at = time.monotonic()
        for region in self.commits.awaited:
            if not self.partitions[region].leader_is_there():
                self.commits.lost(region)

    def _part_with(self, region: str) -> None:
        """A region leaves in peace: what it learned is in the checkpoint."""
        self.leaving.discard(region)
        if self.present == (region,):
            self.folder.event("stays", region=region, why="no other region is there")
            return
        self.left.add(region)
        self.membership.part_with(region)
        self.folder.event("left", region=region)
        self.board.status(region, "left")
        self.partitions[region].leave()
        self.partitions[region].cluster.close()

    def _replan(self) -> None:
        """For what has turned out since; after the manifest, which an older plan must not contradict."""
        assert self.plan is not None
        if set(self.present) != set(self.regions):
            return  # who is away could take no other seat
        if self.left and self.job.sync.topology == "owners":
            return  # the parts of the model that its owners merge stay as they are
        if (newcomer := self.replanner.newcomer) is not None:
            self._take_in(newcomer)
        trained = {region: self.inventory[region][0] for region in self.regions}
        new_pace = newcomer is not None or self.replanner.anew
        before, self.plan = self.plan, self.replanner.plan_again(self.plan, self.job, trained, self.round, self.accounts.samples, newcomer)
        if self.plan is before:
            return
        self.board.rounds = self.plan.rounds
        workers = {name: [workers_of(before).get(name, 0), count] for name, count in workers_of(self.plan).items()}
        per_hour = [sum(region.usd_per_round for region in plan.regions) / plan.round_s * 3600 for plan in (before, self.plan)]
        changed = {"every": [before.chosen.every, self.plan.chosen.every], "exchange_s": [before.exchange_s, self.plan.exchange_s]}
        changed |= {"workers": {name: both for name, both in workers.items() if both[0] != both[1]}, "usd_per_hour": per_hour}
        self.folder.event("replanned", round=self.round, rounds=self.plan.rounds, **changed)
        if not new_pace and all(was == now for was, now in workers.values()):
            self._write_plan()
            return
        self._epoch = self.membership.roster.view.epoch + 1
        self._take_up_here()

    def end_again(self, error: ClusterError | StateDamaged) -> None:
        """A worker was lost after the last segment: all take their seats anew, as of the last checkpoint.

        Raises the error when the end has been begun `MOST_ENDS` times, and Stopped.
        """
        self._ends += 1
        if self._ends == MOST_ENDS:
            raise error
        self.folder.event("lost_at_end", message=error.message, round=self.round)
        self.in_every_region(lambda region: self.partitions[region].abandon(), regions=self.present)
        last = self.commits.last
        self._begin_again(error.message, trained=last is None or last.round != self.round)
        self.seats_change = next(self.segments_left(), None) is not None  # else all must get their seats, as in a resume
        self._leave_behind()
        self._go_on()

    def _leave_behind(self) -> None:
        """Where nothing is left to train, a region that was away by the end takes no part in it: nothing would bring it up to date."""
        if self.resumed is not None and next(self.segments_left(), None) is None:
            parts = {part.region: part.round for part in self.resumed.parts}
            self.left |= {region for region in self.regions if parts.get(region) != self.round}

    def _take_in(self, newcomer: Newcomer) -> None:
        """A region belongs to the run from here on."""
        name, self.job = newcomer.region, newcomer.job
        self._coming.append(name)
        self.inventory[name] = newcomer.inventory
        self.partitions.take_in(newcomer.partition)
        self.replanner.came_in()
        self.board.add(name)
        self.accounts.job, self.strategy = self.job, strategy_of(self.job.sync, len(self.job.regions))

    @property
    def needs_final_merge(self) -> bool:
        """Some strategies leave every region with a replica of its own."""
        return not self.strategy.ends_equal

    def merge_fully(self, region: str) -> str:
        """Its part of the full merge; the hash of what it then holds."""
        self.board.enter("final merge")
        digest, traffic, seconds = self.partitions[region].merge_fully(self.membership.links.directory)
        self.accounts.add(region, traffic, seconds=seconds)
        return digest

    def merged(self, hashes: Mapping[str, str]) -> None:
        """All have their part of the full merge behind them. Raises Diverged."""
        if len(set(hashes.values())) > 1:
            raise Diverged(self.round, {region: digest[:12] for region, digest in hashes.items()})
