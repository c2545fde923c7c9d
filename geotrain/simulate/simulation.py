"""A run on a virtual clock: regions step, links carry, regions are lost and come back; one segment after the other."""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from geotrain.job import JobSpec
from geotrain.plan.planner import Plan
from geotrain.simulate.body import Body
from geotrain.simulate.network import Network
from geotrain.sync.messages import Update, View

MakeBody = Callable[["Simulation", str, View, bool], Body]
"""(simulation, region, view, whether it joins without anything) -> the region"""


@dataclass(slots=True)
class Point:
    """How a simulated run stood when a segment ended."""

    seconds: float
    usd: float
    wan_bytes: int
    samples: int
    metrics: dict[str, float]


@dataclass(slots=True)
class Outcome:
    """What a simulated run came to. Seconds are virtual, bytes include headers."""

    seconds: float
    usd: float
    wan_bytes: int
    samples: int
    rounds: int
    metrics: dict[str, float]
    regions: dict[str, dict[str, float]]
    curve: list[Point]
    reached: Point | None = None
    """Where the target metric was reached first."""
    stuck: bool = False
    """Not enough regions came back for the run to end."""


@dataclass
class Node:
    """A region's place in the simulation."""

    name: str
    body: Body
    step_s: float
    spread: float
    """Standard deviation of an inner step's time over its mean."""
    run: int = 0
    """Number of the steps under way; a later number makes those void."""
    stepping: tuple[float, float, int] | None = None
    """(since, until, inner steps)"""
    lost: bool = False
    busy_s: float = 0.0
    busy_until: float = 0.0
    """With encoding or decoding."""
    worked_on: Update | None = None
    part_s: float = 0.0
    """Of the inner step that was under way when the ones before it were counted."""


@dataclass
class Simulation:
    """One job under one plan."""

    job: JobSpec
    plan: Plan
    network: Network
    make_body: MakeBody
    seed: int = 0
    now: float = 0.0
    nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._calendar: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self.first = self.until = 0
        self.view = self.plan.view(0)
        self.work_s_per_byte = self.job.simulate.exchange_ms_per_mb * 1e-9
        self.usd_per_s = sum(region.usd_per_round for region in self.plan.regions) / self.plan.round_s
        for region in self.plan.regions:
            body = self.make_body(self, region.region, self.view, False)
            self.nodes[region.region] = Node(region.region, body, self._step_s(region.region), self._spread(region.region))
        for outage in self.job.simulate.outages:
            self.at(outage.from_s, self._lose, outage.region)
            if outage.to_s is not None:
                self.at(outage.to_s, self._return, outage.region)

    def _step_s(self, region: str) -> float:
        plan = self.plan.region(region)
        return plan.rows / plan.steps_per_epoch / plan.samples_per_s

    def close(self) -> None:
        for node in self.nodes.values():
            node.body.close()

    def _spread(self, region: str) -> float:
        (device,) = self.job.region(region).devices
        return self.job.simulate.step_spread if device.step_spread is None else device.step_spread

    # Segments.

    def segment(self, until: int) -> bool:
        """One segment in all regions; False when it cannot end."""
        members = self._members()
        self.first, self.until = max(node.body.machine.at.round for node in members), until
        for node in members:
            node.body.begin(until, self.first)
            self._go(node)
        return self._run()

    def merge_fully(self) -> bool:
        """The full merge that ends a run."""
        for node in self._members():
            node.body.merge_fully()
        return self._run()

    def _members(self) -> list[Node]:
        return [self.nodes[name] for name in self.view.regions if not self.nodes[name].lost]

    def _run(self) -> bool:
        calendar = self._calendar
        while not all(node.body.machine.at.over for node in self._members()):
            # many events between two looks: looking costs as much as there are regions
            for _ in range(len(self.nodes)):
                if not calendar:
                    return all(node.body.machine.at.over for node in self._members())
                self.now, _, act, facts = heapq.heappop(calendar)
                act(*facts)
        return True

    # Events.

    def at(self, when: float, act: Callable[..., None], *facts: Any) -> None:
        heapq.heappush(self._calendar, (when, next(self._number), act, facts))

    def send(self, source: str, target: str, update: Update, payload_bytes: int, payload: Tensor | None) -> None:
        node = self.nodes.get(source)
        departs = self._work(node, payload_bytes, update) if node is not None else self.now
        arrival = self.network.send(source, target, payload_bytes, departs)
        if not math.isinf(arrival):
            self.at(arrival, self._arrive, node, target, update, payload_bytes, payload)

    def _work(self, node: Node, payload_bytes: int, update: Update) -> float:
        """Encoding, decoding and checksums of one end of a transfer, in the training thread; an update is encoded once for all targets.

        Returns when it is done.
        """
        if self.work_s_per_byte and node.worked_on is not update:
            node.worked_on = update
            node.busy_until = max(self.now, node.busy_until) + payload_bytes * self.work_s_per_byte / 2
        return max(self.now, node.busy_until)

    def _arrive(self, source: Node | None, target: str, update: Update, payload_bytes: int, payload: Tensor | None) -> None:
        node = self.nodes[target]
        if node.lost or (source is not None and source.lost):
            return
        self._work(node, payload_bytes, update)
        if node.stepping is not None and getattr(node.body.machine.strategy, "quorum", None) is not None:
            self._catch_up(node)
        node.body.take(update, payload)
        self._go(node)

    def _catch_up(self, node: Node) -> None:
        """Count the inner steps made so far, since what arrives may end the round."""
        assert node.stepping is not None
        since, until, steps = node.stepping
        made = int(steps * (self.now - since) / (until - since)) if until > since else 0
        if made:
            node.part_s = self.now - since - made * (until - since) / steps
            node.stepping, node.run = None, node.run + 1
            node.busy_s += self.now - since
            node.body.step(made)

    def _go(self, node: Node) -> None:
        """Begin the next inner steps, if the region may make any and none are under way."""
        machine = node.body.machine
        if machine.at.held or node.stepping is not None or node.lost:
            return
        steps = min(machine.run_length, node.body.stride)
        mean, deviation = steps * node.step_s, math.sqrt(steps) * node.step_s * node.spread
        seconds = mean if not deviation else max(0.2 * mean, self.random.gauss(mean, deviation))
        node.run += 1
        begin = max(self.now, node.busy_until) - node.part_s
        node.part_s = 0.0
        node.stepping = (begin, begin + seconds, steps)
        self.at(begin + seconds, self._stepped, node, node.run)

    def _stepped(self, node: Node, run: int) -> None:
        if node.run != run or node.lost or node.stepping is None:
            return
        since, _, steps = node.stepping
        node.stepping = None
        node.busy_s += self.now - since
        if not node.body.machine.at.held:  # a change of view may have come while it stepped
            node.body.step(min(steps, node.body.machine.run_length))
        self._go(node)

    def wake(self, name: str, when: float) -> None:
        self.at(max(when, self.now), self._tick, self.nodes.get(name))

    def _tick(self, node: Node | None) -> None:
        if node is not None and not node.lost:
            node.body.tick()
            self._go(node)

    # Regions that are lost, and the control plane that changes the view.

    def _lose(self, name: str) -> None:
        self.nodes[name].lost = True
        self.at(self.now + self.job.simulate.detect_s, self._leave, name)

    def _leave(self, name: str) -> None:
        if self.nodes[name].lost and name in self.view.regions and len(self.view.regions) > 1:
            self._change_view([region for region in self.view.regions if region != name])

    def _return(self, name: str) -> None:
        node = self.nodes[name]
        back = self.nodes[name] = Node(name, self.make_body(self, name, self.view, True), node.step_s, node.spread, busy_s=node.busy_s)
        back.body.succeed(node.body)
        node.body.close()
        back.body.begin(self.until, self.first)
        self._change_view([*self.view.regions, name])

    def _change_view(self, regions: list[str]) -> None:
        members = tuple(sorted(set(regions)))
        owners = [owner if owner in members else members[number % len(members)] for number, owner in enumerate(self.plan.shares)]
        self.view = View(self.view.epoch + 1, members, tuple(owners))
        for node in self._members():
            node.body.change_view(self.view)
            self._go(node)

    # Results.

    def point(self, metrics: Mapping[str, float]) -> Point:
        size = sum(link.bytes for link in self.network.links.values())
        egress = sum(link.bytes / 1e9 * link.spec.usd_per_gb for link in self.network.links.values())
        samples = sum(node.body.totals.samples for node in self.nodes.values())
        return Point(self.now, self.usd_per_s * self.now + egress, size, samples, dict(metrics))
