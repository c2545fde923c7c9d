"""A region in a simulation: the RoundMachine as it ships, and either real numbers or none.

`Ghost` moves only time and bytes; `Trained` is the parameter server and the trainer that a real run has.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from geotrain.partition.server import ParameterServer, Totals
from geotrain.partition.trainer import Trainer
from geotrain.plan.bits import Bits
from geotrain.sync.codec import Several
from geotrain.sync.feedback import WARM_UP, Coding
from geotrain.sync.fragments import Fragment
from geotrain.sync.machine import RoundMachine
from geotrain.sync.messages import (
    Apply,
    Event,
    Hold,
    Kind,
    Merge,
    MergeAsked,
    Produce,
    Received,
    Resume,
    Return,
    RoundClosed,
    SegmentBegins,
    SegmentOver,
    Send,
    Settle,
    StepDone,
    Tick,
    Update,
    View,
    ViewChanged,
    Wake,
)
from geotrain.sync.sparse import TopK, TouchedRows
from geotrain.wan.transport import Delivery, LinkTraffic

SendTo = Callable[[str, Update, int, Tensor | None], None]
"""(target, update, payload bytes, payload)"""


class Body(Protocol):
    """What a simulation asks of a region."""

    @property
    def machine(self) -> RoundMachine: ...

    @property
    def totals(self) -> Totals: ...

    @property
    def missed(self) -> int:
        """Contributions that a merge went on without."""

    @property
    def stride(self) -> int:
        """Inner steps that may be one event: one where numbers that arrive between two steps must count from there on."""

    def begin(self, until: int, first: int) -> None: ...

    def step(self, steps: int) -> None:
        """Make inner steps; no more than the machine's run_length."""

    def take(self, update: Update, payload: Tensor | None) -> None: ...

    def tick(self) -> None: ...

    def change_view(self, view: View) -> None: ...

    def merge_fully(self) -> None: ...

    def succeed(self, earlier: Self) -> None:
        """Go on where the earlier life of this region was after its last whole round: that much is known to the others."""

    def close(self) -> None:
        """Give back its threads."""


@dataclass(slots=True)
class Sizes:
    """Payload bytes by header, without numbers."""

    coding: Coding
    fragments: tuple[Fragment, ...]
    elements: int
    parameters: int
    turns: int = 1
    bits: Mapping[str, Bits] = field(default_factory=dict)
    touched: float = 1.0
    """Share of the rows of embedding tables that a round touches."""

    def of(self, update: Update) -> int:
        match update.kind:
            case Kind.CONTRIBUTION | Kind.MERGED:
                sent = update.round // self.turns if update.kind is Kind.CONTRIBUTION else None
                fragment = self.fragments[update.fragment]
                return self._coded(fragment.parametric, sent, self._choice(update)) + 4 * fragment.buffered
            case Kind.PUSH:
                buffers = 4 * (self.elements - self.parameters)
                return self._coded(self.parameters, update.round, self._choice(update)) + buffers
            case Kind.STATE:
                return 8 * self.elements
            case Kind.REPLICA | Kind.AGREED:
                return 4 * self.elements
            case _:
                return 0

    def _choice(self, update: Update) -> int:
        if (bits := self.bits.get(update.origin)) is None:
            return 0
        return bits.down if update.kind is Kind.MERGED else bits.up[update.fragment % len(bits.up)]

    def _coded(self, elements: int, sent: int | None, choice: int) -> int:
        """`sent`: how many payloads before; None: of a way that does not warm up."""
        codec = self.coding.codec
        if isinstance(codec, Several):
            return codec.options[choice].wire_bytes(elements) + 1
        if isinstance(codec, TouchedRows):
            return codec.expected(elements, self.touched)
        if self.coding.feedback == "dgc" and isinstance(codec, TopK) and sent is not None and sent // self.coding.warm_up < len(WARM_UP):
            codec = TopK(max(codec.keep, WARM_UP[sent // self.coding.warm_up]))
        return codec.wire_bytes(elements)


ABOUT_NUMBERS = frozenset((Produce, Merge, Apply, Settle))
"""Instructions that mean nothing to a region without any."""


@dataclass(slots=True)
class Ghost:
    """A region without numbers."""

    machine: RoundMachine
    rows: int
    epoch_steps: int
    sizes: Callable[[Update], int]
    send: SendTo
    wake: Callable[[float], None]
    clock: Callable[[], float]
    totals: Totals = field(default_factory=Totals)
    missed: int = 0
    stride: int = 1_000_000
    _made: int = 0
    _held_since: float | None = None

    def begin(self, until: int, first: int) -> None:
        self._held_since = self.clock()
        self._do(SegmentBegins(until, self.clock(), first))

    def step(self, steps: int) -> None:
        before, self._made = self._made, self._made + steps
        samples = self.rows * self._made // self.epoch_steps - self.rows * before // self.epoch_steps
        self.totals.steps += steps
        self._do(StepDone(samples, self.clock(), steps))

    def take(self, update: Update, payload: Tensor | None) -> None:
        self._do(Received(update, self.clock()))

    def tick(self) -> None:
        self._do(Tick(self.clock()))

    def change_view(self, view: View) -> None:
        self._do(ViewChanged(view, self.clock()))

    def merge_fully(self) -> None:
        self._do(MergeAsked(self.clock()))

    def succeed(self, earlier: Self) -> None:
        before, at = earlier.machine.at, self.machine.at
        at.round, at.done, self._made = before.round, before.done, earlier._made - before.steps

    def close(self) -> None: ...

    def _do(self, event: Event) -> None:
        for instruction in self.machine.handle(event):
            kind = type(instruction)
            if kind in ABOUT_NUMBERS:
                continue
            if kind is Send:
                update = instruction.update  # type: ignore[union-attr]
                self.send(instruction.to, update, self.sizes(update), None)  # type: ignore[union-attr]
            elif kind is Hold:
                self._held_since = self.clock()
            elif kind is Resume or kind is SegmentOver:
                if self._held_since is not None:
                    self.totals.held_s += self.clock() - self._held_since
                self._held_since = None
            elif kind is RoundClosed:
                self.totals.samples += instruction.made.samples  # type: ignore[union-attr]
            elif kind is Wake:
                self.wake(instruction.at)  # type: ignore[union-attr]
            elif kind is Return:
                self.missed += 1


@dataclass
class Wire:
    """The transport of a region with numbers: into the simulation's calendar."""

    send_to: SendTo
    traffic: dict[str, LinkTraffic] = field(default_factory=dict)

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        self.send_to(to, update, payload.numel(), payload)

    def receive(self, timeout_s: float) -> Delivery | None:
        return None

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None: ...


@dataclass(slots=True)
class Trained:
    """A region that trains. Its random numbers are its own, as in a process of its own."""

    trainer: Trainer
    server: ParameterServer
    events: Counter[str]
    """How many of each the server told of."""
    wake: Callable[[float], None]
    stride: int = 1
    _round: int = -1
    _randomness: Tensor | None = None

    @property
    def machine(self) -> RoundMachine:
        return self.server.machine

    @property
    def totals(self) -> Totals:
        return self.server.totals

    @property
    def missed(self) -> int:
        return self.events["missed"]

    def begin(self, until: int, first: int) -> None:
        self._round = -1
        self.server.handle(SegmentBegins(until, self.server.clock(), first))
        self._wake()

    def step(self, steps: int) -> None:
        before = torch.get_rng_state()
        for _ in range(steps):
            if self.machine.at.round != self._round:
                self._round = self.machine.at.round
                self.trainer.seed_round(self._round)
            elif self._randomness is not None:
                torch.set_rng_state(self._randomness)
            loss, rows = self.trainer.inner_step()
            self._randomness = torch.get_rng_state()
            try:
                self.server.stepped(rows, loss)
            except FloatingPointError as error:
                raise self.trainer.not_finite(self._round) from error
        torch.set_rng_state(before)
        self._wake()

    def take(self, update: Update, payload: Tensor | None) -> None:
        assert payload is not None
        self.server.take(Delivery(update, payload))
        self._wake()

    def tick(self) -> None:
        self.server.tick()
        self._wake()

    def change_view(self, view: View) -> None:
        self.server.change_view(view)
        self._wake()

    def merge_fully(self) -> None:
        self.server.handle(MergeAsked(self.server.clock()))

    def succeed(self, earlier: Self) -> None:
        before, at = earlier.machine.at, self.machine.at
        at.round, at.done = before.round, before.done
        self.trainer.rows.seek(at.pace.epoch(at.round), at.done)

    def close(self) -> None:
        self.trainer.rows.close()

    def _wake(self) -> None:
        for at in self.server.wake_times():
            self.wake(at)
