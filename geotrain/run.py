"""Run: one execution of a job as the control plane holds it. Each method is a stage; flows call them in order, through tasks.

Nothing here knows Prefect, and nothing here touches a tensor.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from typing import Any

import yaml

from geotrain import checkpoint, measured, registry
from geotrain.charge import Charge
from geotrain.checkpoint import Manifest, StoredPart
from geotrain.data.inventory import Inventory, check_same_schema
from geotrain.errors import (
    BadCheckpoint,
    ClusterError,
    ClusterTooSmall,
    Diverged,
    GeotrainError,
    JobError,
    ModelMismatch,
    NonFiniteLoss,
    NothingToResume,
    Stopped,
)
from geotrain.job import JobSpec, RegionSpec
from geotrain.members.accounts import Accounts
from geotrain.members.commits import Commits
from geotrain.members.late import commit_late
from geotrain.members.membership import AWAY, Membership, check_same_model
from geotrain.members.replanner import Newcomer, Replanner, workers_of
from geotrain.members.tally import Tally
from geotrain.metrics import add_sums, means
from geotrain.partition.orders import Place, Probed, SeatOrder, SeatTaken, SegmentDone, SegmentOrder
from geotrain.partition.partition import WORKERS_CHECK_S, Control
from geotrain.partition.partitions import Partitions
from geotrain.plan.planner import Plan, UpdateSize, make_plan
from geotrain.plan.power import Offer
from geotrain.report.board import Board
from geotrain.report.folder import RunFolder, new_run_id
from geotrain.report.summary import summarize
from geotrain.stores import STORE_ERRORS
from geotrain.sync.messages import View
from geotrain.sync.strategy import Merging, strategy_of

FLUSH_S = 1.0
LEADERS_WAIT = 5.0
"""Times the plan's give_up_s: by then the control plane has decided who goes on without whom."""


class Run:
    """A context manager: clusters begin to open when it is entered, and are closed whatever happens."""

    def __init__(self, job: JobSpec, folder: RunFolder) -> None:
        self.job, self.folder, self.id = job, folder, folder.run
        self.resumed: Manifest | None = None
        """The checkpoint to go on from."""
        self.left: set[str] = set()
        """Regions that left for good."""
        self.charge = Charge(self.id, folder.url, self._asked)
        self.strategy = strategy_of(job.sync, len(job.regions))
        self.control = Control(self.id)
        self.board = Board(tuple(region.name for region in job.regions))
        self.warm_start: registry.Version | None = None
        self.inventory: dict[str, tuple[Inventory, Inventory | None]] = {}
        self.probed: dict[str, Probed] = {}
        self.partitions = Partitions(job, self.control, self.board, self._heard)
        self.plan: Plan | None = None
        self._membership: Membership | None = None
        self._coming: list[str] = []
        """Regions that are to take their first seat."""
        self._epoch = 0
        """No view is older."""
        self.round = 0
        self.accounts = Accounts(job)
        self.commits = Commits(folder, self.charge.check, job.output.keep, job.judged_by)
        self.commits.failed = self.control.turn.set  # the segment ends early, and says why
        self.replanner = Replanner(job, self.control, folder)
        self.seats_change = False
        """Another plan holds from here on, with other workers or regions: all take their seats anew."""
        self.metrics: dict[str, float] = {}
        self.training = False
        """Between the first segment and the last: a request to stop waits for a checkpoint."""
        self.leaving: set[str] = set()
        """Regions that are to leave at the end of the segment."""
        self._noticed: dict[str, set[str]] = {}
        """Region -> its workers that have been told that their machines are taken away."""
        self._unseated: dict[str, GeotrainError] = {}
        """Regions that got no seat when all took theirs anew, and why."""
        self.published: tuple[registry.Version, str] | None = None
        self.handed_over = False
        """Begun by the command line, which also ends it."""
        self._token = secrets.token_hex(16)
        self._ticket = 1
        self._spoilt: set[str] = set()
        """Regions that came back in this segment from rounds that ended in a NaN."""
        self._flushed_at = self._looked_at = 0.0
        self._closed = False
        self._lock = threading.Lock()

    @classmethod
    def start(cls, job: JobSpec, *, believe: bool = True) -> "Run":
        """A new run, which believes what was measured of the links. Raises OutputUnwritable before anything is started."""
        found = measured.read(job) if believe else None
        job = measured.believed(job, found)
        folder = RunFolder.create(job, new_run_id(job.name))
        if found is not None:
            folder.event("links_measured", by=measured.url_of(job), when=found["at"])
        return cls(job, folder)

    @classmethod
    def resume(cls, folder: RunFolder, told: Callable[[str], None] = lambda words: None, without: Collection[str] = ()) -> "Run":
        """Continue from the newest checkpoint, without some regions, which leave for good.

        `told`: of a wait for another process's sign of life. Raises NothingToResume, RunTaken, JobError.
        """
        if folder.has("summary.json"):
            raise NothingToResume(folder.run, "it is complete")
        run = cls(folder.job(), folder)
        run.charge.take(told)
        try:
            run.left = {event["region"] for event in folder.lines("events.jsonl") if event["event"] == "left"}
            manifest = checkpoint.latest(folder.url)
            manifest = commit_late(folder, manifest, run.regions, agree=isinstance(run.strategy, Merging)) or manifest
            if manifest is None:
                raise NothingToResume(folder.run, "it has no checkpoint yet")
            run._take_up(manifest)
            run._leave_out(without)
        except BaseException:
            run.charge.release()
            raise
        return run

    def _leave_out(self, regions: Collection[str]) -> None:
        if unknown := set(regions) - set(self.regions):
            raise JobError(f"--without {', '.join(sorted(unknown))}: the run has the regions {', '.join(self.regions)}")
        if set(regions) == set(self.regions):
            raise JobError("--without: at least one region must be left")
        assert self.resumed is not None
        if regions and not any(part.round == self.round and part.region not in regions for part in self.resumed.parts):
            raise JobError("--without: no other region was there when the last checkpoint was made, so what it learned would be lost")
        for region in sorted(set(regions)):
            self.left.add(region)
            self.folder.event("left", region=region)

    def open(self) -> "Run":
        """Begin to open the clusters, all at once, and return; who opens a run must enter and leave it."""
        if not self.partitions.begun:
            if not self.charge.held:
                self.charge.take(self.board.enter)
            if self.resumed:
                self.folder.event("resumed", round=self.resumed.round, segment=self.resumed.segment)
            self.partitions.open(self.regions)
        return self

    def __enter__(self) -> "Run":
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.control.abort.set()
        if self._closed:
            return
        self._closed = True
        try:
            self._end(error)
        finally:
            self.charge.release()

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._note_end(error)
        self.commits.close()
        if self._membership is not None:
            self._membership.close()
        self.replanner.close()
        self.partitions.close()
        if self._membership is not None:
            self._membership.join()
        self.folder.flush()

    def _asked(self, what: str, more: Mapping[str, Any]) -> None:
        """What the command line, or the loss of the lease, wants of this process."""
        if what == "drain" and more["region"] in self.regions:
            self.folder.event("asked_to_leave", region=more["region"])
            self.leaving.add(more["region"])
            self.control.turn.set()
        elif what == "add":
            self._asked_to_add(more["region"])
        elif what == "stop" and self.training:
            self.board.enter("stopping: draining the round and writing a checkpoint")
            self.control.stop.set()
        elif what in ("stop", "force", "lost"):
            self.control.abort.set()

    def _asked_to_add(self, region: Mapping[str, Any]) -> None:
        name = str(region.get("name"))
        self.folder.event("asked_to_come", region=name)
        why = "" if self.training else "the run does not train at the moment"
        if self.job.sync.topology == "owners":
            why = "with topology: owners the model would be cut anew: stop the run and begin another from its model"
        try:
            job = self.job.with_region(region)
        except ValueError as error:
            why = str(error)
        if why:
            self.folder.event("not_added", region=name, message=why)
            self.folder.flush(must=False)
            return
        self.replanner.prepare(job, name, dict(self.inventory), self.partitions.make)

    def _note_end(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            self.stopped()
            return
        self.board.enter("failed")
        message = error.message if isinstance(error, GeotrainError) else f"{type(error).__name__}: {error}"
        self.folder.event("failed", message=message, round=self.round)

    def stopped(self) -> None:
        """Note an end on request."""
        self.board.enter("stopped")
        self.folder.event("stopped", round=self.round)

    def look_and_plan(self) -> Plan:
        """The stages before anything is provisioned, without Prefect."""
        self.in_every_region(self.analyze)
        self.compare()
        self.in_every_region(self.probe)
        return self.schedule()

    def in_every_region(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        """Call one of the stages below for all regions at once, or for some, in threads of this process: what flows do through tasks."""
        names = self.regions if regions is None else regions
        with ThreadPoolExecutor(max_workers=len(names)) as threads:
            futures = [threads.submit(stage, name, *args) for name in names]
            for future in as_completed(futures):
                if future.exception() is not None:
                    self.control.abort.set()
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [future.result() for future in futures]

    def _heard(self, region: str, message: Mapping[str, Any]) -> None:
        self.board.heard(region, message)
        for record in message.get("rounds", ()):
            self.folder.round(record)
        if self._membership is not None:
            self._membership.heard(region, message)
        self.commits.heard(region, message)
        if (worker := message.get("notice")) is not None:
            self.folder.event("notice", region=region, worker=worker)
            self._noticed.setdefault(region, set()).add(worker)
            self.control.turn.set()
        if self.training and self.plan is not None and region in self.regions:
            self.replanner.heard(region, message, self.job, self.plan)
        if "event" in message:
            event = dict(message["event"])
            self.folder.event(event.pop("event"), region=region, **event)
        if self.folder.appends and time.monotonic() - self._flushed_at > FLUSH_S:
            self._flushed_at = time.monotonic()
            self.folder.flush(must=False)

    # The stages, in the order in which a flow calls them.

    def analyze(self, region: str) -> Inventory:
        """What data a region has. A resumed run keeps what it knew."""
        self.board.enter("waiting for the clusters, then looking at the data")
        partition = self.partitions.wait(region)
        if self.resumed:
            partition.cluster.ship(self.job.code)
            return self.inventory[region][0]
        self.board.status(region, "reading footers")
        self.inventory[region] = partition.survey()
        self.board.status(region, "data known")
        return self.inventory[region][0]

    def compare(self) -> None:
        """The regions' data must have one schema. Raises SchemaMismatch."""
        for split in (0, 1):
            if found := [inventory for region in self.job.regions if (inventory := self.inventory[region.name][split])]:
                check_same_schema(found)

    def probe(self, region: str) -> Probed | None:
        """How fast one worker of a region is on this task; finds what is wrong with the task. A resumed run knows already."""
        self.board.enter("measuring the workers' speed on this task")
        if self.resumed:
            return None
        self.board.status(region, "probing its speed")
        self.probed[region] = self.partitions.wait(region).probe(self.inventory[region][0], self.folder.url)
        self.board.status(region, "probed")
        return self.probed[region]

    def schedule(self) -> Plan:
        """Decide who does how much; a resumed run keeps its plan."""
        self.board.enter("planning")
        names = [region.name for region in self.job.regions]
        if self.plan is None:
            offers = {region.name: self._offers(region) for region in self.job.regions}
            probed = self.probed.values()
            update = UpdateSize(max(p.payload_bytes for p in probed), max(p.work_s for p in probed), max(p.full_bytes for p in probed))
            self.plan = make_plan(self.job, {name: self.inventory[name][0] for name in names}, offers, update)
            self._write_plan()
            self._write_inventory()
        self.board.rounds = self.plan.rounds
        return self.plan

    def _offers(self, region: RegionSpec) -> list[Offer]:
        measured = self.probed[region.name].samples_per_s
        return [Offer(d.kind, d.count, d.usd_per_hour, d.samples_per_s or measured) for d in region.devices]

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
            joins=joins,
            place=place,
        )

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
        """To the checkpoint before; False when there is none."""
        checkpoint.set_aside(self.folder.url, damaged.round)
        before = checkpoint.latest(self.folder.url)
        self.folder.event("bad_checkpoint", message=error.message, round=damaged.round, back_to=before and before.round)
        if before is None:
            return False
        self.control.abort.clear()
        for name in list(self._coming):
            self._turn_away(name, "a checkpoint turned out to be damaged meanwhile: ask again")
        self._membership = None
        self._take_up(before)
        self._write_plan()
        return True

    def _take_up(self, manifest: Manifest) -> None:
        """Be where a checkpoint was made."""
        self.resumed, self.round, self.commits.last = manifest, manifest.round, manifest
        self.accounts.totals = {region: dict(totals) for region, totals in manifest.totals.items()}
        plan = Plan.from_dict(self.folder.read_json("plan.json")).as_of(manifest.round)
        self.plan = plan.of([region.name for region in self.job.regions])
        self.inventory = _inventories(self.folder.read_json("inventory.json"))
        if manifest.parent is not None and self.job.registry is not None:
            self.warm_start = registry.version(self.job.registry.url, self.job.registry.model, manifest.parent)

    @property
    def membership(self) -> Membership:
        """Who is in, once there is a plan."""
        assert self.plan is not None
        with self._lock:
            if self._membership is None:
                self._epoch = max(self._epoch, self.resumed.epoch + 1 if self.resumed else 0)
                view = self.plan.view(self._epoch, without=self.left)
                shared = self.control, self.board, self.folder, self.partitions, self.commits
                self._membership = Membership(self.job, self.plan, view, *shared, self._rolled_back)
            return self._membership

    def _write_plan(self) -> None:
        assert self.plan is not None
        self.folder.write_json("plan.json", self.plan.to_dict())

    def _rolled_back(self, manifest: Manifest | None) -> int:
        self.round = manifest.round if manifest else 0
        with contextlib.suppress(*STORE_ERRORS):
            checkpoint.forget_late(self.folder.url, self.round + 1)
        self.accounts.back_to(manifest.totals if manifest else {})
        return self.round

    @property
    def regions(self) -> tuple[str, ...]:
        """Those that belong to the run, in the order of the job."""
        return tuple(region.name for region in self.job.regions if region.name not in self.left)

    @property
    def present(self) -> tuple[str, ...]:
        """The regions that are in, in the order of the job."""
        return tuple(region for region in self.regions if region in self.membership.present)

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
        self.folder.event("not_added", region=region, message=why)
        self.board.status(region, "not added")
        self.partitions[region].leave()
        self.partitions[region].cluster.close()

    def segments_left(self) -> Iterator[int]:
        """Numbers of the segments still to train; they count from 1. One that ended early comes again."""
        assert self.plan is not None
        if self.resumed and self._goal_reached(self.resumed.metrics):
            return
        while self.round < self.plan.rounds:
            yield self.plan.segment_of(self.round)

    @property
    def segments(self) -> int:
        return self.plan.segments if self.plan else 0

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
                self.membership.lost(region, error, self.round)
                continue
            except Stopped:
                if self.control.abort.is_set():
                    raise
                if (cut_off := self.membership.cut_off(region)) is not None:
                    self.membership.lost(region, cut_off, self.round)
                elif region in self.present:
                    raise
                continue  # it was told to begin again
            except NonFiniteLoss as error:
                if region in self._spoilt:
                    raise
                self._spoilt.add(region)  # once: a bad machine may be the reason, or an optimizer that has lost its way
                self.membership.lost(region, error, self.round)
                continue
            self.board.status(region, f"segment {segment} done")
            if self.membership.end(region, ticket, view):
                return done
        return None

    def synchronize(self, segment: int, parts: Sequence[SegmentDone | None]) -> bool:
        """The barrier: agreed, metrics known, a checkpoint under way. True when training is over.

        The checkpoint is committed while the next segment trains; whatever else follows waits for it. Raises Diverged, OutputUnwritable.
        """
        assert self.plan is not None
        done = [part for part in parts if part is not None]
        rounds = {part.round for part in done}
        hashes = {part.region: part.sha256[:12] for part in done}
        if len(rounds) != 1 or (isinstance(self.strategy, Merging) and len(set(hashes.values())) != 1):
            raise Diverged(max(rounds), hashes)
        self.round = rounds.pop()
        self.commits.settle(self._check_parts)  # of the segment before: its manifest has the parts of those that are away
        for part in done:
            self.accounts.segment(part)
        for region, samples in self.membership.rows_made_up().items():
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
        self.commits.begin(manifest, {part.region: (part.life, part.staging) for part in done}, self._check_parts)
        facts = {"metrics": self.metrics, "hashes": hashes, "samples": manifest.samples}
        self.folder.event("segment", segment=segment, round=self.round, stall_s=max(part.stall_s for part in done), **facts)
        self.folder.flush(must=False)
        self._ticket += 1
        self._spoilt.clear()
        over = self.round >= self.plan.rounds or self._goal_reached(self.metrics)
        short = [] if over else self.membership.short_of_workers()
        changes = short or self.leaving or self._noticed or self.replanner.waits
        if over or changes or self.control.stop.is_set() or self.control.turn.is_set():
            self._between_segments(short, over=over)
            self.folder.flush(must=False)
        return over

    def check_stop(self) -> None:
        """Between two segments. Raises Stopped where that is wanted, once the last checkpoint is committed."""
        if self.control.stop.is_set():
            self.commits.settle(self._check_parts)
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
        before, self.plan = self.plan, self.replanner.plan_again(self.plan, self.job, trained, self.round, self.accounts.samples, newcomer)
        if self.plan is before:
            return
        self.board.rounds = self.plan.rounds
        workers = {name: [workers_of(before).get(name, 0), count] for name, count in workers_of(self.plan).items()}
        per_hour = [sum(region.usd_per_round for region in plan.regions) / plan.round_s * 3600 for plan in (before, self.plan)]
        changed = {"every": [before.chosen.every, self.plan.chosen.every], "exchange_s": [before.exchange_s, self.plan.exchange_s]}
        changed |= {"workers": {name: both for name, both in workers.items() if both[0] != both[1]}, "usd_per_hour": per_hour}
        self.folder.event("replanned", round=self.round, rounds=self.plan.rounds, **changed)
        if newcomer is None and all(was == now for was, now in workers.values()):
            self._write_plan()
            return
        self._epoch = self.membership.roster.view.epoch + 1
        self._take_up_here()

    def _take_in(self, newcomer: Newcomer) -> None:
        """A region belongs to the run from here on."""
        name, self.job = newcomer.region, newcomer.job
        self._coming.append(name)
        self.inventory[name] = newcomer.inventory
        self.partitions.take_in(newcomer.partition)
        self.replanner.came_in()
        self.board.add(name)
        self.accounts.job, self.strategy = self.job, strategy_of(self.job.sync, len(self.job.regions))

    def _write_inventory(self) -> None:
        self.folder.write_json("inventory.json", {n: [i and i.to_dict() for i in self.inventory[n]] for n in self.inventory})

    def _take_up_here(self) -> None:
        """All take their seats anew, as of the checkpoint that was just made; the new plan is written once they have."""
        self.membership.close()
        self.resumed, self._membership, self.seats_change = self.commits.last, None, True
        noticed, self._noticed = self._noticed, {}
        for region in self.regions:
            if region in noticed:
                self.partitions[region].let_go(noticed[region])
                self.folder.event("worker_left", region=region, workers=sorted(noticed[region]))
            self.partitions[region].vacate()

    def _goal_reached(self, metrics: Mapping[str, float]) -> bool:
        goal = self.job.train.until
        if goal is None:
            return False
        if goal.metric not in metrics:
            raise JobError(f"train.until: the task evaluates no '{goal.metric}'; it has: {', '.join(sorted(metrics))}")
        return goal.reached(metrics[goal.metric])

    @property
    def needs_final_merge(self) -> bool:
        """Some strategies leave every region with a replica of its own."""
        return not self.strategy.ends_equal

    def merge_fully(self, region: str) -> str:
        self.board.enter("final merge")
        digest, traffic, seconds = self.partitions[region].merge_fully(self.membership.directory)
        self.accounts.add(region, traffic, seconds=seconds)
        return digest

    def evaluate(self, region: str) -> dict[str, tuple[float, float]]:
        """Held-out sums and counts, computed in the region."""
        self.board.enter("evaluating on held-out data")
        self.board.status(region, "evaluating")
        sums = self.partitions[region].evaluate()
        self.board.status(region, "evaluated")
        return sums

    def conclude(self, sums: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, float]:
        """The metrics of the whole, from each region's sums."""
        self.metrics = means(add_sums([sums[region] for region in sorted(sums)]))
        self.board.metrics = self.metrics
        self.folder.event("evaluated", round=self.round, metrics=self.metrics)
        return self.metrics

    def watermark(self) -> dict[str, str]:
        """Region -> digest of the data found there."""
        return {region: found[0].watermark() for region, found in sorted(self.inventory.items())}

    def publish(self) -> tuple[registry.Version, str] | None:
        """Write the model beside the run, and a version into the registry. Returns it with the verdict on the champion."""
        assert self.plan is not None
        self.board.enter("publishing")
        leader = self.partitions[self.plan.owner if self.plan.owner in self.present else self.present[0]]
        leader.write_model(checkpoint.join(self.folder.url, "model.safetensors"))
        spec = self.job.registry
        if spec is None:
            return None
        number = registry.next_number(spec.url, spec.model)
        version = registry.Version(
            number=number,
            url=registry.model_url(spec.url, spec.model, number),
            run=self.id,
            job=self.job.digest(),
            metrics=self.metrics,
            watermark=self.watermark(),
            parent=self.warm_start.number if self.warm_start else None,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        leader.write_model(version.url)
        verdict = registry.enter(spec, version)
        self.folder.event("published", version=version.number, verdict=verdict)
        self.published = (version, verdict)
        return self.published

    def report(self) -> dict[str, Any]:
        """summary.json, report.html and report.md. The run is complete then. Returns the summary."""
        from geotrain.report import page  # matplotlib takes a second to import: only where it draws

        assert self.plan is not None
        self.board.enter("writing the report")
        summary = summarize(self.job, self.plan, self.folder, self.board, self.accounts.totals, self.accounts.traffic)
        if self.published:
            summary |= {"version": self.published[0].number, "verdict": self.published[1]}
        self.folder.event("completed", round=self.round, metrics=self.metrics)
        self.folder.flush()
        events = list(self.folder.lines("events.jsonl"))
        held_out = [event for event in events if event["event"] in ("segment", "evaluated")]
        chart = page.loss_chart(self.folder.lines("rounds.jsonl"), held_out)
        self.folder.write("report.html", page.html(summary, self.plan, chart, events))
        self.folder.write("report.md", page.markdown(summary, chart))
        self.folder.write_json("summary.json", summary)
        self.board.enter("complete")
        return summary

    def has_new_data(self, since: registry.Version | None) -> bool:
        return since is None or since.watermark != self.watermark()


def _inventories(tree: Mapping[str, Any]) -> dict[str, tuple[Inventory, Inventory | None]]:
    return {
        region: (Inventory.from_dict(train), Inventory.from_dict(held_out) if held_out else None)
        for region, (train, held_out) in tree.items()
    }


_BEGUN: dict[str, Run] = {}


def hand_over(run: Run) -> None:
    """Open a run's clusters and leave it to the flow that this process is about to call: the two start side by side."""
    run.handed_over = True
    _BEGUN[run.id] = run.open()


def taken_over(run: str, begin: Callable[[], Run]) -> Run:
    """The run that was left under this id, or else the one that `begin` makes. To be entered."""
    return _BEGUN.pop(run, None) or begin()
