"""A world in virtual time: the real parameter servers, machines and replicas of several regions, on a clock of its own.

Every random choice comes from one seed. What goes wrong is a `Schedule`: slow regions and links, updates that come late, lost and sent
again, twice, out of order or from an old view; links that are down for a while; regions that crash before, between or after their
sends, come back with nothing, or join late; clocks that run apart; a request to stop at any moment. A control plane, which sees a
loss only after a while, changes the view.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from geotrain.job import parse_job
from geotrain.partition.server import ParameterServer, RoundRecord
from geotrain.sync.feedback import Coding, coding_of
from geotrain.sync.fragments import make_fragments
from geotrain.sync.machine import outside, round_machine
from geotrain.sync.merging import MergeMachine
from geotrain.sync.messages import (
    Apply,
    Discard,
    Instruction,
    Kind,
    MergeAsked,
    Produce,
    Return,
    RoundMade,
    SegmentBegins,
    Settle,
    StepDone,
    StopAsked,
    Update,
    View,
)
from geotrain.sync.pace import Pace
from geotrain.sync.progress import Progress
from geotrain.sync.replica import MergeReplica, replica_of
from geotrain.sync.strategy import Merging, Strategy, strategy_of
from geotrain.wan.transport import Delivery, LinkTraffic

SIZES, PARAMETERS = (5, 17, 9, 3), 31
"""Tensors of the model; the last is a buffer."""
SIZE = sum(SIZES)
NAMES = ("cairo", "lima", "oslo", "perth", "quito")


@dataclass(frozen=True)
class Schedule:
    """How bad it gets."""

    late_s: float = 2.0
    lost: float = 0.0
    """Share of updates that the transport must send again, seconds later."""
    twice: float = 0.2
    """Share of updates that come twice."""
    ghosts: float = 0.1
    """Share of updates that also come with an old view's epoch."""
    stop_at: float | None = None
    cuts: tuple[tuple[str, float, float], ...] = ()
    """(region, from, to): no link of it works."""
    crashes: tuple[tuple[str, float, int, float | None], ...] = ()
    """(region, from when, after so many sends more, back at; None: never)"""
    joins: tuple[tuple[str, float], ...] = ()
    """(region, when): it is not there at the beginning."""
    skew: float = 0.0
    """How far clocks are off, and how differently they run, at most."""
    detect_s: float = 4.0

    @property
    def changes_views(self) -> bool:
        return bool(self.crashes or self.joins or any(to - start > self.detect_s for _, start, to in self.cuts))


def schedule(seed: int, names: tuple[str, ...], *, calm: bool = False) -> Schedule:
    """A schedule from a seed. `calm`: no region is lost or joins."""
    choose = random.Random(seed)
    some = Schedule(
        late_s=choose.uniform(0, 5),
        lost=choose.choice([0, 0, 0.1]),
        stop_at=choose.uniform(0, 20) if choose.random() < 0.2 else None,
        skew=choose.choice([0.0, 0.3]),
    )
    if choose.random() < 0.4:
        start = choose.uniform(0, 15)
        some = replace(some, cuts=((choose.choice(names), start, start + choose.uniform(0.5, 3 if calm else 20)),))
    if calm or len(names) < 3:
        return some
    if choose.random() < 0.6:
        unlucky = choose.sample(names, choose.randint(1, len(names) - 2))
        crashes = [(name, start := choose.uniform(0, 15), choose.randint(0, 3), start + choose.uniform(1, 30)) for name in unlucky]
        some = replace(some, crashes=tuple(crash if choose.random() < 0.8 else (*crash[:3], None) for crash in crashes))
    taken = {crash[0] for crash in some.crashes} | {cut[0] for cut in some.cuts}
    if (free := [name for name in names if name not in taken]) and choose.random() < 0.3 and len(names) - len(taken) > 2:
        some = replace(some, joins=((choose.choice(free), choose.uniform(0, 15)),))
    return some


class Crashed(Exception):
    """A region ends in the middle of what it does."""


@dataclass
class Node:
    """One region's process."""

    name: str
    server: ParameterServer
    offset: float
    rate: float
    alive: bool = True
    stepping: bool = False
    steps: int = 0
    sends_left: int | None = None
    number: int = field(default_factory=itertools.count().__next__)
    """Unlike any other process's, before or after."""


@dataclass
class Mail:
    """A transport into the world's calendar."""

    world: "World"
    node: Node | None = None
    traffic: dict[str, LinkTraffic] = field(default_factory=dict)

    def send(self, to: str, update: Update, payload: Tensor) -> None:
        node = self.node
        assert node is not None
        if node.sends_left is not None:
            if node.sends_left == 0:
                raise Crashed(node.name)
            node.sends_left -= 1
        self.world.post(node, to, update, payload.clone())

    def receive(self, timeout_s: float) -> Delivery | None:
        return None

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None: ...


class World:
    """`steps`: inner steps per epoch of each region."""

    def __init__(
        self,
        strategy: Strategy,
        steps: dict[str, int],
        rounds_per_epoch: int,
        seed: int,
        faults: Schedule | None = None,
        coding: Coding | None = None,
        *,
        weather: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """`weather`: the seed of all that is not arithmetic; None: the same."""
        self.random = random.Random(seed if weather is None else weather)
        self.faults, self.now, self.seed = faults or Schedule(), 0.0, seed
        self.strategy, self.steps, self.rounds_per_epoch, self.tell = strategy, steps, rounds_per_epoch, tell
        self.coding = coding or coding_of(parse_sync({"strategy": "ma"}))
        self.names = sorted(steps)
        self.begin = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        self.speed = {name: self.random.uniform(0.05, 1.0) for name in self.names}
        self.first = self.until = 0
        self.closed: dict[str, list[int]] = {name: [] for name in self.names}
        self.told: dict[str, dict[int, RoundRecord]] = {name: {} for name in self.names}
        """What each region told of its rounds."""
        self.held: dict[tuple[str, str], dict[int, set[RoundMade]]] = {}
        """(region, another) -> what the one was told of each round of the other that it holds."""
        self.made: dict[str, dict[int, int]] = {name: {} for name in self.names}
        """Inner steps of each region, by round."""
        self.applied: list[tuple[str, tuple[Any, ...], int]] = []
        """(region, key, staleness) of every update that changed parameters."""
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.after: dict[str, dict[int, Tensor]] = {name: {} for name in self.names}
        """What all agreed on after each round (merge), or the parameters (push)."""
        self.agreed: dict[tuple[int, int, int], tuple[str, Tensor, Tensor | None]] = {}
        """(lineage, rounds applied, full merges) -> who was there first, and with what."""
        self.delta: dict[str, Tensor] = {name: torch.zeros(SIZE, dtype=torch.float64) for name in self.names}
        """What inner steps did since the view began, of each region."""
        self.base = self.begin.clone()
        """What all had when the view began, of a push strategy."""
        self.pull: Tensor | None = None
        """The point towards which gradients point; None: they are noise."""
        self.sick: dict[str, Callable[[Tensor], Tensor]] = {}
        """What becomes of the pseudo-gradients of some regions."""
        self.open_contributions: set[tuple[int, int, int]] = set()
        """Of which it is not known yet whether a merge took them."""
        self.fates: dict[tuple[int, int, int], type] = {}
        """What became of a contribution whose merge is not applied yet."""
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.epoch = 3
        self.members = [name for name in self.names if name not in {name for name, _ in self.faults.joins}]
        self.view = self._new_view()
        self.nodes = {name: self._node(name, joins=name not in self.members) for name in self.names}
        for name, when in self.faults.joins:
            self.at(when, lambda name=name: self._change_members([*self.members, name]))
        for crash in self.faults.crashes:
            self.at(crash[1], lambda crash=crash: self._arm(*crash))
        for cut in self.faults.cuts:
            if cut[2] - cut[1] > self.faults.detect_s and len(self.names) > 2:
                self.at(cut[1] + self.faults.detect_s, lambda name=cut[0]: self._lose(name))
                self.at(cut[2], lambda name=cut[0]: self._regain(name))

    # Regions and views.

    def _new_view(self) -> View:
        members = tuple(sorted(self.members))
        count = self.strategy.shards if isinstance(self.strategy, Merging) else 1
        start = self.epoch % len(members)
        return View(self.epoch, members, tuple(members[(start + i) % len(members)] for i in range(count)))

    def _node(self, name: str, *, joins: bool = False) -> Node:
        steps = self.steps[name]
        at = Progress(name, outside(name) if joins else self.view, Pace(self.rounds_per_epoch, lambda epoch: steps), rows=max(1, steps))
        machine = round_machine(self.strategy, at, joins=joins)
        fragments = ()
        if isinstance(self.strategy, Merging):
            fragments = make_fragments(SIZES, PARAMETERS, self.strategy.turns, [1.0] * self.strategy.shards)
        replica = replica_of(self.strategy, self.begin.clone(), PARAMETERS, self.coding, len(self.names), fragments)
        mail = Mail(self)
        skew = self.faults.skew
        offset, rate = self.random.uniform(-1000, 1000) * bool(skew), 1 + self.random.uniform(-skew, skew)
        server = ParameterServer(
            name,
            machine,
            replica,
            mail,
            attend=lambda: None,
            stop_wanted=lambda: False,
            report=lambda record: self._closed(name, record),
            holds=lambda made: self.held.setdefault((name, made.region), {}).setdefault(made.round, set()).add(made),
            event=lambda what, facts: self.events.append((name, what, facts)),
            clock=lambda: self.now * rate + offset,
        )
        node = mail.node = Node(name, server, offset, rate)
        carry_out = server._carry_out

        def watch(instruction: Instruction, spent: list[Update], copy_of: Update | None) -> None:
            self._watch(node, instruction)
            carry_out(instruction, spent, copy_of)
            self._seen(node, instruction)

        server._carry_out = watch  # type: ignore[method-assign]
        return node

    def _closed(self, name: str, record: RoundRecord) -> None:
        self.closed[name].append(record.round)
        self.told[name][record.round] = record

    def _watch(self, node: Node, instruction: Instruction) -> None:
        if self.tell:
            self.tell(f"{self.now:8.3f}  {node.name:6} {short(instruction)}")
        match instruction:
            case Apply(update, _, staleness):
                self.applied.append((node.name, update.key, staleness))
                fate = self.fates.pop((node.number, update.round, update.fragment), None)
                if update.kind is Kind.MERGED:
                    assert len(update.members) >= (self.strategy.quorum or 1), f"merged of {update.members} alone"
                    assert fate is (Settle if node.name in update.members else Return), f"{node.name} in {update.members}: {fate}"
            case Produce(update) if update.kind is Kind.CONTRIBUTION:
                place = (node.number, update.round, update.fragment)
                assert place not in self.open_contributions, f"{node.name} contributes twice to {place[1:]}"
                self.open_contributions.add(place)
            case Settle(update) | Return(update) | Discard(update) if update.kind is Kind.CONTRIBUTION and update.origin == node.name:
                place = (node.number, update.round, update.fragment)
                self.open_contributions.remove(place)  # every contribution has one fate
                self.fates[place] = type(instruction)

    def _seen(self, node: Node, instruction: Instruction) -> None:
        """After an update changed the parameters: keep them, and compare them with whoever was there before."""
        if type(instruction).__name__ != "Apply":
            return
        replica, round = node.server.replica, instruction.update.round
        if isinstance(replica, MergeReplica):
            self.after[node.name][round] = replica.theta.clone()
        elif instruction.update.kind is Kind.AGREED:
            self.base, self.delta[node.name] = replica.local.clone(), torch.zeros(SIZE, dtype=torch.float64)

    def _compare(self, node: Node) -> None:
        """Agreement: as many rounds in one lineage, the same parameters and outer momentum, to the bit."""
        machine, replica = node.server.machine, node.server.replica
        if not isinstance(machine, MergeMachine) or machine.waiting_for:
            return
        key, mine = (machine.lineage, machine.applied, machine.fulls), (node.name, replica.theta.clone(), clone(replica.momentum))
        other, theta, momentum = self.agreed.setdefault(key, mine)
        assert torch.equal(theta, mine[1]), f"{node.name} and {other} differ after {machine.applied} rounds in view {machine.lineage}"
        assert momentum is None or torch.equal(momentum, mine[2]), f"outer momentum of {node.name} and {other} differ"

    def _change_members(self, members: list[str]) -> None:
        self.members, self.epoch = sorted(set(members)), self.epoch + 1
        self.view = view = self._new_view()
        for name in self.members:
            self.at(max(self.now + self.random.uniform(0, 2), self._healed(name)), lambda name=name: self._tell_view(name, view))

    def _tell_view(self, name: str, view: View) -> None:
        node = self.nodes[name]
        if node.alive:
            self._do(node, lambda: node.server.change_view(view))

    def _lose(self, name: str) -> None:
        if name in self.members and len(self.members) > 1 and (not self.nodes[name].alive or self._healed(name) > self.now):
            self._change_members([member for member in self.members if member != name])

    def _regain(self, name: str) -> None:
        if name not in self.members and self.nodes[name].alive:
            self._change_members([*self.members, name])

    def _arm(self, name: str, when: float, sends: int, back: float | None) -> None:
        """The region crashes at its next send but so many; or at once, if it sends nothing for a while."""
        node = self.nodes[name]
        node.sends_left = sends
        self.at(self.now + 5, lambda: self._crash(node))
        if back is not None:
            self.at(max(back, self.now + 6), lambda: self._restart(name))

    def _crash(self, node: Node) -> None:
        if node.alive:
            node.alive = False
            self.note(f"{node.name} crashes")
            self.at(self.now + self.faults.detect_s, lambda: self._lose(node.name))

    def _restart(self, name: str) -> None:
        """A new process in the region, which knows nothing."""
        self.note(f"{name} is back with nothing")
        self.nodes[name] = node = self._node(name, joins=True)
        self.delta[name] = torch.zeros(SIZE, dtype=torch.float64)
        self._do(node, lambda: node.server.handle(SegmentBegins(self.until, node.server.clock(), self.first)))
        self._change_members([*self.members, name])

    # Time.

    def note(self, text: str) -> None:
        if self.tell:
            self.tell(f"{self.now:8.3f}  -- {text}")

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._calendar, (when, next(self._number), what))

    def _healed(self, name: str) -> float:
        """When the region's links work again."""
        return max((to for region, start, to in self.faults.cuts if region == name and start <= self.now < to), default=self.now)

    def post(self, node: Node, to: str, update: Update, payload: Tensor) -> None:
        for _ in range(1 + (self.random.random() < self.faults.twice)):
            self._post_once(node, to, update, payload)
        if self.random.random() < self.faults.ghosts:
            self._post_once(node, to, replace(update, epoch=update.epoch - 10), torch.zeros_like(payload))

    def _post_once(self, node: Node, to: str, update: Update, payload: Tensor) -> None:
        way = self.random.uniform(0, self.faults.late_s) + (self.random.uniform(3, 6) if self.random.random() < self.faults.lost else 0)
        lost_with_sender = self.random.random() < 0.5

        def arrive() -> None:
            target = self.nodes[to]
            if not target.alive or (not node.alive and lost_with_sender):
                return
            self._do(target, lambda: target.server.take(Delivery(update, payload.clone())))

        self.at(max(self.now + way, max(self._healed(node.name), self._healed(to)) + way / 2), arrive)

    def _do(self, node: Node, what: Callable[[], Any]) -> None:
        """Let a region act; then see what it does next."""
        if not node.alive:
            return
        try:
            what()
        except Crashed:
            self._crash(node)
            return
        self._compare(node)
        self._wake(node)
        if node.server._wake_at:
            due = (min(node.server._wake_at) - node.offset) / node.rate
            self.at(max(due, self.now) + 1e-6, lambda: node.server._wake_at and self._do(node, node.server.tick))

    def _wake(self, node: Node) -> None:
        """Schedule the next inner step, if the region may make one and none is under way."""
        if not node.server.machine.at.held and not node.stepping:
            node.stepping = True
            self.at(self.now + self.random.uniform(0.2, 1.8) * self.speed[node.name], lambda: self._do(node, lambda: self._step(node)))

    def _step(self, node: Node) -> None:
        """An inner step. What it does depends on the seed, the region and the number of the step alone."""
        node.stepping = False
        at = node.server.machine.at
        if at.held:
            return  # a view changed, or a merge came, while it stepped: its rows are taken again
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + NAMES.index(node.name) * 10_007 + node.steps)
        node.steps += 1
        gradient = torch.randn(SIZE, generator=generator)
        gradient[PARAMETERS:] = 0
        replica = node.server.replica
        if self.pull is not None:
            gradient = 0.1 * gradient + 5 * (replica.local - self.pull)
        replica.local -= 0.1 * gradient
        if node.name in self.sick and at.steps + 1 == at.quota:
            replica.local.copy_(replica.theta - self.sick[node.name](replica.theta - replica.local))
        self.delta[node.name] -= 0.1 * gradient.double()
        self.made[node.name][at.round] = self.made[node.name].get(at.round, 0) + 1
        node.server.handle(StepDone(1 + node.steps % 4, node.server.clock()))

    def segment(self, until: int, most_events: int = 200_000) -> None:
        """Run one segment to its end in all regions that are in. Fails when nothing moves before that: nobody waits for ever."""
        self.first, self.until = max(node.server.machine.at.round for node in self.there()), until
        for name in self.names:
            self.at(self.now + self.random.uniform(0, 1), lambda name=name: self._begin(name, until))
        if self.faults.stop_at is not None:
            who = self.random.choice(self.names)
            self.at(self.faults.stop_at, lambda: self._do(self.nodes[who], lambda: self.nodes[who].server.handle(StopAsked(0.0))))
        self._run(most_events)

    def kill_and_resume(self) -> None:
        """End every region, and begin it again, in a new view, from what a checkpoint keeps."""
        self.epoch += 1
        self.view = replace(self.view, epoch=self.epoch)
        for name, old in self.nodes.items():
            at, replica = old.server.machine.at, old.server.replica
            self.nodes[name] = node = self._node(name)
            node.steps, (now, then) = old.steps, (node.server.machine.at, node.server.replica)
            now.round, now.done = at.round, at.done
            node.server.machine.applied = at.round
            then.local.copy_(replica.local)
            then.load_state({key: tensor.clone() for key, tensor in replica.state().items()})
            node.server.rewind()
            if isinstance(machine := node.server.machine, MergeMachine):
                self.open_contributions |= {(node.number, *place) for place in machine.mine}  # their merges are to be applied anew

    def merge_fully(self) -> None:
        """The full merge that ends a run, in all regions that are in."""
        for node in self.there():
            self.at(
                self.now + self.random.uniform(0, 1),
                lambda node=node: self._do(node, lambda: node.server.handle(MergeAsked(node.server.clock()))),
            )
        self._run(10_000)

    def _run(self, most_events: int) -> None:
        """Until nothing happens any more."""
        for _ in range(most_events):
            if not self._calendar:
                break
            self.now, _, what = heapq.heappop(self._calendar)
            what()
        waiting = {node.name: node.server.machine.at.round for node in self.there() if not node.server.machine.at.over}
        assert not waiting, f"waiting for ever in rounds {waiting}"

    def _begin(self, name: str, until: int) -> None:
        node = self.nodes[name]
        if node.server.machine.at.over:
            self._do(node, lambda: node.server.handle(SegmentBegins(until, node.server.clock())))

    def there(self) -> list[Node]:
        """The regions that are in and alive."""
        return [self.nodes[name] for name in self.members if self.nodes[name].alive]

    def parameters(self, name: str) -> Tensor:
        return self.nodes[name].server.replica.local


def clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def parse_sync(sync: dict[str, Any], regions: int = 5) -> Any:
    """A job's sync section, checked as a job's is. Raises JobError."""
    tree = {
        "name": "w",
        "task": "a:B",
        "regions": [{"name": name, "data": {"train": "t"}} for name in NAMES[:regions]],
        "train": {"epochs": 1},
        "sync": sync,
    }
    return parse_job(tree).sync


def make_world(
    sync: dict[str, Any],
    seed: int,
    faults: Schedule | None = None,
    *,
    regions: int | None = None,
    weather: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> World:
    """A world of a job's sync section; what is left open comes from the seed."""
    choose = random.Random(seed)
    names = NAMES[: regions or choose.randint(2, 4)]
    spec = parse_sync(sync, len(names))
    strategy = strategy_of(spec, len(names))
    steps = {name: choose.randint(0 if n else 1, 14) for n, name in enumerate(names)}
    rounds = max(1, -(-max(steps.values()) // strategy.steps_per_round))
    faults = faults if faults is not None else schedule(seed, names)
    return World(strategy, steps, rounds, seed, faults, coding_of(spec), weather=weather, tell=tell)


def short(instruction: Any) -> str:
    """An instruction in a line."""
    name, update = type(instruction).__name__, getattr(instruction, "update", None)
    if update is None:
        return str(instruction)
    where = f"{update.kind.value} of {update.origin}, view {update.epoch}, round {update.round}, fragment {update.fragment}"
    more = {slot: getattr(instruction, slot) for slot in instruction.__slots__ if slot not in ("update", "contributions")}
    return f"{name:8} {where}" + "".join(f", {key} {value}" for key, value in more.items())
