"""The parameter server: carries out the RoundMachine's instructions with a replica and a transport, in the training thread."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, assert_never

import torch
from torch import Tensor

from geotrain.errors import StateDamaged, UpdateUnusable
from geotrain.partition.group import Directive
from geotrain.sync.machine import RoundMachine
from geotrain.sync.merging import MergeMachine
from geotrain.sync.messages import (
    Adopt,
    Apply,
    Discard,
    Event,
    Hold,
    Instruction,
    Kind,
    Merge,
    MergeAsked,
    Produce,
    Readdress,
    Received,
    Resume,
    Return,
    RoundClosed,
    RoundMade,
    SegmentBegins,
    SegmentOver,
    Send,
    Settle,
    StepDone,
    StopAsked,
    Tick,
    Update,
    View,
    ViewBegins,
    ViewChanged,
    Wake,
)
from geotrain.sync.pushing import PushMachine
from geotrain.sync.replica import Replica
from geotrain.wan.transport import Delivery, Transport

POLL_S = 0.1
DRAIN_S = 30.0
DIGEST = hashlib.sha256().digest_size


@dataclass(slots=True)
class RoundRecord:
    """One line of rounds.jsonl."""

    region: str
    round: int
    at: float
    """Unix time."""
    samples: int
    loss: float | None
    held_s: float
    compute_s: float | None
    """The rest of the time since the round before; None for the first of a segment."""
    epoch: int
    done: int
    """Inner steps of that epoch that this region has made, this round's included; negative: it owes some of the epoch before."""
    steps: int
    settled: dict[str, int]
    """Region -> the first of its rounds that is not in what this region holds."""
    links: dict[str, dict[str, float]] = field(default_factory=dict)
    """To each peer since the round before: bytes, retries, seconds blocked and hidden; and its round trip and goodput of late."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Totals:
    """What a segment adds up to."""

    samples: int = 0
    steps: int = 0
    loss: float = 0.0
    """Summed over rows."""
    held_s: float = 0.0
    closed: dict[int, tuple[int, int, int, int, int]] = field(default_factory=dict)
    """Round -> (round, epoch, done, steps, samples); of one that was trained twice, since its first time came to nothing, the second."""


@contextmanager
def _naming(update: Update) -> Iterator[None]:
    """A payload that decodes to nothing is its origin's fault. Raises UpdateUnusable."""
    try:
        yield
    except ValueError as error:
        raise UpdateUnusable(update.origin, update.round, error) from error


def _with_hash(payload: Tensor) -> Tensor:
    """What a region goes on from in place of its own numbers ends with its SHA-256."""
    return torch.cat([payload, torch.frombuffer(bytearray(_digest(payload)), dtype=torch.uint8)])


def _verified(update: Update, payload: Tensor) -> Tensor:
    """The payload without its hash. Raises StateDamaged."""
    numbers, digest = payload[:-DIGEST], payload[-DIGEST:]
    if _digest(numbers) != digest.numpy().tobytes():
        raise StateDamaged(update.origin, update.round)
    return numbers


def _digest(payload: Tensor) -> bytes:
    numbers: Any = payload.numpy()
    return hashlib.sha256(numbers).digest()


@dataclass
class ParameterServer:
    """One partition's side of the exchange. All of it runs in the training thread; the transport has threads of its own."""

    region: str
    machine: RoundMachine
    replica: Replica
    transport: Transport
    attend: Callable[[], None]
    """Does what the control plane has said meanwhile. Raises when it wants an end."""
    stop_wanted: Callable[[], bool]
    report: Callable[[RoundRecord], None]
    event: Callable[[str, dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    bad_rounds: int = 1
    """So many in a row with a NaN or an infinity are an error; fewer are void."""
    after_round: Callable[[float], None] = lambda compute_s: None
    """Told how long the round's inner steps took, without waiting."""
    totals: Totals = field(default_factory=Totals)
    settled: dict[str, int] = field(default_factory=dict)
    """Region -> the first of its rounds that is not in what this region holds, as far as it was told since the run began."""
    holds: Callable[[RoundMade], None] = lambda made: None
    """Told of every round of another region that is in what this one holds from now on."""
    _payloads: dict[tuple[str, int, str, int, int], Tensor] = field(default_factory=dict)
    _wake_at: list[float] = field(default_factory=list)
    _told_wake: list[float] = field(default_factory=list)
    _changed: bool = False
    _stop_told: bool = False
    _bad_rounds: int = 0
    """In a row."""
    _void: bool = False
    _losses: list[tuple[Tensor, int]] = field(default_factory=list)
    """Of the round so far: (mean, rows) per inner step, left on the device until the round is full."""
    _round_loss: float = 0.0
    _round_held_s: float = 0.0
    _held_since: float | None = None
    _closed_at: float | None = None
    _busy_when_held: dict[str, float] = field(default_factory=dict)
    _links_before: dict[str, dict[str, float]] = field(default_factory=dict)

    def begin(self, until: int, first: int | None = None, *, again: bool = False) -> None:
        """Open a segment that ends before round `until` and began at `first`; or open it again, in another view."""
        if not again:
            self.totals, self._stop_told = Totals(), False
        self._closed_at = None
        self.handle(SegmentBegins(until, self.clock(), first, again))
        if self.machine.at.held and not self.machine.at.over:
            self._hold()

    def merge_fully(self) -> None:
        """Make one of the replicas of all regions."""
        self.handle(MergeAsked(self.clock()))
        self.directive()

    def change_view(self, view: View) -> None:
        """The control plane changed who is in. What a push strategy then merges has the round under way: one that is wrong ends before."""
        at = self.machine.at
        if isinstance(self.machine, PushMachine) and view.epoch > at.view.epoch and self._losses and self._went_wrong():
            at.samples = 0
            self._close_round(at.close_round(self.clock()).made)
        self.handle(ViewChanged(view, self.clock()))

    def step_done(self, samples: int, loss: Tensor) -> Directive:
        """After an inner step: exchange what is due, take what came, wait if need be. Raises what `stepped` does."""
        self.stepped(samples, loss)
        return self.directive()

    def stepped(self, samples: int, loss: Tensor) -> None:
        """Count an inner step and exchange what is due, without waiting for anything.

        `loss`: the step's mean, a detached scalar. A round, full or cut short, whose loss or parameters are not finite is void: the region
        begins the next from where this one began, and nothing of it leaves the region but that it counts for nothing. Raises
        FloatingPointError for the last of `bad_rounds` in a row.
        """
        self._losses.append((loss, samples))
        self.totals.steps += 1
        at = self.machine.at
        void = at.steps + 1 == at.quota and self._went_wrong()
        self.handle(StepDone(samples, self.clock(), void=void))

    def _went_wrong(self) -> bool:
        """The round's steps are done: whether its loss, or the parameters, are not finite. Then all is as when it began."""
        self._add_up_losses()
        if math.isfinite(self._round_loss) and math.isfinite(self.replica.local.sum().item()):
            self._bad_rounds = 0
            return False
        self._bad_rounds += 1
        if self._bad_rounds >= self.bad_rounds:
            raise FloatingPointError("loss or parameters")
        self.event("void_round", {"round": self.machine.at.round, "in_a_row": self._bad_rounds})
        self._round_loss = 0.0
        self.replica.void()
        self._changed = self._void = True
        return True

    def _add_up_losses(self) -> None:
        """Of the round."""
        if not self._losses:
            return
        first = self._losses[0][0]
        weights = torch.tensor([rows for _, rows in self._losses], dtype=first.dtype, device=first.device)
        self._round_loss += (torch.stack([mean for mean, _ in self._losses]) * weights).sum().item()
        self._losses.clear()

    def directive(self) -> Directive:
        """Take what came; while the machine holds, wait for more."""
        self.attend()
        if self.stop_wanted() and not self._stop_told:
            self._stop_told = True
            self.handle(StopAsked(self.clock()))
        at = self.machine.at
        waited = at.held
        while True:
            while (delivery := self.transport.receive(0)) is not None:
                self.take(delivery)
            self.tick()
            if waited:
                self.attend()  # the last word before a step, which may take long, is not that it waits
            if not at.held or at.over:
                break
            waited = True
            wait_s = min([POLL_S, *(max(0.0, wake_at - self.clock()) for wake_at in self._wake_at)])
            if (late := self.transport.receive(wait_s)) is not None:
                self.take(late)
        changed, self._changed = self._changed, False
        void, self._void = self._void, False
        return Directive(at.round, changed, at.over, at.pace.epoch(at.round), at.done + at.steps, void)

    def waits_for(self) -> str | None:
        """What it holds for while nothing of its own is under way; None while it does not."""
        at, links = self.machine.at, list(self.transport.traffic.values())
        return at.waits_for if at.held and not at.over and all(link.busy_since is None for link in links) else None

    def tick(self) -> None:
        """Tell the machine the time, if it asked to be told."""
        now = self.clock()
        if any(at <= now for at in self._wake_at):
            self._wake_at = [at for at in self._wake_at if at > now]
            self.handle(Tick(now))

    def wake_times(self) -> list[float]:
        """When `tick` is to be called, on this server's clock; each is told once."""
        times, self._told_wake = [at for at in self._wake_at if at not in self._told_wake], list(self._wake_at)
        return times

    def rewind(self) -> None:
        """After a checkpoint was loaded whose segment ended early: merges that it hastened are applied when they are due."""
        for (round, fragment), payload in self.replica.rewind().items():
            assert isinstance(self.machine, MergeMachine)
            self._payloads[self.machine.postpone(round, fragment).key] = payload
            self._changed = True

    def take(self, delivery: Delivery) -> None:
        """An update arrived; one that is here already keeps its first payload."""
        update = delivery.update
        known = update.key in self._payloads
        if not known and update.kind is not Kind.HELLO:
            self._payloads[update.key] = delivery.payload
        self.handle(Received(update, self.clock()), copy_of=update if known else None)

    def handle(self, event: Event, *, copy_of: Update | None = None) -> None:
        """Let the machine decide, and carry out what it says. `copy_of`: what arrived is here already."""
        spent: list[Update] = []
        for instruction in self.machine.handle(event):
            self._carry_out(instruction, spent, copy_of)
        for update in spent:
            self._payloads.pop(update.key, None)

    def _carry_out(self, instruction: Instruction, spent: list[Update], copy_of: Update | None) -> None:
        """`spent`: payloads to forget once all instructions are carried out."""
        match instruction:
            case Produce(update):
                if self._losses:  # a round cut short
                    self._went_wrong()
                self._payloads[update.key] = self.replica.produce(update)
                self._changed |= self.replica.produce_moves
                if update.kind is Kind.PUSH:
                    spent.append(update)
            case Merge(update, contributions):
                self._merge(update, contributions)
            case Send(update, to):
                self.transport.send(to, update, self._payload(update))
                if update.kind is Kind.REPLICA:
                    spent.append(update)
            case Apply(update, weight, _, early):
                payload = self._payloads.pop(update.key)
                if early:
                    self.replica.remember(update, payload)
                with _naming(update):
                    self.replica.apply(update, _verified(update, payload) if update.kind is Kind.AGREED else payload, weight)
                self._changed = True
                for made in update.made:
                    self._settle(made)
            case Return(update, weight):
                self.replica.take_back(update, self._payloads.pop(update.key), weight)
                self.event("missed", {"round": update.round, "fragment": update.fragment, "weight_of_the_next": weight})
            case Settle(update):
                self._payloads.pop(update.key, None)
            case Readdress(old, new):
                self._payloads[new.key] = self._payloads.pop(old.key)
            case Adopt(update):
                with _naming(update):
                    self.replica.adopt(_verified(update, self._payloads.pop(update.key)))
                self._changed = True
                self.event("healed", {"round": update.round, "by": update.origin})
            case ViewBegins():
                self.replica.new_view()
            case Discard(update, reason):
                if copy_of is None or update.key != copy_of.key:
                    self._payloads.pop(update.key, None)
                self.event("discarded", {"origin": update.origin, "round": update.round, "fragment": update.fragment, "reason": reason})
            case RoundClosed(made):
                self._close_round(made)
            case Hold():
                self._hold()
            case Resume() | SegmentOver():
                self._count_hold()
            case Wake(at):
                self._wake_at.append(at)
            case _:
                assert_never(instruction)

    def _settle(self, made: RoundMade) -> None:
        self.settled[made.region] = max(self.settled.get(made.region, 0), made.round + 1)
        if made.region != self.region:
            self.holds(made)

    def _payload(self, update: Update) -> Tensor:
        match update.kind:
            case Kind.HELLO:
                return torch.empty(0, dtype=torch.uint8)
            case Kind.STATE:
                return _with_hash(self.replica.share())
            case _:
                return self._payloads[update.key]

    def _merge(self, update: Update, contributions: tuple[Update, ...]) -> None:
        parts = [(part, self._payloads[part.key]) for part in contributions]
        merged, suspects = self.replica.merge(update, parts)
        self._payloads[update.key] = _with_hash(merged) if update.kind is Kind.AGREED else merged
        for part in contributions:
            if part.origin != self.region or part.kind is Kind.REPLICA:  # a contribution of its own is kept until it is settled
                del self._payloads[part.key]
        for origin, what in suspects.items():
            self.event("suspect", {"origin": origin, "round": update.round, "fragment": update.fragment, "what": what})

    def _hold(self) -> None:
        self._held_since = now = self.clock()
        self._busy_when_held = {to: link.busy(now) for to, link in list(self.transport.traffic.items())}

    def _count_hold(self) -> None:
        if self._held_since is None:
            return
        now = self.clock()
        waited, self._held_since = now - self._held_since, None
        self.totals.held_s += waited
        self._round_held_s += waited
        for to, link in list(self.transport.traffic.items()):
            link.blocked_s += max(0.0, min(waited, link.busy(now) - self._busy_when_held.get(to, 0.0)))

    def _close_round(self, closed: RoundMade) -> None:
        self._count_hold()
        self.totals.loss += self._round_loss
        mean = self._round_loss / closed.samples if closed.samples else None
        held_s = round(self._round_held_s, 6)
        _, _, _, _, before = self.totals.closed.get(closed.round, (0, 0, 0, 0, 0))
        self.totals.samples += closed.samples - before
        self.totals.closed[closed.round] = (closed.round, closed.epoch, closed.done, closed.steps, closed.samples)
        now, compute_s = self.clock(), None
        if self._closed_at is not None:
            compute_s = max(0.0, now - self._closed_at - self._round_held_s)
            self.after_round(compute_s)
        self._closed_at = now
        times = held_s, compute_s and round(compute_s, 6)
        at, settled = (closed.epoch, closed.done, closed.steps), dict(self.settled)
        self.report(RoundRecord(self.region, closed.round, time.time(), closed.samples, mean, *times, *at, settled, self._links()))
        self._round_loss = self._round_held_s = 0.0

    def _links(self) -> dict[str, dict[str, float]]:
        now, links = self.clock(), {}
        for to, link in list(self.transport.traffic.items()):
            busy = link.busy(now)
            sums = {"wire_bytes": link.wire_bytes, "retries": link.retries, "blocked_s": link.blocked_s, "hidden_s": busy - link.blocked_s}
            before, self._links_before[to] = self._links_before.get(to, {}), sums
            since = {name: round(value - before.get(name, 0), 6) for name, value in sums.items()}
            links[to] = {**since, "rtt_s": round(link.rtt_s, 6), "bytes_per_s": round(link.bytes_per_s)}
        return links

    def drain(self) -> None:
        """Wait until the peers have acknowledged everything; the segment's own end says that they will."""
        until = self.clock() + DRAIN_S
        while not self.transport.drain(POLL_S):
            self.attend()
            if self.clock() > until:
                self.event("slow_acknowledgement", {"waited_s": DRAIN_S})
                until = self.clock() + DRAIN_S
