"""The control plane's handle on one region: what is asked of its workers, and the truth about what became of it."""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from distributed import Client, Future

from geotrain.clusters import ANSWER_S, CLIENT_ERRORS, RegionCluster, open_cluster
from geotrain.data.inventory import Inventory
from geotrain.errors import (
    ClusterError,
    ClusterTooSmall,
    ClusterUnreachable,
    DeviceFailed,
    GeotrainError,
    Stopped,
    TaskFailed,
    WorkerHangs,
    WorkerLost,
)
from geotrain.job import JobSpec
from geotrain.partition.calls import beside, on_worker
from geotrain.partition.orders import Directory, Probed, SeatOrder, SeatTaken, SegmentDone, SegmentOrder, scope_of, topic
from geotrain.partition.signs import Signs
from geotrain.sync.messages import View

POLL_S = 0.1
WORKERS_CHECK_S = 2.0
TELL_S = 5.0
REACH_S = 60.0
AT_ONCE_S = 1.5
"""How long workers get to give up their seats when the run is to end at once."""
REOPEN_S = 5.0
"""How long a scheduler that was lost may take to answer, each time it is tried."""
SETTLE_S = 5.0
"""After a failure, how long the region's other workers get to say what happened to them."""

Listener = Callable[[str, dict[str, Any]], None]
"""Called with (region, message) for all that a partition reports while it trains."""


class Control:
    """What the control plane wants of all partitions of a run: to go on, to stop at an agreed round, or to end at once."""

    def __init__(self, run: str, lease: Callable[[], int] = lambda: 0, fence: Callable[[], None] = lambda: None) -> None:
        """`lease`: the number of the lease that this process holds on the run. `fence`: raises RunTaken where another process has it."""
        self.run, self._lease, self.fence = run, lease, fence
        self.stop = threading.Event()
        self.turn = threading.Event()
        """The segment is to end early, at an agreed round, and the run to go on with another plan."""
        self.abort = threading.Event()
        self.hurry = threading.Event()
        """With an abort: nobody is given time to tidy up."""

    def check(self) -> None:
        """While something is waited for. Raises Stopped where all is to end at once."""
        if self.abort.is_set():
            raise Stopped(self.run)

    def check_hurry(self) -> None:
        """The same where there is something to be tidied up after a failure. Raises Stopped where nobody is given time for that."""
        if self.hurry.is_set():
            raise Stopped(self.run)

    @property
    def scope(self) -> str:
        return scope_of(self.run, self._lease())


class Partition:
    """One region of one run. Methods block; they are called from a thread per region."""

    def __init__(self, job: JobSpec, region: str, cluster: RegionCluster, control: Control, listener: Listener) -> None:
        self.job, self.region, self.cluster, self.control = job, region, cluster, control
        self.workers: list[str] = []
        """Addresses of the workers with a seat; the leader's first."""
        self._listener = listener
        self._unusable: set[str] = set()
        """Workers that hung, or are about to end."""
        self._owed: dict[str, Future] = {}
        """Of those, the ones that were busy for too long: what each answers as soon as it is free, and of use again."""
        self._lives: set[int] = set()
        """Of the seats."""
        self._ended: set[int] | None = None
        """Those that were told to end."""
        self._known: tuple[View, Directory] | None = None
        """The newest that the leader was told."""
        self._telling: list[threading.Thread] = []
        self._signs = Signs()
        self._ticket: int | None = None
        """Of the segment under way that may still be asked to end early."""
        self._asked: int | None = None
        """The one that was."""
        self._listen()

    @property
    def client(self) -> Client:
        return self.cluster.client

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        self._signs.heard(event[1])
        self._listener(self.region, event[1])

    def _listen(self) -> None:
        """A scheduler that was begun again knows nothing of who listens."""
        name = topic(self.control.scope, self.region)
        with suppress(*CLIENT_ERRORS):
            self.client.unsubscribe_topic(name)
        with self._reaching("listening to it"):
            self.client.subscribe_topic(name, self._heard)

    @contextmanager
    def _reaching(self, doing: str) -> Iterator[None]:
        """Raises ClusterUnreachable for what a client raises that has lost its scheduler."""
        try:
            yield
        except CLIENT_ERRORS as error:
            raise ClusterUnreachable(self.region, self.cluster.where, f"{doing}: {error or type(error).__name__}") from error

    def reopen(self, workers: int) -> None:
        """Reach the cluster anew, after its scheduler was lost; one of our own is asked for so many workers. Raises ClusterError."""
        with suppress(Exception):  # whatever a provider's library raises
            self.cluster.close()
        self.cluster = open_cluster(self.job.region(self.region), REOPEN_S, self.control.check)
        self.cluster.ask_for(workers)
        self._listen()
        with self._reaching("shipping the code"):
            self.cluster.ship(self.job.code)

    def survey(self) -> tuple[Inventory, Inventory | None]:
        """Training and held-out inventory, read by one worker. Raises DataError, TaskImportError, ClusterError."""
        with self._reaching("shipping the code"):
            self.cluster.ship(self.job.code)
        answer: tuple[Inventory, Inventory | None] = self._call("reading the footers", "probing:survey", self.job, self.region)
        return answer

    def ask(self, name: str, *args: Any) -> Any:
        """The answer of one worker's function. Raises what it raises, or ClusterError."""
        return self._call("the examination", name, *args)

    def probe(self, train: Inventory, output: str) -> Probed:
        """Speed of one worker on this task. Raises TaskError, DataError, OutputUnwritable."""
        answer: Probed = self._call("the probe", "probing:probe", self.job, self.region, train, output)
        return answer

    def scale(self, workers: int) -> None:
        """Bring the cluster to the planned size. Raises ClusterTooSmall, ClusterUnreachable."""
        self.workers = self.cluster.scale(workers, self.control.check)
        if not set(self.workers) <= set(usable := self._usable()):
            if len(usable) < workers:
                raise ClusterTooSmall(self.region, workers, len(usable), 0.0)
            self.workers = usable[:workers]

    def regroup(self, workers: int, patience_s: float) -> int:
        """Take the workers that are there, at most so many, after giving those that were lost some time to be replaced; at least one.

        Returns how many. Raises ClusterTooSmall, ClusterUnreachable.
        """
        until = time.monotonic() + patience_s
        while len(found := self._usable()) < workers and time.monotonic() < until:
            time.sleep(POLL_S)
        if not found:
            raise ClusterTooSmall(self.region, workers, 0, patience_s)
        self.workers = found[:workers]
        self._listen()
        return len(self.workers)

    def spare(self) -> bool:
        """Whether the cluster has a worker without a seat."""
        try:
            return len(self._usable()) > len(self.workers)
        except ClusterError:
            return False

    def _usable(self, check: Callable[[], None] | None = None) -> list[str]:
        there = self.cluster.workers(check or self.control.check)
        self._unusable.intersection_update(there)  # one that went, and comes to the same address, is another
        for worker in [worker for worker, answer in self._owed.items() if answer.status != "pending"]:
            del self._owed[worker]
            self._unusable.discard(worker)
        return [worker for worker in there if worker not in self._unusable]

    def take_seats(self, order: Callable[[int, int, str | None], SeatOrder]) -> SeatTaken:
        """Seat every worker; `order` makes the order for (rank, workers, rendezvous). Returns the leader's answer."""
        rendezvous = None
        if len(self.workers) > 1:
            rendezvous = self._await([self._submit(self.workers[0], "meeting_point")], "choosing a port")[0]
        orders = [order(rank, len(self.workers), rendezvous) for rank in range(len(self.workers))]
        self._lives = {order.life for order in orders}
        self._signs.seated(self._lives)
        futures = [self._submit(worker, "take_seat", order) for worker, order in zip(self.workers, orders, strict=True)]
        leader: SeatTaken = self._await(futures, "building the model")[0]
        with suppress(*CLIENT_ERRORS):
            self._run(on_worker, "heed_notices", workers=self.workers)
        return leader

    def train(self, order: SegmentOrder, hangs_after_s: float) -> SegmentDone:
        """One segment. `hangs_after_s`: how long its leader may give no sign between two inner steps.

        Raises TaskError, WorkerLost, WorkerHangs, WanError, OutputUnwritable, or Stopped when another region failed.
        """
        self._ticket, self._asked = order.ticket, None
        self._signs.begin()
        futures = [self._submit(worker, "train_segment", self.control.scope, self.region, order) for worker in self.workers]
        done: SegmentDone = self._await(futures, f"segment {order.number}", hangs_after_s=hangs_after_s)[0]
        return done

    def tell_abort(self) -> None:
        """To end what they do at once."""
        self._ended = self._lives
        self._tell("abort", self._lives)

    def tell_view(self, view: View, directory: Directory) -> None:
        """Who is in from now on, said to a leader that trains. One that is lost is noticed elsewhere."""
        self._known = view, directory
        self._tell("tell_view", view, directory)

    def _tell(self, name: str, *args: Any) -> None:
        """Said beside whatever the workers do, and not waited for: one that hangs does not listen."""
        words, workers = (name, self.control.scope, self.region, *args), list(self.workers)

        def say() -> None:
            with suppress(*CLIENT_ERRORS):
                self._run(on_worker, *words, workers=workers)

        telling = threading.Thread(target=say, name=f"geotrain-tell-{self.region}", daemon=True)
        telling.start()
        self._telling = [thread for thread in [*self._telling, telling] if thread.is_alive()]

    def _run(self, how: Callable[..., Any], *words: Any, workers: list[str], within_s: float = TELL_S, on_error: str = "ignore") -> Any:
        """Client.run, with a time limit: it waits for a worker that hangs as long as that is connected. Raises CLIENT_ERRORS."""
        return self.client.sync(self.client._run, how, *words, workers=workers, on_error=on_error, callback_timeout=within_s)

    def evaluate(self) -> dict[str, tuple[float, float]]:
        """Held-out sums and counts. Raises TaskFailed."""
        sums: dict[str, tuple[float, float]] = self._ask_leader("the evaluation", "evaluate_seat")
        return sums

    def reach(self, addresses: dict[str, str]) -> dict[str, str | None]:
        """Region -> why the leader cannot dial it at this address, None where it can; beside what it does. Raises ClusterUnreachable."""
        words = "reach", self.control.scope, self.region, addresses
        with self._reaching("trying the links"):
            answers = self._run(beside, *words, workers=self.workers[:1], within_s=REACH_S, on_error="raise")
        answer: dict[str, str | None] = answers[self.workers[0]]
        return answer

    def merge_fully(self, directory: Directory) -> tuple[str, dict[str, dict[str, Any]], float]:
        """This region's side of the full merge that ends a run; returns the hash of what it then holds, its traffic, and the seconds."""
        answer: tuple[str, dict[str, dict[str, Any]], float] = self._ask_leader("the final merge", "merge_fully", directory)
        return answer

    def write_model(self, url: str) -> int:
        """The leader writes model.safetensors; returns its bytes. Raises OutputUnwritable."""
        size: int = self._ask_leader("publishing", "write_model", url)
        return size

    def _ask_leader(self, doing: str, name: str, *args: Any) -> Any:
        try:
            return self._await([self._submit(self.workers[0], name, self.control.scope, self.region, *args)], doing)[0]
        except Stopped as stopped:
            if self.control.abort.is_set():
                raise
            raise WorkerLost(self.region, self.workers[0], f"{doing}: it heard nothing of this process and gave up") from stopped

    def leader_is_there(self) -> bool:
        """Whether the leader's process is one that the cluster knows, gives signs of life, and holds its seat: at the same address there
        may be another by now."""
        if not self._give_signs(self.workers[:1]):
            return False
        with suppress(*CLIENT_ERRORS):
            held = self._run(on_worker, "holds", self.control.scope, self.region, self._lives, workers=self.workers[:1])
            return bool(held.get(self.workers[0], True))
        return True  # it does not answer at the moment

    def workers_are_there(self) -> bool:
        """The same of all workers with a seat."""
        return self._give_signs(self.workers)

    def _give_signs(self, workers: list[str]) -> bool:
        try:
            there = self.cluster.there(self.control.check)
        except ClusterError:
            return False
        return all(worker in there and self._signs.no_beat_for(worker, there[worker]) is None for worker in workers)

    def vacate(self) -> None:
        """Give up the seats, to take others. What is still on its way to them does not concern those."""
        self._take_back(self.workers)

    def let_go(self, workers: Collection[str]) -> bool:
        """These have been told that their machines are taken away: they give up their seats, and are not used again.

        False: the cluster has no other worker.
        """
        self._unusable.update(workers)
        self._take_back(list(workers))
        try:
            return bool(self._usable(self.control.check_hurry))
        except ClusterError:
            return False

    def _take_back(self, workers: list[str]) -> None:
        with suppress(ClusterError, *CLIENT_ERRORS):
            within_s = AT_ONCE_S if self.control.hurry.is_set() else REACH_S
            there = self.cluster.there(within_s=min(within_s, ANSWER_S))
            workers = [worker for worker in workers if worker in there]  # a dead one would be tried for half a minute
            self._run(on_worker, "leave", self.control.scope, self.region, workers=workers, within_s=within_s)

    def leave(self) -> None:
        """Give up the seats, where they outlive the run, or objects in a mailbox do. What cannot be reached has nothing to give up."""
        lasts = self.cluster.cluster is None or self.job.mailbox_of(self.region) is not None
        if lasts and self.workers:
            self.vacate()
        for thread in self._telling:
            thread.join(AT_ONCE_S if self.control.hurry.is_set() else None)

    def abandon(self) -> None:
        """After a loss: the region's other workers end what they do. One that does not is ended, or else not used before it is free."""
        self.tell_abort()
        with suppress(ClusterError, *CLIENT_ERRORS):
            there = self.cluster.there(within_s=SETTLE_S).keys() - self._unusable
            answers = {worker: self._submit(worker, "here") for worker in self.workers if worker in there}
            until = time.monotonic() + SETTLE_S
            while (silent := self._silent(answers)) and time.monotonic() < until:
                time.sleep(POLL_S)
            if silent:
                self._restart(silent)
                self._owed.update({worker: answers[worker] for worker in silent if worker in self._unusable})

    def _silent(self, answers: Mapping[str, Future]) -> list[str]:
        """Those that have not answered and are there: Dask would wait for ever for one that went before it was asked."""
        pending = [worker for worker, answer in answers.items() if answer.status == "pending"]
        return sorted(set(pending) & self.cluster.there(within_s=SETTLE_S).keys()) if pending else []

    def _restart(self, workers: list[str]) -> None:
        """By their nannies; one without is not used. Raises RunTaken."""
        self.control.fence()  # who slept and was overtaken finds them busy with somebody else's work
        self._unusable.update(workers)
        with suppress(*CLIENT_ERRORS):
            told = self.client.restart_workers(workers, timeout=SETTLE_S, raise_for_error=False)
            self._unusable.difference_update(worker for worker, how in told.items() if how == "OK")

    def _submit(self, worker: str, name: str, *args: Any) -> Future:
        with self._reaching(f"asking worker {worker}"):
            return self.client.submit(on_worker, name, *args, workers=[worker], allow_other_workers=False, pure=False, retries=0)

    def _call(self, doing: str, name: str, *args: Any) -> Any:
        """On whichever worker is there first."""
        worker = self.cluster.scale(1, self.control.check)[0]
        return self._await([self._submit(worker, name, *args)], doing, workers=[worker])[0]

    def _await(self, futures: Sequence[Future], doing: str, workers: list[str] | None = None, hangs_after_s: float = math.inf) -> list[Any]:
        """The results, unless a worker is lost, the run is aborted, or one of them raises."""
        checked = time.monotonic()
        while any(future.status == "pending" for future in futures) and all(future.status in ("pending", "finished") for future in futures):
            if self.control.abort.is_set():
                self.tell_abort()
                self._cancel(futures)
                self.control.check()
            self._pass_on_stop()
            if (silent_s := self._signs.no_step_for(hangs_after_s)) is not None:
                self._cancel(futures)
                raise WorkerHangs(self.region, self.workers[0], silent_s)
            if time.monotonic() - checked > WORKERS_CHECK_S:
                checked = time.monotonic()
                if workers is None:
                    self._tell("watched", self._known, self._asked)
                    if self._ended is self._lives:
                        self.tell_abort()
                with suppress(Stopped):  # which is for the next turn
                    self._check_workers(futures, workers or self.workers, doing, self.control.check)
            time.sleep(POLL_S if len(futures) > 1 else 0.02)
        patience_s = WORKERS_CHECK_S
        while all(future.status == "finished" for future in futures):
            try:
                return [future.result(timeout=patience_s) for future in futures]
            except CLIENT_ERRORS:  # a worker that dies as soon as it has finished: Dask would wait for another at its address for ever
                self._check_workers(futures, workers or self.workers, doing)
            patience_s *= 2  # it is there: the answer is long, or the way
        raise self._why(futures, workers or self.workers, doing)

    def _pass_on_stop(self) -> None:
        if (self.control.stop.is_set() or self.control.turn.is_set()) and self._ticket is not None:
            self._asked, self._ticket = self._ticket, None
            self._tell("ask_stop", self._asked)

    def _cancel(self, futures: Sequence[Future]) -> None:
        try:
            self.client.cancel(list(futures), force=True)
        except CLIENT_ERRORS:
            return

    def _check_workers(self, futures: Sequence[Future], workers: list[str], doing: str, check: Callable[[], None] | None = None) -> None:
        try:
            there = self.cluster.there(check or self.control.check_hurry)
        except ClusterUnreachable as error:
            raise ClusterUnreachable(self.region, error.named["where"], f"lost during {doing}: {error.named['detail']}") from error
        for worker in workers:
            if worker not in there:
                self._cancel(futures)
                raise WorkerLost(self.region, worker, doing)
            if (silent_s := self._signs.no_beat_for(worker, there[worker])) is not None:
                self._cancel(futures)
                raise WorkerHangs(self.region, worker, silent_s)

    def _why(self, futures: Sequence[Future], workers: list[str], doing: str) -> BaseException:
        """The best explanation among what the workers raised: ours before torch's, torch's before a bare loss."""
        until = time.monotonic() + SETTLE_S
        while any(future.status == "pending" for future in futures) and time.monotonic() < until:
            time.sleep(POLL_S)
        self._cancel([future for future in futures if future.status == "pending"])
        raised = [future.exception() for future in futures if future.status == "error"]
        for error in raised:
            if isinstance(error, DeviceFailed):
                self._restart([str(error.named["worker"])])
            if isinstance(error, GeotrainError):
                return error
        try:
            self._check_workers(futures, workers, doing)
        except GeotrainError as lost:
            return lost
        if raised and type(raised[0]).__name__ != "KilledWorker":
            failed = TaskFailed(self.region, doing, f"{type(raised[0]).__name__}: {raised[0]}")
            failed.__cause__ = raised[0]
            return failed
        return WorkerLost(self.region, workers[0] if workers else "?", doing)
