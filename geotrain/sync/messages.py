"""The core's vocabulary: events that go into a RoundMachine and instructions that come out."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an update is."""

    PUSH = "push"
    """One region's contribution, applied by each neighbour when it comes."""
    CONTRIBUTION = "contribution"
    """One region's contribution to a merge round, on its way to the owner."""
    MERGED = "merged"
    """The owner's merge of a round, on its way to everyone."""


@dataclass(frozen=True, slots=True)
class Update:
    """The header of what one partition contributes to one round. The numbers travel beside it, as a payload."""

    kind: Kind
    epoch: int
    """The view it belongs to."""
    origin: str
    round: int
    fragment: int = 0
    samples: int = 0
    """Rows that went into it; the weight of a merge."""
    last: int | None = None
    """The round after which its origin wants the segment to end early; None: as planned."""

    @property
    def key(self) -> tuple[str, int, str, int, int]:
        """What makes an update the same update, however often it arrives."""
        return (self.kind.value, self.epoch, self.origin, self.round, self.fragment)


@dataclass(frozen=True, slots=True)
class View:
    """The regions that are in. `epoch` rises at every change, so that a message from an older view is known by it."""

    epoch: int
    regions: tuple[str, ...]
    owner: str
    """The region that merges."""

    def others(self, me: str) -> tuple[str, ...]:
        return tuple(region for region in self.regions if region != me)


@dataclass(frozen=True, slots=True)
class SegmentBegins:
    """The control plane opens a segment. Answered by Resume, and at its end by SegmentOver."""

    until: int
    """The segment ends before this round."""
    now: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """An inner step is done. Answered by the round's exchange when it was the round's last."""

    samples: int
    now: float


@dataclass(frozen=True, slots=True)
class Received:
    """A peer's update arrived. Answered by Apply (push), or counted towards its round's merge."""

    update: Update
    now: float


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The control plane wants the segment to end early. The regions agree on the round in band."""

    now: float


Event = SegmentBegins | StepDone | Received | StopAsked


@dataclass(frozen=True, slots=True)
class Produce:
    """Compute and encode this region's own payload for `update`, from the parameters as they are now."""

    update: Update


@dataclass(frozen=True, slots=True)
class Merge:
    """Decode the contributions, merge them in the order given, encode the result once, as the payload of `update`."""

    update: Update
    contributions: tuple[Update, ...]


@dataclass(frozen=True, slots=True)
class Send:
    update: Update
    to: str


@dataclass(frozen=True, slots=True)
class Apply:
    """Let the payload of `update` change the parameters, with this weight (1 for a merge)."""

    update: Update
    weight: float
    staleness: int


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget the payload of `update`; it must change nothing. Every discard has its reason."""

    update: Update
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """No inner step until Resume."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with inner steps."""


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """A round of this region is complete: for a merge committed, for a push sent."""

    round: int
    samples: int
    """Of this region, in this round."""
    now: float


@dataclass(frozen=True, slots=True)
class SegmentOver:
    """All that the segment owed was exchanged. Implies Hold."""

    round: int
    """The next round."""


Instruction = Produce | Merge | Send | Apply | Discard | Hold | Resume | RoundClosed | SegmentOver
