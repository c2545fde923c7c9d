"""JobSpec: what the user asked for. The text under a field is its documentation."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from geotrain.job.base import Count, HostPort, ImportPath, Name, NonNegative, Positive, Spec
from geotrain.job.sync import Merged, ModelAveraging, Sync

SECRET_OPTION = re.compile(r"secret|token|passw|^key$|_key$|credential", re.IGNORECASE)
WILDCARD = ("0.0.0.0:", "[::]:")
LOOPBACK = ("127.", "localhost:", "[::1]:")


class FromEnv(Spec):
    env: str
    """Name of an environment variable of the region's workers; its value never enters the job."""


class DataSpec(Spec):
    train: str
    """Folder or bucket URL (`s3://bucket/prefix`) with the Parquet files to train on."""
    eval: str | None = None
    """The held-out rows of this region; None: the region evaluates nothing."""


class LocalCluster(Spec):
    kind: Literal["local"] = "local"
    gpus: tuple[int, ...] = ()
    """Device numbers handed to the worker processes in turn; name one twice and two workers share it. Empty: one each."""


class SecurityFiles(Spec):
    """PEM files on the region's workers."""

    ca: str
    cert: str
    key: str


def _refuse_plain_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for key, value in options.items():
        if SECRET_OPTION.search(key) and not isinstance(value, FromEnv):
            raise ValueError(f"'{key}' looks like a secret: write {key}: {{env: NAME_OF_A_VARIABLE}} and set that variable on the workers")
    return options


StorageOptions = Annotated[dict[str, str | int | bool | FromEnv], AfterValidator(_refuse_plain_secrets)]


class Mailbox(Spec):
    """A folder or bucket through which regions exchange updates that cannot reach each other."""

    url: str
    """`s3://bucket/prefix`, or a folder: whoever writes into it and whoever reads from it must reach it."""
    storage_options: StorageOptions = {}
    """Options for fsspec, as a region's; the variables named here must be set on the workers of all regions."""


class AddressCluster(Spec):
    kind: Literal["address"]
    address: str
    """An existing scheduler: `tcp://host:8786` or `tls://host:8786`."""
    security: SecurityFiles | None = None
    """PEM files for `tls://`."""


class ClassCluster(Spec):
    kind: Literal["class"]
    path: ImportPath
    """A Dask cluster class, as `dask_kubernetes.operator:KubeCluster` or `dask_cuda:LocalCUDACluster`."""
    args: dict[str, Any] = {}
    """Its keyword arguments."""


Cluster = Annotated[LocalCluster | AddressCluster | ClassCluster, Field(discriminator="kind")]


class Device(Spec):
    kind: str = "cpu"
    """`cpu`, or a name for a GPU model (`h100`): anything but `cpu` trains on CUDA."""
    count: Count = 1
    """How many there are; one worker process uses one."""
    usd_per_hour: NonNegative = 0.0
    """Price of one."""
    samples_per_s: Positive | None = None
    """Speed of one on this task; None: measured by a short probe."""
    step_spread: NonNegative | None = None
    """For `geotrain simulate`: as simulate.step_spread, of this device."""


class WanEndpoint(Spec):
    listen: HostPort = "127.0.0.1:0"
    """Where this region's leader listens; port 0 takes a free one."""
    advertise: HostPort | None = None
    """The address the other regions dial; None: what it listens on."""
    security: SecurityFiles | None = None
    """This region's certificate (`geotrain certs` makes a trial one): mutual TLS, and signed mailbox objects. All regions or none."""
    plaintext: bool = False
    """Allow an unencrypted endpoint that is not on loopback: only inside a VPN or a test network."""
    mailbox: Mailbox | None = None
    """Where this region writes updates for regions that it cannot reach; None: the job's `mailbox`."""

    @model_validator(mode="after")
    def _plaintext_only_on_loopback(self) -> "WanEndpoint":
        if not self.listen.startswith(LOOPBACK) and not self.plaintext and self.security is None:
            raise ValueError(
                f"listening on {self.listen} would send updates unencrypted: give security: {{ca, cert, key}} "
                "(`geotrain certs` makes them), keep to 127.0.0.1, or set plaintext: true inside a VPN"
            )
        if self.plaintext and self.security is not None:
            raise ValueError("security and plaintext: true contradict each other: take one of them out")
        if self.listen.startswith(WILDCARD) and self.advertise is None:
            raise ValueError(f"listening on {self.listen} tells nobody where to dial: add advertise: host:port")
        return self


class RegionSpec(Spec):
    name: Name
    data: DataSpec
    storage_options: StorageOptions = {}
    """Options for fsspec (`endpoint_url`, `key`, ...). Secrets by reference only: `secret: {env: TOKYO_SECRET}`."""
    cluster: Cluster = LocalCluster()
    devices: Annotated[tuple[Device, ...], Field(min_length=1)] = (Device(),)
    """What there is to train on: one entry, since a region's workers step together."""
    wan: WanEndpoint = WanEndpoint()

    @field_validator("devices")
    @classmethod
    def _one_kind(cls, devices: tuple[Device, ...]) -> tuple[Device, ...]:
        if len(devices) > 1:
            raise ValueError("a region's workers step together, so they are of one kind: give one entry, or make two regions of it")
        return devices


class LinkSpec(Spec):
    mbit_per_s: Positive = 1000.0
    rtt_ms: NonNegative = 50.0
    usd_per_gb: NonNegative = 0.0
    """Egress price, charged to the sender."""
    transport: Literal["auto", "flight", "mailbox"] = "auto"
    """flight: directly, leader to leader. mailbox: through a bucket, so that nobody has to be reachable. auto: directly where that works,
    else through the mailbox, if there is one; tried before the first segment."""
    jitter_ms: NonNegative = 0.0
    """For `geotrain simulate`: the standard deviation of the way there."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For `geotrain simulate`: share of packets lost; each is sent again, and one round trip later."""


class Links(LinkSpec):
    """What the WAN is believed to be: the figures for every directed link, and the links that differ."""

    pairs: dict[str, LinkSpec] = {}
    """`tokyo>virginia: {...}` for one direction, `tokyo-virginia: {...}` for both."""
    trace: str | None = None
    """How links change over time, for `geotrain simulate`: a CSV file with the columns seconds, link (`tokyo>virginia`, `tokyo-virginia`
    or `all`) and mbit_per_s; a row holds until the link's next. 0 cuts the link."""


class Shape(Spec):
    """A WAN imitated inside the transport, so that a laptop shows what a WAN does."""

    mbit_per_s: Positive
    rtt_ms: NonNegative = 0.0


class MetricGoal(Spec):
    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> "MetricGoal":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self

    def reached(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= self.at_most  # type: ignore[operator]


class TrainSpec(Spec):
    batch_size: Count = 32
    """Rows per worker and inner step."""
    epochs: Positive | None = None
    """Passes over the data of all regions."""
    samples: Count | None = None
    """Rows to train on, all regions together; instead of epochs."""
    until: MetricGoal | None = None
    """Stop at the first segment whose held-out metric reaches this; epochs or samples stay the upper bound."""
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; parameters and updates to them stay fp32."""
    threads: Count = 1
    """Compute threads of one worker process."""
    mix_row_groups: Count = 8
    """Row groups whose rows are shuffled together."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        if (self.epochs is None) == (self.samples is None):
            raise ValueError("give either epochs or samples")
        return self


class Outage(Spec):
    """A region that is not there for a while."""

    region: str
    from_s: NonNegative
    to_s: Positive | None = None
    """None: it does not come back."""


class SimulateSpec(Spec):
    """What `geotrain simulate` assumes: what a real run measures, and what may happen to regions.

    A region that is lost leaves the view, and heals when it returns; docs/failures.md has the table.
    """

    samples_per_s: Positive = 100.0
    """Of a device that gives no `samples_per_s` of its own."""
    step_spread: NonNegative = 0.05
    """Standard deviation of an inner step's time over its mean, where the device gives none of its own."""
    touched_rows: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With sync.sparse_embeddings: the share of an embedding table's rows that a round touches."""
    exchange_ms_per_mb: NonNegative = 0.0
    """What encoding, checksums and decoding take beside the wire, both ends together, per MB of an encoded update."""
    outages: tuple[Outage, ...] = ()
    detect_s: Positive = 10.0
    """After how long a lost region leaves the view."""
    rows: Count = 10_000
    """Rows of a region whose data is not there to be counted."""
    model_mb: Positive | None = None
    """Size of the model, fp32; None: the task's."""


class ScheduleSpec(Spec):
    allocate: Literal["matched", "all"] = "matched"
    """matched: the cheapest workers that keep up with the straggler. all: everything there is."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A region may be this much slower than the straggler's load power."""
    scaling_loss: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """efficiency(n) = 1 / (1 + scaling_loss * (n - 1))"""
    segment_rounds: Count | None = None
    """Rounds between two checkpoints; None: as many as take about segment_s."""
    segment_s: Positive = 10.0


class ElasticSpec(Spec):
    """What happens when regions come and go."""

    quorum: Count | None = None
    """Regions without which training pauses; None: half of them, rounded up."""
    give_up_after_s: Positive = 3600.0
    """A run with fewer regions than its quorum waits for so long, then fails; it can be resumed."""
    speed_margin: Annotated[float, Field(gt=1)] = 2.0
    """A region that computes so many times faster or slower than planned is planned anew, with the workers that it then takes."""
    speed_for_s: Positive = 30.0
    """Seconds of inner steps, in rounds that all say so; what a round waits for the WAN does not count."""
    bad_rounds: Count = 3
    """With so many rounds in a row that end in a NaN or an infinity a region is lost and comes back from the others; if it goes on so, the
    run fails. Fewer are void: the region takes the next round from where that one began."""


class OutputSpec(Spec):
    url: str = "runs"
    """Where run folders go: a folder or any fsspec URL that the flow and all regions can write."""
    keep: Count = 3
    """Checkpoints that are kept: the newest, and besides them the best by `registry.metric`, or else by `train.until`."""


class RegistrySpec(Spec):
    url: str = "registry"
    model: Name
    """The name under which versions are kept."""
    metric: str | None = None
    """Champion and challenger are compared by this held-out metric; None: the newest version is the champion."""
    higher_is_better: bool = True


class JobSpec(Spec):
    """One training job."""

    name: Name
    task: ImportPath
    """The TrainingTask, as `module:Name`."""
    task_args: dict[str, Any] = {}
    """Keyword arguments of the task."""
    code: tuple[str, ...] = ()
    """Python files and folders shipped to every region's workers."""
    regions: Annotated[tuple[RegionSpec, ...], Field(min_length=1)]
    mailbox: Mailbox | None = None
    """For regions that cannot reach each other; a region's `wan.mailbox` takes its place."""
    links: Links | None = None
    """None: what `shape` says, or else 1000 Mbit/s, 50 ms."""
    shape: Shape | None = None
    train: TrainSpec
    sync: Sync
    simulate: SimulateSpec = SimulateSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    elastic: ElasticSpec = ElasticSpec()
    output: OutputSpec = OutputSpec()
    registry: RegistrySpec | None = None

    @model_validator(mode="after")
    def _regions_are_distinct(self) -> "JobSpec":
        names = [region.name for region in self.regions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two regions are called {', '.join(twice)}: every region needs a name of its own")
        for pair in self.links.pairs if self.links else ():
            if not any(pair == f"{a}{sign}{b}" for a in names for b in names if a != b for sign in ">-"):
                raise ValueError(f"links.pairs: '{pair}' is not 'one>other' or 'one-other' of the regions {', '.join(names)}")
        with_security = [region.name for region in self.regions if region.wan.security]
        if with_security and len(with_security) < len(names):
            bare = next(name for name in names if name not in with_security)
            raise ValueError(f"wan.security: {with_security[0]} has a certificate, {bare} has none: give it to all regions or to none")
        boxless = [region.name for region in self.regions if (region.wan.mailbox or self.mailbox) is None]
        if any(link.transport == "mailbox" for link in self.kinds_of_link()):
            for a, b in ((a, b) for a in boxless for b in names if a != b):
                if "mailbox" in (self.link(a, b).transport, self.link(b, a).transport):
                    raise ValueError(f"links: {a}-{b} goes through a mailbox, and {a} has none: add mailbox: {{url: s3://bucket/prefix}}")
        if self.train.until and not any(region.data.eval for region in self.regions):
            raise ValueError("train.until needs held-out rows: give at least one region data.eval")
        return self

    @model_validator(mode="after")
    def _merges_fit_the_regions(self) -> "JobSpec":
        sync, count = self.sync, len(self.regions)
        if isinstance(sync, Merged) and not (isinstance(sync, ModelAveraging) and sync.mode == "async"):
            if sync.quorum is not None and sync.quorum > count:
                raise ValueError(f"sync.quorum: {sync.quorum} contributions of {count} regions: it can be {count} at most")
            if sync.merge in ("median", "trimmed", "flag", "norm_clipped") and count < 3:
                raise ValueError(f"sync.merge: {sync.merge} tells the odd one out of three regions or more; there are {count}")
        if self.elastic.quorum is not None and self.elastic.quorum > count:
            raise ValueError(f"elastic.quorum: {self.elastic.quorum} regions of {count}: it can be {count} at most")
        for outage in self.simulate.outages:
            if outage.region not in [region.name for region in self.regions]:
                raise ValueError(f"simulate.outages: no region '{outage.region}'")
        return self

    @property
    def judged_by(self) -> tuple[str, bool] | None:
        """(held-out metric, whether higher is better) by which the job tells good models from bad ones."""
        if self.registry is not None and self.registry.metric is not None:
            return self.registry.metric, self.registry.higher_is_better
        if self.train.until is not None:
            return self.train.until.metric, self.train.until.at_least is not None
        return None

    def quorum_of(self, regions: int) -> int:
        """Of so many regions, those without which training pauses."""
        return min(self.elastic.quorum or -(-regions // 2), regions)

    def region(self, name: str) -> RegionSpec:
        return next(region for region in self.regions if region.name == name)

    def link(self, source: str, target: str) -> LinkSpec:
        """The believed link from one region to another."""
        if self.links is None:
            return LinkSpec(**self.shape.model_dump()) if self.shape else LinkSpec()
        for key in (f"{source}>{target}", f"{source}-{target}", f"{target}-{source}"):
            if key in self.links.pairs:
                return self.links.pairs[key]
        return self.links

    def mailbox_of(self, region: str) -> Mailbox | None:
        """Where a region writes updates for those that it cannot reach."""
        return self.region(region).wan.mailbox or self.mailbox

    def with_region(self, region: Mapping[str, Any]) -> "JobSpec":
        """The job with one more region. Raises pydantic's ValidationError."""
        tree = self.to_dict()
        return JobSpec.model_validate({**tree, "regions": [*tree["regions"], region]})

    def without_region(self, name: str) -> "JobSpec":
        """The job as it was before `with_region`."""
        return self.model_copy(update={"regions": tuple(region for region in self.regions if region.name != name)})

    def with_links(self, measured: Mapping[str, tuple[float, float]]) -> "JobSpec":
        """The job with what was measured, `tokyo>virginia` -> (Mbit/s, round trip in ms), in the place of what was believed."""
        if not measured:
            return self
        pairs = {}
        for pair, (mbit_per_s, rtt_ms) in measured.items():
            source, _, target = pair.partition(">")
            believed = self.link(source, target)
            known = {name: getattr(believed, name) for name in LinkSpec.model_fields}
            pairs[pair] = LinkSpec(**{**known, "mbit_per_s": mbit_per_s, "rtt_ms": rtt_ms})
        names = [region.name for region in self.regions]
        rest = self.links or Links(**self.link(*names[:2]).model_dump())
        return self.model_copy(update={"links": rest.model_copy(update={"pairs": {**rest.pairs, **pairs}})})

    def kinds_of_link(self) -> tuple[LinkSpec, ...]:
        """Every link that is unlike the others, and one of the others."""
        first, *rest = [region.name for region in self.regions]
        pairs = tuple(self.links.pairs.values()) if self.links else ()
        return (self.links or self.link(first, rest[0]), *pairs) if rest else ()

    def digest(self) -> str:
        """SHA-256 of the resolved job, hex."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
