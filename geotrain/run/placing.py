"""Before anything is provisioned: what data there is, how fast the workers are, who does how much."""

from geotrain.data.inventory import Inventory, check_same_schema
from geotrain.job import RegionSpec
from geotrain.partition.orders import Probed
from geotrain.plan.planner import Plan, UpdateSize, make_plan
from geotrain.plan.power import Offer
from geotrain.run.state import RunState


class Placing(RunState):
    """The first stages of a run."""

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
