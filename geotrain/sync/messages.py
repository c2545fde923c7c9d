"""The core's vocabulary: events that go into a RoundMachine and instructions that come out."""

from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What an update is."""

    PUSH = "push"
    """One region's contribution, applied by each neighbour when it comes."""
    CONTRIBUTION = "contribution"
    """One region's contribution to a merge round, on its way to the owner of the fragment."""
    MERGED = "merged"
    """The owner's merge of a fragment in a round, on its way to everyone."""
    REPLICA = "replica"
    """One region's parameters as they are, on their way to a full merge."""
    AGREED = "agreed"
    """The mean of all replicas, on its way to everyone."""
    HELLO = "hello"
    """How far its origin is, at the beginning of a view. No payload."""
    STATE = "state"
    """The agreed parameters and the outer optimizer, for a region that is behind."""


@dataclass(frozen=True, slots=True)
class RoundMade:
    """What a region trained on in a round, or in a part of it. Who holds that knows this, though the region told nobody else before it was
    lost."""

    region: str
    life: int
    """Of its seat."""
    round: int
    epoch: int
    done: int
    """Where it then is in its rows: an epoch, and the inner steps made of it; negative: some of the epoch before are still to be made."""
    steps: int
    """Of this round."""
    samples: int
    """Rows of this round that count."""


@dataclass(frozen=True, slots=True)
class Update:
    """The header of what one partition contributes to one round. The numbers travel beside it, as a payload."""

    kind: Kind
    epoch: int
    """The view it belongs to."""
    origin: str
    round: int
    """Of a HELLO or a STATE: the first round that its origin has not applied."""
    fragment: int = 0
    samples: int = 0
    """Rows that went into it; the weight of a merge."""
    last: int | None = None
    """The round before which its origin wants the segment to end early; None: as planned."""
    members: tuple[str, ...] = ()
    """Of a merge: the regions whose contributions are in it."""
    made: tuple[RoundMade, ...] = ()
    """The rounds that are in it. Of a full merge: the last ones of its members, and what they had of the round under way; and the last of
    other regions that a member holds."""
    lineage: int = 0
    """Of a HELLO: the last view in which its origin was up to date."""

    @property
    def key(self) -> tuple[str, int, str, int, int]:
        """What makes an update the same update, however often it arrives."""
        return (self.kind.value, self.epoch, self.origin, self.round, self.fragment)


@dataclass(frozen=True, slots=True)
class View:
    """The regions that are in. `epoch` rises at every change, so that a message from an older view is known by it."""

    epoch: int
    regions: tuple[str, ...]
    owners: tuple[str, ...]
    """The region that merges, for each fragment in turn; repeated when there are more fragments."""
    _members: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_members", frozenset(self.regions))

    def has(self, region: str) -> bool:
        """At once, however many there are."""
        return region in self._members

    def others(self, me: str) -> tuple[str, ...]:
        return tuple(region for region in self.regions if region != me)

    def owner(self, fragment: int) -> str:
        return self.owners[fragment % len(self.owners)]


@dataclass(frozen=True, slots=True)
class SegmentBegins:
    """The control plane opens a segment. Answered by Resume, and at its end by SegmentOver."""

    until: int
    """The segment ends before this round."""
    now: float
    first: int | None = None
    """The round at which it began; None: the one that this region is in. An earlier end that was agreed before does not count."""
    again: bool = False
    """The same segment goes on, in another view: what was agreed of its end holds."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """Inner steps are done. Answered by the round's exchange when the last was the round's last."""

    samples: int
    now: float
    steps: int = 1
    """Never more than the machine's `run_length`."""
    void: bool = False
    """The round that this ends went wrong: its rows are not to count."""


@dataclass(frozen=True, slots=True)
class Received:
    """A peer's update arrived. Answered by Apply (push), or counted towards its round's merge."""

    update: Update
    now: float


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that a Wake named has come."""

    now: float


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """The control plane changed who is in. Answered by finding out who is ahead (merge), or by a full merge (push)."""

    view: View
    now: float


@dataclass(frozen=True, slots=True)
class MergeAsked:
    """Merge the replicas of all regions into one: the end of a run whose regions are not equal. Answered by SegmentOver."""

    now: float


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The control plane wants the segment to end early. The regions agree on the round in band."""

    now: float


Event = SegmentBegins | StepDone | Received | Tick | ViewChanged | MergeAsked | StopAsked


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
    """Hand an update to the transport. A HELLO has no payload; a STATE's is what all agreed on, taken now."""

    update: Update
    to: str


@dataclass(frozen=True, slots=True)
class Apply:
    """Let the payload of `update` change the parameters, with this weight (1 for a merge)."""

    update: Update
    weight: float
    staleness: int
    early: bool = False
    """A merge, before its time: the segment ends earlier than planned. Who resumes from there can have it applied when it is due."""


@dataclass(frozen=True, slots=True)
class Return:
    """A merge went on without this contribution: put its payload, times `weight`, into what the next one sends."""

    update: Update
    weight: float


@dataclass(frozen=True, slots=True)
class Settle:
    """This region's own contribution is in the merge: its payload is no longer needed."""

    update: Update


@dataclass(frozen=True, slots=True)
class Readdress:
    """The payload kept for `old` is now that of `new`: the same contribution, in a new view."""

    old: Update
    new: Update


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take the peer's agreed parameters and outer optimizer for one's own; local progress since then is void."""

    update: Update


@dataclass(frozen=True, slots=True)
class ViewBegins:
    """What a replica keeps about the regions of a view ends here."""

    view: View


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
class Wake:
    """Send a Tick at this time, on the caller's clock."""

    at: float


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """This region's inner steps of a round are done and contributed."""

    made: RoundMade
    now: float


@dataclass(frozen=True, slots=True)
class SegmentOver:
    """All that the segment owed was exchanged. Implies Hold."""

    round: int
    """The next round."""


Instruction = (
    Produce
    | Merge
    | Send
    | Apply
    | Return
    | Settle
    | Readdress
    | Adopt
    | ViewBegins
    | Discard
    | Hold
    | Resume
    | Wake
    | RoundClosed
    | SegmentOver
)
