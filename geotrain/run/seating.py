"""Seats: all regions take theirs at the beginning, on resume, and anew when another plan holds."""

import time
from collections.abc import Callable, Mapping, Sequence

import yaml

from geotrain import checkpoint
from geotrain.checkpoint import Manifest, StoredPart
from geotrain.errors import (
    BadCheckpoint,
    ClusterTooSmall,
    GeotrainError,
    JobError,
    ModelMismatch,
    Stopped,
)
from geotrain.members.membership import AWAY, check_same_model
from geotrain.members.tally import Tally
from geotrain.partition.orders import Place, SeatOrder, SeatTaken
from geotrain.run.placing import Placing
from geotrain.stores import patiently
from geotrain.sync.messages import View
from geotrain.sync.strategy import strategy_of

LEADERS_WAIT = 5.0
"""Times the plan's give_up_s: by then the control plane has decided who goes on without whom."""


class Seating(Placing):
    """A run with a plan, whose workers take their seats."""

    def provision(self, region: str) -> SeatTaken | None:
        """Scale a region's cluster to the plan and seat its workers.

        None, in mid-run: its workers are lost at the moment, or it is a newcomer that cannot take its seat. Raises ClusterError, TaskError.
        """
        try:
            return self._seat(region)
        except Stopped:
            raise
        except GeotrainError as error:
            if not self.seats_change or not (region in self._coming or isinstance(error, AWAY)):
                raise
            self._unseated[region] = error
            return None

    def _seat(self, region: str) -> SeatTaken:
        assert self.plan is not None
        self.board.enter("scaling clusters and building the model")
        partition = self.partitions.wait(region)
        workers = self.plan.region(region).workers
        self.board.status(region, f"waiting for {workers} worker{'s' * (workers > 1)}")
        try:
            partition.scale(workers)
        except ClusterTooSmall:
            if not self.seats_change and not self.resumed:
                raise
            partition.regroup(workers, 0.0)  # it goes on with those that it has, and takes in more when they come
        self.board.status(region, "building the model")
        view, part = self.membership.roster.view, self.resumed.part(region) if self.resumed else None
        late = self.resumed is not None and (part is None or part.round != self.round)
        place = Tally.of(self.folder, self.round).place(region) if late else None
        taken = partition.take_seats(lambda rank, world, at: self._seat_order(region, rank, world, at, view, part, late, place))
        self.board.status(region, "ready")
        return taken

    def _seat_order(
        self,
        region: str,
        rank: int,
        world: int,
        rendezvous: str | None,
        view: View,
        restore: StoredPart | None,
        joins: bool,
        place: Place | None,
    ) -> SeatOrder:
        assert self.plan is not None
        train, held_out = self.inventory[region]
        return SeatOrder(
            run=self.id,
            lease=self.charge.number,
            job=self.job,
            region=region,
            rank=rank,
            world=world,
            rendezvous=rendezvous,
            train=train,
            eval=held_out,
            view=view,
            rounds_per_epoch=self.plan.region(region).rounds_per_epoch,
            pace=self.plan.change_at(self.round),
            chosen=self.plan.chosen,
            shares=tuple(self.plan.shares.values()),
            bits=self.plan.bits.get(region),
            token=self._token,
            life=time.time_ns(),
            give_up_s=LEADERS_WAIT * self.plan.give_up_s,
            warm_start=self.warm_start.url if self.warm_start else None,
            restore=restore,
            rewind=not joins and self._all_continue(restore),
            joins=joins,
            place=place,
        )

    def _all_continue(self, part: StoredPart | None) -> bool:
        """Every region goes on to train from its part of one checkpoint, as this. Not with bits that adapt: merges are coded in them."""
        assert self.plan is not None
        if self.resumed is None or part is None or self.plan.bits or self.trained:
            return False
        parts = [self.resumed.part(region) for region in self.regions]
        return part in parts and all(one is not None and one.round == self.resumed.round for one in parts)

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train after the checkpoint that the run continues from. Raises JobError."""
        assert self.plan is not None
        return self.resumed is not None and (self.resumed.round >= self.plan.rounds or self._goal_reached(self.resumed.metrics))

    def _goal_reached(self, metrics: Mapping[str, float]) -> bool:
        goal = self.job.train.until
        if goal is None:
            return False
        if goal.metric not in metrics:
            raise JobError(f"train.until: the task evaluates no '{goal.metric}'; it has: {', '.join(sorted(metrics))}")
        return goal.reached(metrics[goal.metric])

    def seats(self, provision_all: Callable[[], list[SeatTaken | None]]) -> list[SeatTaken | None]:
        """All regions' seats; where a part of the checkpoint turns out to be damaged, as of the one before. Raises BadCheckpoint."""
        while True:
            self._unseated.clear()
            try:
                return provision_all()
            except BadCheckpoint as error:
                if self.resumed is None or not self._fall_back(self.resumed, error):
                    raise

    def _fall_back(self, damaged: Manifest, error: BadCheckpoint) -> bool:
        """To the checkpoint before; False when there is none. Raises Stopped."""
        self._go_on()
        patiently(lambda: checkpoint.set_aside(self.folder.url, damaged.round), self.control.abort)
        before = patiently(lambda: checkpoint.latest(self.folder.url), self.control.abort)
        self.folder.event("bad_checkpoint", message=error.message, round=damaged.round, back_to=before and before.round)
        if before is None:
            return False
        for name in list(self._coming):
            self._turn_away(name, "a checkpoint turned out to be damaged meanwhile: ask again")
        self._membership = None
        self._take_up(before)
        self._write_plan()
        return True

    def introduce(self, seats: Sequence[SeatTaken | None]) -> None:
        """All regions must begin with one model; then it is settled how each leader reaches the others.

        A region without a seat is lost from the beginning; a newcomer without one does not come in. Raises ModelMismatch.
        """
        unseated, self._unseated = self._unseated, {}
        there = [seat for seat in seats if seat is not None]
        for seat in [seat for seat in there if seat.region in self._coming]:
            try:
                for other in there:
                    check_same_model(other, seat, values=False)
            except ModelMismatch as differs:
                unseated[seat.region] = differs
                there.remove(seat)
        self.membership.introduce(there, self.in_every_region, self.round)
        if self.seats_change:
            self._settle_newcomers(unseated)
            self.seats_change = False
        for region, error in unseated.items():
            if region in self.regions:
                self.membership.lost(region, error, self.round)
        self.folder.flush(must=False)

    def _settle_newcomers(self, unseated: Mapping[str, GeotrainError]) -> None:
        """All have taken their seats anew: from here on who resumes the run needs the new plan, and who has come in."""
        for region in list(self._coming):
            if (error := unseated.get(region)) is not None:
                self.membership.part_with(region)
                self._turn_away(region, error.message)
        self._write_plan()
        if self._coming:
            self._write_inventory()
            self.folder.write("job.yaml", yaml.safe_dump(self.job.to_dict(), sort_keys=False))
        for region in self._coming:
            self.folder.event("joined", region=region, round=self.round)
        self._coming.clear()

    def _turn_away(self, region: str, why: str) -> None:
        """A newcomer that does not come in after all."""
        assert self.plan is not None
        self._coming.remove(region)
        self.job = self.job.without_region(region)
        self.plan = self.plan.of([spec.name for spec in self.job.regions])
        self.accounts.job, self.strategy = self.job, strategy_of(self.job.sync, len(self.job.regions))
        del self.inventory[region]
        self.replanner.anew = True
        self.control.turn.set()
        self.folder.event("not_added", region=region, message=why)
        self.board.status(region, "not added")
        self.partitions[region].leave()
        self.partitions[region].cluster.close()

    def _take_up_here(self) -> None:
        """All take their seats anew, as of the checkpoint that was just made; the new plan is written once they have."""
        self.membership.close()
        self.accounts.seats_anew()
        self.resumed, self._membership, self.seats_change = self.commits.last, None, True
        noticed, self._noticed = self._noticed, {}
        for region in self.regions:
            if region in noticed:
                self.partitions[region].let_go(noticed[region])
                self.folder.event("worker_left", region=region, workers=sorted(noticed[region]))
            self.partitions[region].vacate()
