"""What the control plane tells a region's workers, and what they answer. Small values: no tensor goes this way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from geotrain.checkpoint import StoredPart
from geotrain.data.inventory import Inventory
from geotrain.job import JobSpec
from geotrain.plan.bits import Bits
from geotrain.sync.messages import View
from geotrain.sync.pace import PaceChange
from geotrain.sync.strategy import Chosen


@dataclass(frozen=True, slots=True)
class SeatOrder:
    """Take a seat: build the model, join the region's workers, open the WAN endpoint."""

    run: str
    lease: int
    """Of the process in charge: a fence, for one that slept and was overtaken."""
    job: JobSpec
    region: str
    rank: int
    world: int
    """Workers of this region."""
    rendezvous: str | None
    """tcp://host:port where the region's workers meet; None when there is one."""
    train: Inventory
    eval: Inventory | None
    view: View
    rounds_per_epoch: int
    """Of this region."""
    pace: PaceChange | None
    """The change of H that holds."""
    chosen: Chosen
    shares: tuple[float, ...]
    """Of the model, merged by each of the view's owners."""
    bits: Bits | None
    """With `codec: auto`: this region's choice."""
    token: str
    life: int
    """Higher than that of any seat that this region had in this run: by the control plane's clock alone."""
    give_up_s: float
    """How long a peer may be unreachable, with nobody saying what to do without it, before that is an error."""
    warm_start: str | None = None
    """URL of a model.safetensors to begin from."""
    restore: StoredPart | None = None
    """This region's part of the checkpoint to continue from."""
    rewind: bool = False
    """Every region continues from that checkpoint: what its end hastened, where it was early, is undone."""
    joins: bool = False
    """It comes into a run that goes on: the others give it what they agree on."""
    place: "Place | None" = None
    """Where in its rows it goes on; None: where `restore` says."""

    @property
    def scope(self) -> str:
        return scope_of(self.run, self.lease)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a region is in its rows: how they were lent last, and how far it has come since."""

    cursor: dict[str, Any]
    """Of the book of leases when they were lent."""
    round: int
    """The first round for which it goes on."""
    at: tuple[int, int] | None = None
    """(epoch, inner steps made of it; negative: some of the epoch before are still to be made); None: as the cursor says."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the endpoint of every region is, and which way each directed link takes."""

    addresses: dict[str, dict[str, str]]
    """Region -> transport -> its address there."""
    ways: dict[str, str]
    """`tokyo>virginia` -> flight or mailbox."""


@dataclass(frozen=True, slots=True)
class SeatTaken:
    region: str
    rank: int
    worker: str
    wan: dict[str, str]
    """Transport -> address for the other leaders; empty for a worker that does not lead."""
    fingerprint: dict[str, str]
    """Parameter or buffer name -> shape and dtype."""
    hashes: dict[str, str]
    """Parameter or buffer name -> SHA-256 of its values."""
    device: str
    life: int
    cursor: dict[str, Any]
    """Of its book of leases, as it begins."""
    round: int
    """The first that it trains, unless others are further."""


@dataclass(frozen=True, slots=True)
class SegmentOrder:
    """Train until a round, then write this region's part of the checkpoint."""

    number: int
    ticket: int
    """Unlike that of any other order of this run: an early end is asked of this one alone."""
    until: int
    pace: PaceChange | None
    """The change of H that holds in it."""
    view: View
    directory: Directory
    first: int
    """The round at which it began."""
    run_url: str
    """The run folder, for this region's part of the checkpoint."""


@dataclass(frozen=True, slots=True)
class SegmentDone:
    """What one region did in a segment."""

    region: str
    segment: int
    round: int
    """The next round."""
    samples: int
    steps: int
    loss: float | None
    """Mean over the segment's rows; None when there were none."""
    seconds: float
    held_s: float
    """Time without an inner step, waiting for other regions."""
    sha256: str
    """Of what all regions agree on; of the parameters and buffers where a strategy agrees on nothing before its end."""
    staging: int
    """Which of the seat's stagings has its state; the leader tells when that is written."""
    stall_s: float
    """Time without an inner step, for the checkpoint: until the one before was written, and for copying this one."""
    metrics: dict[str, tuple[float, float]]
    """Held-out sums and counts."""
    traffic: dict[str, dict[str, Any]]
    """Per target region, since the run (or its resumption) began."""
    life: int
    """Of the seat."""
    closed: tuple[tuple[int, int, int, int, int], ...]
    """Its rounds: (round, epoch, done, steps, samples), as in rounds.jsonl."""

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "SegmentDone":
        metrics = {name: (total, count) for name, (total, count) in tree["metrics"].items()}
        closed = tuple((round, epoch, done, steps, samples) for round, epoch, done, steps, samples in tree["closed"])
        return cls(**{**tree, "metrics": metrics, "closed": closed})


Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check, in one region."""

    region: str
    check: str
    verdict: Verdict
    what: str
    remedy: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One directed link."""

    to: str
    transport: str
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Probed:
    """A short look at how one worker does on this task."""

    region: str
    samples_per_s: float
    payload_bytes: int
    """One update, encoded."""
    full_bytes: int
    """The whole model, fp32."""
    work_s: float
    """Encoding, checksums and decoding of one update, both ends together."""
    device: str


def scope_of(run: str, lease: int) -> str:
    """What seats answer to: a run, in the charge of one process."""
    return f"{run}-{lease}"


def topic(scope: str, region: str) -> str:
    """The Dask event topic on which a partition reports."""
    return f"geotrain-{scope}-{region}"
