"""A seat: one worker process's place in a run, resident between segments."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from distributed import get_worker
from distributed.worker import thread_state
from torch import Tensor

from geotrain import checkpoint
from geotrain.errors import BadCheckpoint, Stopped
from geotrain.partition.adapt import BitsAdapter
from geotrain.partition.building import make_trainer, seat_replica
from geotrain.partition.endpoint import Endpoint
from geotrain.partition.flat import sha256
from geotrain.partition.group import Directive
from geotrain.partition.orders import Directory, SeatOrder, SeatTaken, SegmentDone, SegmentOrder
from geotrain.partition.progress import Reporter
from geotrain.partition.server import ParameterServer, RoundRecord, Totals
from geotrain.partition.staging import Stager
from geotrain.partition.state import about_bytes, load_optimizer_state, optimizer_state, prefixed, without_prefix
from geotrain.partition.trainer import evaluate
from geotrain.stores import STORE_ERRORS
from geotrain.sync.machine import outside, round_machine
from geotrain.sync.messages import View
from geotrain.sync.pace import Pace, pace_since
from geotrain.sync.progress import Progress
from geotrain.sync.replica import AnyReplica, MergeReplica, choose_codecs
from geotrain.sync.strategy import strategy_of
from geotrain.wan.transport import Identity, model_digest

WATCHED_S = 20.0
"""A control plane that gave no sign of life for so long is gone, or stands still: as long as its lease lasts."""
UNOBSERVED_S = 60.0
"""Nothing trains for longer when the control plane is gone: a seat ends its segment early, or without a checkpoint after this."""
LARGEST_PER_ELEMENT, LARGEST_EXTRA = 8, 64
"""No payload takes more bytes: fp32 parameters, and as much of an outer optimizer for a region that joins."""


class Seat:
    """One worker of one region. The leader (rank 0) also holds the parameter server and the WAN endpoint."""

    def __init__(self, order: SeatOrder) -> None:
        job = order.job
        self.order, self.job = order, job
        self.strategy = strategy_of(job.sync, len(job.regions), order.chosen)
        self.now_in = 0
        self.stop_in = 0
        """Tickets: of the order that is under way, and of the one that is to end early."""
        self.news: SimpleQueue[tuple[View, Directory]] = SimpleQueue()
        """Views that the control plane told meanwhile."""
        self.aborted = threading.Event()
        self.watched_at = time.monotonic()
        """When the control plane last gave a sign of life."""
        self.running = False
        """It trains a segment."""
        self.lapsed_at: float | None = None
        """When it was noticed that nobody waits for this seat's work any more."""
        self._seconds = 0.0
        """Of the segment, over the views in which it was entered."""
        self.reporter = Reporter(order.scope, order.region, order.life)
        self.server: ParameterServer | None = None
        self.endpoint: Endpoint | None = None
        self.stager = Stager(order.region, self.reporter.say)
        with ExitStack() as stack:
            self.trainer = make_trainer(job, order.region, order.train, order.rank, order.world, order.rendezvous)
            stack.callback(self.trainer.group.close)
            if order.warm_start:
                self._warm_start(order.warm_start)
            if order.rank == 0:
                self.endpoint = self._open_endpoint()
                stack.callback(self.endpoint.close)
            stack.callback(self.trainer.rows.close)
            self.trainer.rows.waiting = self._waits_for_rows
            stack.callback(self.stager.close)
            self._restore()
            self._open = stack.pop_all()

    def _open_endpoint(self) -> Endpoint:
        order, flat = self.order, self.trainer.flat
        largest = LARGEST_PER_ELEMENT * flat.vector.numel() + LARGEST_EXTRA
        names = frozenset(spec.name for spec in self.job.regions)
        identity = Identity(order.run, order.region, order.token, model_digest(flat.fingerprint()), order.life, names, largest)
        endpoint = Endpoint(self.job, identity, order.give_up_s, self.reporter.event)
        self.reporter.endpoint = endpoint
        return endpoint

    def _seat_server(self, round: int) -> None:
        order, flat, rows = self.order, self.trainer.flat, self.trainer.rows
        pace = pace_since(order.pace, rows.steps_in) if order.pace else Pace(order.rounds_per_epoch, rows.steps_in)
        view = outside(order.region) if order.joins else order.view
        at = Progress(order.region, view, pace, round, rows.done(pace.epoch(round)), rows=order.train.rows, life=order.life)
        replica = seat_replica(self.job, flat, self.strategy, order.shares, order.bits)
        adapter = BitsAdapter(self.job, order.region, self.strategy, order.view, order.shares, order.bits, flat.parameters)
        self.server = self.trainer.server = ParameterServer(
            region=order.region,
            machine=round_machine(self.strategy, at, joins=order.joins),
            replica=replica,
            transport=self._endpoint.transport,
            attend=lambda: None,
            stop_wanted=lambda: self.stop_in == self.now_in or self.lapsed_at is not None,
            report=self._round_made,
            holds=self.reporter.holds,
            bad_rounds=self.job.elastic.bad_rounds,
            event=self.reporter.event,
            after_round=lambda compute_s: self._adapt(adapter, replica, compute_s),
        )
        self.reporter.settled, self.reporter.waits_for = self.server.settled, self.server.waits_for

    def _round_made(self, record: RoundRecord) -> None:
        self.reporter.round(record)
        if self.stager.fresh and self.server is not None:
            outer = replica.momentum if isinstance(replica := self.server.replica, MergeReplica) else None
            self.stager.prepare(about_bytes(self.trainer.optimizer, self.trainer.flat, outer))

    def _adapt(self, adapter: BitsAdapter, replica: AnyReplica, compute_s: float) -> None:
        """With `codec: auto`: bits for the links as they are now."""
        if (changed := adapter.after_round(self._endpoint.transport.traffic, compute_s)) is not None:
            choose_codecs(replica, changed.up, changed.down)
            self.reporter.event("bits", {"up": adapter.names(changed.up), "down": adapter.names((changed.down,)), "why": adapter.why})

    @property
    def _endpoint(self) -> Endpoint:
        """The leader's."""
        assert self.endpoint is not None
        return self.endpoint

    def taken(self) -> SeatTaken:
        flat = self.trainer.flat
        wan = self.endpoint.addresses if self.endpoint is not None else {}
        return SeatTaken(
            region=self.order.region,
            rank=self.order.rank,
            worker=get_worker().address,
            wan=wan,
            fingerprint=flat.fingerprint(),
            hashes=flat.hashes(),
            device=str(flat.vector.device),
            life=self.order.life,
            cursor=self.trainer.rows.book(self.trainer.rows.epoch).cursor(),
            round=self.server.machine.at.round if self.server is not None else 0,
        )

    def segment(self, order: SegmentOrder) -> SegmentDone | None:
        """Train one segment. The leader answers; the region's other workers return None."""
        again, self.now_in = order.ticket == self.now_in, order.ticket
        began = self.watched_at = time.monotonic()
        wanted = dask_task_wanted()
        first: Directive | None = None
        if self.server is not None:
            self.server.attend = lambda: self._attend(wanted)
            if not again:
                self._seconds = 0.0
                self._endpoint.renew()
                if order.pace is not None and not self.server.machine.at.steps:
                    self.server.machine.at.take_pace(pace_since(order.pace, self.trainer.rows.steps_in))
        try:
            if self.server is not None:
                self.server.begin(order.until, order.first, again=again)
                self.take_view(order.view, order.directory)
                first = self.server.directive()
            self.trainer.segment(first, self._check_abort)
        except BaseException:
            self.trainer.group.close()  # so that the region's other workers do not wait for this one
            raise
        if self.server is None:
            self.lapsed_at = None if wanted() else time.monotonic()
            return None
        self.server.drain()
        totals, round = self.server.totals, self.server.machine.at.round
        self.reporter.close()
        self._seconds += time.monotonic() - began
        return self._done(order, totals, round, self._seconds)

    def take_view(self, view: View, directory: Directory) -> None:
        """Who is in from now on, and where they are."""
        assert self.server is not None
        self._endpoint.introduce(directory)
        self.server.change_view(view)  # one that is known already changes nothing
        self.reporter.epoch = view.epoch
        self.reporter.flush()  # what it holds of a region that was lost is known from here on

    def _attend(self, wanted: Callable[[], bool]) -> None:
        """Before an inner step, and while there is none to make: take the views that were told, see whether anybody is in charge."""
        self._check_abort()
        self.reporter.tell()
        while not self.news.empty():
            view, directory = self.news.get()
            if self.server is not None and view.epoch > self.server.machine.at.view.epoch:
                self.take_view(view, directory)
        if wanted() and time.monotonic() - self.watched_at < WATCHED_S:
            self.lapsed_at = None
        elif self.lapsed_at is None:
            self.lapsed_at = time.monotonic()
        if self.lapsed_at is not None and time.monotonic() - self.lapsed_at > UNOBSERVED_S:
            raise Stopped(self.order.run)

    def _waits_for_rows(self) -> None:
        self._check_abort()
        self.reporter.tell()  # a sign of life: it is the store that is slow

    def _check_abort(self) -> None:
        if self.aborted.is_set():
            raise Stopped(self.order.run)

    def _done(self, order: SegmentOrder, totals: Totals, round: int, seconds: float) -> SegmentDone:
        assert self.server is not None
        stall_s = self.stager.stage(checkpoint.folder(order.run_url, round), round, *self._state(round))
        done = SegmentDone(
            region=self.order.region,
            segment=order.number,
            round=round,
            samples=totals.samples,
            steps=totals.steps,
            loss=totals.loss / totals.samples if totals.samples else None,
            seconds=seconds,
            held_s=totals.held_s,
            sha256=sha256(replica.theta if isinstance(replica := self.server.replica, MergeReplica) else self.trainer.flat.vector),
            staging=self.stager.number,
            stall_s=stall_s,
            metrics=self.evaluate(),
            traffic=self._traffic(),
            life=self.order.life,
            closed=tuple(totals.closed.values()),
        )
        self.stager.write(asdict(done))
        return done

    def evaluate(self) -> dict[str, tuple[float, float]]:
        """Held-out sums and counts of this region; none where it has no such rows."""
        return evaluate(self.trainer, self.order.eval, self.job.train.batch_size, self._check_abort) if self.order.eval else {}

    def reach(self, addresses: dict[str, str]) -> dict[str, str | None]:
        """Region -> why this leader cannot dial it; None where it can."""
        return self._endpoint.reach(addresses)

    def merge_fully(self, directory: Directory) -> tuple[str, dict[str, dict[str, Any]], float]:
        """One full merge, weighted by rows, so that the run ends with one model; returns its hash, the traffic and the seconds."""
        assert self.server is not None
        began = self.watched_at = time.monotonic()
        self._endpoint.introduce(directory)
        wanted = dask_task_wanted()

        def attend() -> None:
            self._attend(wanted)
            if self.lapsed_at is not None:  # the last checkpoint has all that is needed for another full merge
                raise Stopped(self.order.run)

        self.server.attend = attend
        self.server.merge_fully()
        self.server.drain()
        return sha256(self.trainer.flat.vector), self._traffic(), time.monotonic() - began

    def _traffic(self) -> dict[str, dict[str, Any]]:
        return {to: link.to_dict() for to, link in list(self._endpoint.transport.traffic.items())}

    def _state(self, round: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint has of this region: tensors by name, and facts."""
        assert self.server is not None
        flat, rows = self.trainer.flat, self.trainer.rows
        inner, numbers = optimizer_state(self.trainer.optimizer, flat.parameter_names())
        tensors = {
            **prefixed("model", flat.state_dict()),
            **prefixed("inner", inner),
            **prefixed("sync", self.server.replica.state()),
        }
        return tensors, {"round": round, "inner": numbers, "cursor": rows.book(rows.epoch).cursor()}

    def _restore(self) -> None:
        """Be where the order says. Every worker of the region reads the part; only the leader keeps the exchange's state."""
        place, part = self.order.place, self.order.restore
        tensors, facts = self._load(part) if part is not None else ({}, {"round": 0, "cursor": None})
        if self.order.joins and place is None and part is None and self.order.pace is not None:
            self._enter_midway(pace_since(self.order.pace, self.trainer.rows.steps_in))
        elif place is not None:
            self.trainer.rows.restore(place.cursor, place.at)
        elif facts["cursor"] is not None:
            self.trainer.rows.restore(facts["cursor"])
        if self.order.rank == 0:
            self._seat_server(facts["round"] if place is None else place.round)
            assert self.server is not None
            if part is not None:
                self.server.replica.load_state(without_prefix("sync", tensors))
                if self.order.rewind:
                    self.server.rewind()

    def _enter_midway(self, pace: Pace) -> None:
        """Its first epoch is the one that the others are in: as much of its rows is to come as of theirs."""
        epoch, left = pace.place(pace.since)
        self.trainer.rows.seek(epoch, pace.steps_in(epoch) * max(0, pace.rounds_per_epoch - left) // pace.rounds_per_epoch)

    def _load(self, part: checkpoint.StoredPart) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A part of a checkpoint, whose model and inner optimizer are taken. Raises BadCheckpoint."""
        tensors, facts = checkpoint.read_part(part)
        flat, model = self.trainer.flat, without_prefix("model", tensors)
        try:
            flat.load(model)
        except RuntimeError as error:
            raise BadCheckpoint(part.url, f"it holds another model: {error}") from error
        load_optimizer_state(self.trainer.optimizer, flat, without_prefix("inner", tensors), facts["inner"])
        return tensors, facts

    def _warm_start(self, url: str) -> None:
        try:
            self.trainer.flat.load(checkpoint.tensors_from_bytes(checkpoint.read_bytes(url))[0])
        except (RuntimeError, *STORE_ERRORS) as error:
            raise BadCheckpoint(url, f"the model cannot begin from it: {error}") from error

    def write_model(self, url: str) -> int:
        """Write the model for the registry; returns its bytes. A store that fails for a while is waited for. Raises OutputUnwritable."""
        content = checkpoint.pack(self.trainer.flat.state_dict())
        checkpoint.write_bytes(f"region {self.order.region}", url, content, over=self.aborted)
        return len(content)

    def close(self) -> None:
        self._open.close()


def dask_task_wanted() -> Callable[[], bool]:
    """Whether the scheduler still wants the Dask task in which this was called: it does not once the client is gone.

    future.cancel() does not stop a running function, and neither does the loss of the client: the function must look.
    """
    worker, key = get_worker(), thread_state.key

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state != "cancelled"

    return wanted
