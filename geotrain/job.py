"""JobSpec: what the user asked for. Strict YAML in, frozen values out.

The only module that knows pydantic. Paths in a job are relative to the job file. The text under a field is its documentation.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from geotrain.errors import JobError
from geotrain.mistakes import explain, is_echo, members_of

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
HostPort = Annotated[str, Field(pattern=r"^[\w.\-\[\]:]+:\d{1,5}$")]

SECRET_OPTION = re.compile(r"secret|token|passw|^key$|_key$|credential", re.IGNORECASE)
WILDCARD = ("0.0.0.0:", "[::]:")
LOOPBACK = ("127.", "localhost:", "[::1]:")


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
    ca: str
    cert: str
    key: str


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


class WanEndpoint(Spec):
    listen: HostPort = "127.0.0.1:0"
    """Where this region's leader listens; port 0 takes a free one."""
    advertise: HostPort | None = None
    """The address the other regions dial; None: what it listens on."""
    plaintext: bool = False
    """Allow an unencrypted endpoint that is not on loopback: only inside a VPN or a test network."""

    @model_validator(mode="after")
    def _plaintext_only_on_loopback(self) -> "WanEndpoint":
        if not self.listen.startswith(LOOPBACK) and not self.plaintext:
            raise ValueError(
                f"listening on {self.listen} sends updates unencrypted; keep to 127.0.0.1, or set plaintext: true inside a VPN"
            )
        if self.listen.startswith(WILDCARD) and self.advertise is None:
            raise ValueError(f"listening on {self.listen} tells nobody where to dial: add advertise: host:port")
        return self


class RegionSpec(Spec):
    name: Name
    data: DataSpec
    storage_options: dict[str, str | int | bool | FromEnv] = {}
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

    @field_validator("storage_options")
    @classmethod
    def _secrets_by_reference(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if SECRET_OPTION.search(key) and not isinstance(value, FromEnv):
                raise ValueError(
                    f"'{key}' looks like a secret: write {key}: {{env: NAME_OF_A_VARIABLE}} and set that variable on the workers"
                )
        return options


class LinkSpec(Spec):
    mbit_per_s: Positive = 1000.0
    rtt_ms: NonNegative = 50.0
    usd_per_gb: NonNegative = 0.0
    """Egress price, charged to the sender."""


class Links(LinkSpec):
    """What the WAN is believed to be: the figures for every directed link, and the links that differ."""

    pairs: dict[str, LinkSpec] = {}
    """`tokyo>virginia: {...}` for one direction, `tokyo-virginia: {...}` for both."""


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


CodecName = Literal["fp32", "bf16"]


class Asgd(Spec):
    """Asynchronous SGD: every inner step's update goes to the others at once. The baseline."""

    strategy: Literal["asgd"]
    codec: CodecName = "fp32"
    max_staleness: Count = 2
    """A region pauses rather than get more than this many rounds ahead of what it has heard."""


class AsgdGa(Asgd):
    """ASGD with gradient accumulation: the sum of `every` inner steps is sent, and nobody waits."""

    strategy: Literal["asgd_ga"]  # type: ignore[assignment]
    every: Count = 8
    """Inner steps between two sends, H."""


class ModelAveraging(Spec):
    """MA: the parameters are averaged, weighted by samples."""

    strategy: Literal["ma"]
    every: Count = 8
    mode: Literal["sync", "async"] = "sync"
    """sync: a merge round for all. async: mix in what arrives, when it arrives."""
    alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """async only: weight of an arriving replica; None: 1 / regions. Divided by 1 + staleness."""
    codec: CodecName = "fp32"
    max_staleness: Count = 2

    @model_validator(mode="after")
    def _alpha_is_async(self) -> "ModelAveraging":
        if self.alpha is not None and self.mode == "sync":
            raise ValueError("alpha belongs to mode: async; a sync merge weighs by samples")
        return self


class DiLoCo(Spec):
    """DiLoCo: merged pseudo-gradients drive an outer Nesterov SGD (arXiv 2311.08105)."""

    strategy: Literal["diloco"]
    every: Count = 50
    outer_lr: Positive = 0.7
    outer_momentum: Momentum = 0.9
    codec: CodecName = "fp32"


Sync = Annotated[Asgd | AsgdGa | ModelAveraging | DiLoCo, Field(discriminator="strategy")]


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


class OutputSpec(Spec):
    url: str = "runs"
    """Where run folders go: a folder or any fsspec URL that the flow and all regions can write."""


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
    links: Links | None = None
    """None: what `shape` says, or else 1000 Mbit/s, 50 ms."""
    shape: Shape | None = None
    train: TrainSpec
    sync: Sync
    schedule: ScheduleSpec = ScheduleSpec()
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
        if self.train.until and not any(region.data.eval for region in self.regions):
            raise ValueError("train.until needs held-out rows: give at least one region data.eval")
        return self

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

    def digest(self) -> str:
        """SHA-256 of the resolved job, hex."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load_job(path: str, overrides: Mapping[str, Any] | None = None) -> JobSpec:
    """Read a job file. `overrides` are dotted keys (`sync.every`: 16) laid over it. Raises JobError."""
    file = Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"cannot read the job file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise JobError(f"{path} must hold a mapping with name, task, regions, train and sync")
    for key, value in (overrides or {}).items():
        _lay_over(tree, key, value)
    return _resolved(parse_job(tree, path), file.resolve().parent)


def parse_job(tree: Mapping[str, Any], source: str = "job") -> JobSpec:
    """Check a parsed job. Raises JobError that lists every mistake, each with its key and what to write instead."""
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        unions = (*members_of(Cluster), *members_of(Sync))
        lines = [explain(mistake, tree, JobSpec, unions) for mistake in error.errors() if not is_echo(mistake)]
        raise JobError(f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _lay_over(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    here: Any = tree
    for step in path:
        here = here[_index(here, step, dotted)] if isinstance(here, list) else here.setdefault(step, {})
        if not isinstance(here, dict | list):
            raise JobError(f"--set {dotted}: '{step}' is not a mapping")
    if isinstance(here, list):
        here[_index(here, last, dotted)] = value
    else:
        here[last] = value


def _index(items: list[Any], step: str, dotted: str) -> int:
    """A list's element by its `name`, or by its number."""
    for position, item in enumerate(items):
        if str(position) == step or (isinstance(item, dict) and item.get("name") == step):
            return position
    raise JobError(f"--set {dotted}: nothing called '{step}' there")


def _resolved(job: JobSpec, base: Path) -> JobSpec:
    """The job with its relative paths made absolute."""

    def full(url: str) -> str:
        return url if "://" in url else str((base / Path(url).expanduser()).resolve())

    def full_region(region: RegionSpec) -> RegionSpec:
        data = region.data.model_copy(update={"train": full(region.data.train), "eval": region.data.eval and full(region.data.eval)})
        cluster = region.cluster
        if isinstance(cluster, AddressCluster) and cluster.security:
            files = {key: full(value) for key, value in cluster.security.model_dump().items()}
            cluster = cluster.model_copy(update={"security": SecurityFiles(**files)})
        return region.model_copy(update={"data": data, "cluster": cluster})

    changed: dict[str, Any] = {
        "code": tuple(full(path) for path in job.code),
        "regions": tuple(full_region(region) for region in job.regions),
        "output": job.output.model_copy(update={"url": full(job.output.url)}),
    }
    if job.registry:
        changed["registry"] = job.registry.model_copy(update={"url": full(job.registry.url)})
    return job.model_copy(update=changed)
