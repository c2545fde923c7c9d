"""Planning again in mid-run: links and workers turn out to be others than was believed, or a region comes."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from geotrain.clusters import RegionCluster, open_cluster
from geotrain.data.inventory import Inventory, check_same_schema
from geotrain.errors import GeotrainError, Stopped
from geotrain.job import JobSpec
from geotrain.partition.orders import Probed
from geotrain.partition.partition import Control, Partition
from geotrain.plan.planner import Plan, offers_of, remake, replan
from geotrain.plan.power import Offer
from geotrain.plan.watch import LinkWatch, SpeedWatch
from geotrain.report.folder import RunFolder

OpenPartition = Callable[[JobSpec, str, RegionCluster], Partition]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A region that is ready to come in."""

    region: str
    job: JobSpec
    """With it."""
    partition: Partition
    inventory: tuple[Inventory, Inventory | None]
    probed: Probed


class Replanner:
    """Hears what leaders tell while they train; between two segments it makes the plan again."""

    def __init__(self, job: JobSpec, control: Control, folder: RunFolder) -> None:
        self.control, self.folder = control, folder
        self.links = LinkWatch(job)
        self.speeds = SpeedWatch(job.elastic.speed_margin, job.elastic.speed_for_s)
        self.newcomer: Newcomer | None = None
        self.anew = False
        """The plan reckons with a region that did not come in."""
        self._measured: dict[str, float] = {}
        """Region -> samples per second, where the plan believes something else."""
        self._preparing: threading.Thread | None = None
        self._cluster: RegionCluster | None = None
        """Of the region that is being prepared."""
        self._closing = False

    @property
    def waits(self) -> bool:
        """Whether there is something that only a boundary between segments can change."""
        return self.newcomer is not None or self.anew or bool(self._measured)

    def heard(self, region: str, message: Mapping[str, Any], job: JobSpec, plan: Plan) -> None:
        """What a leader told while it trains."""
        for change in self.links.heard(region, message.get("links", {})):
            self.folder.event("link_changed", region=region, **change)
            if getattr(job.sync, "every", None) == "auto":
                self.control.turn.set()
        believed = self._measured.get(region, plan.region(region).samples_per_s)
        if (speed := self.speeds.heard(region, believed, message.get("rounds", ()))) is not None:
            self._measured[region] = speed
            self.folder.event("speed_changed", region=region, samples_per_s=[round(believed, 1), round(speed, 1)])
            self.control.turn.set()

    def plan_again(
        self, plan: Plan, job: JobSpec, inventory: Mapping[str, Inventory], round: int, samples: int, newcomer: Newcomer | None
    ) -> Plan:
        """The plan from `round` on; the old one where nothing calls for another.

        `inventory`: of the regions that belong to the run. `newcomer`: in the job and the inventory already.
        """
        job = job.with_links(self.links.measured())
        measured, self._measured = self._measured, {}
        anew, self.anew = self.anew, False
        if newcomer is not None or measured or anew:
            offers = offers_of(job, plan, measured)
            if newcomer is not None:
                offers[newcomer.region] = [
                    Offer(d.kind, d.count, d.usd_per_hour, d.samples_per_s or newcomer.probed.samples_per_s)
                    for d in job.region(newcomer.region).devices
                ]
            there = job.model_copy(update={"regions": tuple(region for region in job.regions if region.name in inventory)})
            made = remake(plan, there, inventory, offers, round, samples)
            left = tuple(region for region in plan.regions if region.region not in inventory)
            made = replace(made, regions=(*made.regions, *left))
            if anew or workers_of(made) != workers_of(plan):
                return made
            speeds = {region.region: region.samples_per_s for region in made.regions}  # as many workers as before
            plan = replace(plan, regions=tuple(replace(region, samples_per_s=speeds[region.region]) for region in plan.regions))
        return replan(plan, job, round) if getattr(job.sync, "every", None) == "auto" else plan

    def prepare(self, job: JobSpec, region: str, known: Mapping[str, tuple[Inventory, Inventory | None]], partition: OpenPartition) -> None:
        """Beside the training: open the cluster of a region that is to come in, look at its data and measure its speed.

        Then the segment is asked to end early; or the event `not_added` says why it cannot come in.
        """
        if (self._preparing is not None and self._preparing.is_alive()) or self.newcomer is not None:
            self._refuse(region, "another region is coming in: ask again when it is there")
            return
        self._preparing = threading.Thread(
            target=self._prepare, args=(job, region, known, partition), name="geotrain-newcomer", daemon=True
        )
        self._preparing.start()

    def _prepare(
        self, job: JobSpec, region: str, known: Mapping[str, tuple[Inventory, Inventory | None]], partition: OpenPartition
    ) -> None:
        try:
            self._cluster = open_cluster(job.region(region), check=self._check)
            come = partition(job, region, self._cluster)
            inventory = come.survey()
            for split in (0, 1):
                if found := [one for both in (*known.values(), inventory) if (one := both[split])]:
                    check_same_schema(found)
            probed = come.probe(inventory[0], self.folder.url)
        except Exception as error:  # whatever it was, somebody waits for an answer
            self._forget()
            why = error.message if isinstance(error, GeotrainError) else f"{type(error).__name__}: {error}"
            self._refuse(region, why)
            return
        self.newcomer = Newcomer(region, job, come, inventory, probed)
        self.control.turn.set()

    def _check(self) -> None:
        self.control.check()
        if self._closing:
            raise Stopped(self.control.run)

    def _refuse(self, region: str, why: str) -> None:
        self.folder.event("not_added", region=region, message=why)
        self.folder.flush(must=False)

    def came_in(self) -> None:
        """The newcomer is the run's now, and so is its cluster."""
        self.newcomer = self._cluster = None

    def _forget(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def close(self) -> None:
        """A region that is still being prepared does not come in."""
        self._closing = True
        if self._preparing is not None:
            self._preparing.join()
        self._forget()


def workers_of(plan: Plan) -> dict[str, int]:
    """Region -> its workers."""
    return {region.region: region.workers for region in plan.regions}
