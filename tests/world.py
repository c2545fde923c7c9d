"""A world in virtual time: the real parameter servers, machines and replicas of several regions, on a clock of its own.

Every random choice comes from one seed. Faults: slow regions, slow links, updates that come late, twice, out of order, or from
an old view; a request to stop at any moment.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from geotrain.partition.server import ParameterServer
from geotrain.sync.codec import codec_of
from geotrain.sync.machine import round_machine
from geotrain.sync.messages import SegmentBegins, StepDone, StopAsked, Update, View
from geotrain.sync.pace import Pace
from geotrain.sync.replica import replica_of
from geotrain.sync.strategy import Strategy
from geotrain.wan.transport import Delivery, LinkTraffic

SIZE, PARAMETERS = 8, 6


@dataclass(frozen=True)
class Faults:
    """How bad it gets."""

    late_s: float = 2.0
    twice: float = 0.2
    """Share of updates that come twice."""
    ghosts: float = 0.1
    """Share of updates that also come with an old view's epoch."""
    stop_at: float | None = None


@dataclass
class Mail:
    """A transport into the world's calendar."""

    world: "World"
    traffic: dict[str, LinkTraffic] = field(default_factory=dict)

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        self.world.post(to, update, payload.clone())

    def receive(self, timeout_s: float) -> Delivery | None:
        return None

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None: ...


class World:
    """`regions` with so many inner steps per epoch each; two epochs unless told."""

    def __init__(
        self, strategy: Strategy, steps: dict[str, int], rounds_per_epoch: int, seed: int, faults: Faults | None = None, codec: str = "fp32"
    ) -> None:
        self.random, self.faults, self.now = random.Random(seed), faults or Faults(), 0.0
        self.names = sorted(steps)
        self.view = View(3, tuple(self.names), self.random.choice(self.names))
        self.speed = {name: self.random.uniform(0.05, 1.0) for name in self.names}
        self.produced = torch.zeros(SIZE, dtype=torch.float64)
        self.begin = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        self.closed: dict[str, list[int]] = {name: [] for name in self.names}
        self.applied: list[tuple[str, tuple[Any, ...], int]] = []
        """(region, key, staleness) of every update that changed parameters."""
        self.discarded: list[tuple[str, str]] = []
        self.after: dict[str, dict[int, Tensor]] = {name: {} for name in self.names}
        """Parameters after each round."""
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.servers = {name: self._server(strategy, name, steps[name], rounds_per_epoch, codec) for name in self.names}

    def _server(self, strategy: Strategy, name: str, steps: int, rounds_per_epoch: int, codec: Any) -> ParameterServer:
        local = self.begin.clone()
        machine = round_machine(strategy, name, self.view, Pace(rounds_per_epoch, lambda epoch: steps))
        replica = replica_of(strategy, local, PARAMETERS, codec_of(codec), len(self.names))

        server = ParameterServer(
            name,
            machine,
            replica,
            Mail(self),
            alive=lambda: None,
            stop_wanted=lambda: False,
            report=lambda record: self._closed(name, record.round),
            event=lambda what, facts: self.discarded.append((name, facts["reason"])),
            clock=lambda: self.now,
        )
        carry_out = server._carry_out

        def watch(instruction: Any, mine: list[Update], *, fresh: bool) -> None:
            if type(instruction).__name__ == "Apply":
                self.applied.append((name, instruction.update.key, instruction.staleness))
            carry_out(instruction, mine, fresh=fresh)

        server._carry_out = watch  # type: ignore[method-assign]
        return server

    def _closed(self, name: str, round: int) -> None:
        self.closed[name].append(round)
        self.after[name][round] = self.servers[name].replica.local.clone()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._calendar, (when, next(self._number), what))

    def post(self, to: str, update: Update, payload: Tensor) -> None:
        times = 1 + (self.random.random() < self.faults.twice)
        for _ in range(times):
            self.at(self.now + self.random.uniform(0, self.faults.late_s), lambda: self._arrive(to, update, payload))
        if self.random.random() < self.faults.ghosts:
            ghost = replace(update, epoch=self.view.epoch - 1)
            self.at(self.now + self.random.uniform(0, self.faults.late_s), lambda: self._arrive(to, ghost, torch.zeros_like(payload)))

    def _arrive(self, to: str, update: Update, payload: Tensor) -> None:
        self.servers[to].take(Delivery(update, payload.clone()))
        self._wake(to)

    def _wake(self, name: str) -> None:
        """Schedule the next inner step, if the region may make one and none is under way."""
        at = self.servers[name].machine.at
        if not at.held and name not in self._stepping:
            self._stepping.add(name)
            self.at(self.now + self.random.uniform(0.2, 1.8) * self.speed[name], lambda: self._step(name))

    def _step(self, name: str) -> None:
        self._stepping.discard(name)
        server = self.servers[name]
        assert not server.machine.at.held, f"{name} was held while it stepped"
        gradient = torch.tensor([self.random.gauss(0, 1) for _ in range(SIZE)])
        gradient[PARAMETERS:] = 0
        server.replica.local -= 0.1 * gradient
        self.produced -= 0.1 * gradient.double()
        server.handle(StepDone(self.random.randint(1, 4), self.now))
        self._wake(name)

    def segment(self, until: int, most_events: int = 100_000) -> None:
        """Run one segment to its end in all regions. Fails when nothing moves any more before that: nobody waits for ever."""
        self._stepping: set[str] = set()
        for name in self.names:
            self.at(self.now + self.random.uniform(0, 1), lambda name=name: self._begin(name, until))
        if self.faults.stop_at is not None:
            self.at(self.faults.stop_at, lambda: self.servers[self.random.choice(self.names)].handle(StopAsked(self.now)))
        for _ in range(most_events):
            if not self._calendar:
                break
            self.now, _, what = heapq.heappop(self._calendar)
            what()
        waiting = {name: server.machine.at.round for name, server in self.servers.items() if not server.machine.at.over}
        assert not waiting, f"waiting for ever in rounds {waiting}"

    def _begin(self, name: str, until: int) -> None:
        self.servers[name].handle(SegmentBegins(until, self.now))
        self._wake(name)

    def parameters(self, name: str) -> Tensor:
        return self.servers[name].replica.local
