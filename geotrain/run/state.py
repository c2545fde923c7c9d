"""What a run knows of itself: its job, its plan, where it is, who is in."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from geotrain import checkpoint, registry
from geotrain.charge import Charge
from geotrain.checkpoint import Manifest
from geotrain.data.inventory import Inventory
from geotrain.errors import (
    GeotrainError,
    Stopped,
)
from geotrain.job import JobSpec
from geotrain.members.accounts import Accounts
from geotrain.members.commits import Commits
from geotrain.members.membership import Membership
from geotrain.members.replanner import Replanner
from geotrain.partition.orders import Probed
from geotrain.partition.partition import Control
from geotrain.partition.partitions import Partitions
from geotrain.plan.planner import Plan
from geotrain.report.board import Board
from geotrain.report.folder import RunFolder
from geotrain.stores import STORE_ERRORS
from geotrain.sync.strategy import strategy_of

FLUSH_S = 1.0


class RunState:
    """What all stages share."""

    def __init__(self, job: JobSpec, folder: RunFolder) -> None:
        self.job, self.folder, self.id = job, folder, folder.run
        self.resumed: Manifest | None = None
        """The checkpoint to go on from."""
        self.left: set[str] = set()
        """Regions that left for good."""
        self.charge = Charge(self.id, folder.url, self._asked)
        folder.fence = self.charge.look_after_sleep
        self.strategy = strategy_of(job.sync, len(job.regions))
        self.control = Control(self.id, lambda: self.charge.number, self.charge.check_after_sleep)
        folder.over = self.control.abort
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
        self.commits = Commits(folder, self.charge.look, job.output.keep, job.judged_by)
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
        self._ends = 0
        self._end_wanted = False
        """By the user, or since another process has the run."""
        self._diverged = False
        self._spoilt: set[str] = set()
        """Regions that came back from rounds that ended in a NaN, or from a device that failed, and have not trained for a whole segment
        since."""
        self._spoilt_now: set[str] = set()
        """Those of this segment."""
        self._flushed_at = self._looked_at = 0.0
        self._closed = False
        self._lock = threading.Lock()

    def _asked(self, what: str, more: Mapping[str, Any]) -> None:
        """What the command line, or the loss of the lease, wants of this process."""
        raise NotImplementedError

    def in_every_region(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        """Call one of the stages below for all regions at once, or for some, in threads of this process: what flows do through tasks."""
        names = self.regions if regions is None else regions
        with ThreadPoolExecutor(max_workers=len(names)) as threads:
            futures = [threads.submit(stage, name, *args) for name in names]
            try:
                for future in as_completed(futures):
                    if future.exception() is not None:
                        self.control.abort.set()
            except BaseException:
                self.control.abort.set()  # who waits here was interrupted: the threads end before that goes on
                raise
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [future.result() for future in futures]

    def _go_on(self) -> None:
        """What failed is dealt with, so nobody is to end for it any more. Raises Stopped where an end is wanted anyhow."""
        self.control.abort.clear()
        if self._end_wanted:
            self.control.abort.set()
            raise Stopped(self.id)

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

    @property
    def regions(self) -> tuple[str, ...]:
        """Those that belong to the run, in the order of the job."""
        return tuple(region.name for region in self.job.regions if region.name not in self.left)

    @property
    def present(self) -> tuple[str, ...]:
        """The regions that are in, in the order of the job."""
        return tuple(region for region in self.regions if region in self.membership.present)

    @property
    def segments(self) -> int:
        return self.plan.segments if self.plan else 0

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

    def _take_up(self, manifest: Manifest) -> None:
        """Be where a checkpoint was made."""
        self.resumed, self.round, self.commits.last = manifest, manifest.round, manifest
        self.accounts.totals = {region: dict(totals) for region, totals in manifest.totals.items()}
        plan = Plan.from_dict(self.folder.read_json("plan.json")).as_of(manifest.round)
        self.plan = plan.of([region.name for region in self.job.regions])
        self.inventory = _inventories(self.folder.read_json("inventory.json"))
        if manifest.parent is not None and self.job.registry is not None:
            self.warm_start = registry.version(self.job.registry.url, self.job.registry.model, manifest.parent)

    def _rolled_back(self, manifest: Manifest | None) -> int:
        self.round = manifest.round if manifest else 0
        with contextlib.suppress(*STORE_ERRORS):
            checkpoint.forget_late(self.folder.url, self.round + 1)
        self.accounts.back_to(manifest.totals if manifest else {})
        return self.round

    def _write_plan(self) -> None:
        assert self.plan is not None
        self.folder.write_json("plan.json", self.plan.to_dict())

    def _write_inventory(self) -> None:
        self.folder.write_json("inventory.json", {n: [i and i.to_dict() for i in self.inventory[n]] for n in self.inventory})

    def watermark(self) -> dict[str, str]:
        """Region -> digest of the data found there."""
        return {region: found[0].watermark() for region, found in sorted(self.inventory.items())}

    def has_new_data(self, since: registry.Version | None) -> bool:
        return since is None or since.watermark != self.watermark()


def _inventories(tree: Mapping[str, Any]) -> dict[str, tuple[Inventory, Inventory | None]]:
    return {
        region: (Inventory.from_dict(train), Inventory.from_dict(held_out) if held_out else None)
        for region, (train, held_out) in tree.items()
    }
