"""The invariants of the core (docs/strategies.md, "What holds"), checked on a world in which a run came to its end."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from geotrain.errors import JobError
from geotrain.sync.feedback import ErrorFeedback
from geotrain.sync.messages import RoundMade
from geotrain.sync.progress import KEPT
from geotrain.sync.pushing import PushMachine
from geotrain.sync.replica import DeltaReplica
from geotrain.sync.strategy import Merging, Pushing
from tests.world import NAMES, PARAMETERS, World, make_world, parse_sync, schedule

Sync = dict[str, Any]

STRATEGIES: dict[str, Sync] = {
    "asgd": {"strategy": "asgd"},
    "asgd_ga": {"strategy": "asgd_ga", "every": 4, "max_staleness": 1},
    "ma-async-mesh": {"strategy": "ma", "mode": "async", "every": 3, "topology": "mesh"},
    "ma-async-star": {"strategy": "ma", "mode": "async", "every": 3, "topology": "star"},
    "ma-async-ring": {"strategy": "ma", "mode": "async", "every": 3, "topology": "ring"},
    "ma": {"strategy": "ma", "every": 3},
    "diloco": {"strategy": "diloco", "every": 4},
    "diloco-owners": {"strategy": "diloco", "every": 4, "topology": "owners"},
    "diloco-quorum": {"strategy": "diloco", "every": 4, "quorum": 2, "grace_s": 1.0},
    "streaming": {"strategy": "streaming", "every": 6, "fragments": 3, "overlap_steps": 1},
    "streaming-owners-quorum": {
        "strategy": "streaming",
        "every": 6,
        "fragments": 2,
        "overlap_steps": 2,
        "topology": "owners",
        "quorum": 2,
        "grace_s": 0.5,
    },
    "delayed": {"strategy": "delayed", "every": 3, "momentum_clip": 0.5},
    "delayed-owners-quorum": {"strategy": "delayed", "every": 3, "quorum": 2, "topology": "owners"},
}
CODECS: dict[str, Sync] = {
    "fp32": {},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "e3m0": {"codec": "e3m0"},
    "topk": {"codec": "topk", "keep": 0.2},
    "dgc": {"codec": "topk", "keep": 0.1, "feedback": "dgc"},
    "econtrol": {"codec": "int4", "feedback": "econtrol"},
    "sparseloco": {"codec": "sparseloco", "keep": 0.2},
    "fedzip": {"codec": "fedzip"},
    "auto": {"codec": "auto"},
}
RULES = ("radial", "norm_clipped", "median", "trimmed", "flag")


def combinations() -> Iterator[tuple[str, Sync]]:
    """Every strategy with its topology, with every codec, and diloco with every rule: those that a job accepts."""
    for (name, sync), (codec, wire) in itertools.product(STRATEGIES.items(), CODECS.items()):
        if accepted({**sync, **wire}):
            yield f"{name}-{codec}", {**sync, **wire}
    for rule in RULES:
        yield f"diloco-{rule}", {"strategy": "diloco", "every": 4, "merge": rule}


def accepted(sync: Sync) -> bool:
    try:
        parse_sync(sync)
    except JobError:
        return False
    return True


def play(sync: Sync, seed: int, *, calm: bool = False, tell: Callable[[str], None] | None = None) -> World:
    """One schedule: two segments of an epoch each, then the full merge where the strategy needs one; all invariants checked."""
    fewest = 3 if "merge" in sync else 2
    names = NAMES[: random.Random(seed).randint(fewest, 4)]
    world = make_world(sync, seed, schedule(seed, names, calm=calm), regions=len(names), tell=tell)
    for epoch in (1, 2):
        world.segment(epoch * world.rounds_per_epoch)
        check(world)
    if not world.strategy.ends_equal:
        world.merge_fully()
        first, *others = world.there()
        assert all(torch.equal(first.server.replica.local, other.server.replica.local) for other in others), (
            "not equal after the full merge"
        )
    return world


def check(world: World) -> None:
    """Agreement is checked at every event, by the world itself."""
    there = world.there()
    ends = {node.server.machine.at.round for node in there}
    assert len(ends) == 1, f"segments end at rounds {ends}"
    for node in there:
        assert not node.server._payloads, f"{node.name} keeps {sorted(node.server._payloads)}"
        assert not node.server.machine.early, f"{node.name} keeps {node.server.machine.early}"
    alive = {node.number for node in there}
    assert not [place for place in world.open_contributions if place[0] in alive], "contributions without a fate"
    keys = [(region, key) for region, key, _ in world.applied]
    if not world.faults.changes_views:
        assert len(set(keys)) == len(keys), "an update was applied twice"
        assert all(world.closed[name] == list(range(max(ends))) for name in world.names), world.closed
        every_row_once(world)
    bound = world.strategy.max_staleness if isinstance(world.strategy, Pushing) else int(world.strategy.tau is None)
    assert all(0 <= staleness <= bound for _, _, staleness in world.applied), "staler than the bound"
    assert all(facts["reason"] for _, what, facts in world.events if what == "discarded")
    conserved(world)
    known_by_others(world)


def known_by_others(world: World) -> None:
    """Who holds a round knows where its region then was in its rows, as that region would tell."""
    faults, healed = world.faults, {name for name, what, _ in world.events if what == "healed"}
    disturbed = healed | {name for name, *_ in (*faults.crashes, *faults.cuts, *faults.joins)}
    steady = [node for node in world.there() if node.name not in disturbed]
    for node, other in itertools.permutations(steady, 2):
        machine, known = other.server.machine, world.held.get((node.name, other.name), {})
        if isinstance(machine, PushMachine):
            sure = other.name in node.server.machine.heard
            back: set[int] = set()
        else:
            sure, back = True, {made.round for returned in machine.returned.values() for made in returned}
        wanted = {round for round in world.closed[other.name] if round > max(known, default=0) - KEPT} - back
        assert not sure or known.keys() >= wanted, f"{node.name} does not know rounds {sorted(wanted - known.keys())} of {other.name}"
        for round, made in known.items():
            whole = max(made, key=lambda part: part.steps)
            told = world.told[other.name][round]
            assert whole == RoundMade(other.name, 0, round, told.epoch, told.done, told.steps, told.samples), (made, told)
            assert {(part.epoch, part.done - part.steps) for part in made} == {(told.epoch, told.done - told.steps)}, (made, told)


def every_row_once(world: World) -> None:
    """The inner steps made are those of the epochs that ended and of the one under way, less those that are owed."""
    for node in world.there():
        at, steps = node.server.machine.at, world.steps[node.name]
        made = sum(world.made[node.name].values())
        assert made == at.pace.epoch(at.round) * steps + at.done, (
            f"{node.name} made {made} steps by round {at.round}, {at.done} of this epoch"
        )
        assert may_owe(world) or at.done >= 0, f"{node.name} owes steps and was never left behind"


def may_owe(world: World) -> bool:
    """Only a merge with a quorum goes on without a region."""
    return isinstance(world.strategy, Merging) and world.strategy.quorum is not None


def conserved(world: World) -> None:
    """Pushed deltas: after a drain everybody holds what all had at first + what all inner steps did, less what is still kept back."""
    there = world.there()
    if not isinstance(there[0].server.replica, DeltaReplica):
        return
    if world.coding.feedback == "dgc":  # all move by what was sent, and by nothing else
        first, *others = [node.server.replica.local[:PARAMETERS] for node in there]
        assert all(torch.allclose(first, other, atol=1e-3) for other in others), "not everybody moved by what was sent"
        return
    kept = {}
    for node in there:
        feedback = node.server.replica.feedback
        assert isinstance(feedback, ErrorFeedback)
        kept[node.name] = torch.zeros(PARAMETERS) if feedback.residual is None else feedback.residual
    done = sum((world.delta[node.name][:PARAMETERS] for node in there), torch.zeros(PARAMETERS, dtype=torch.float64))
    for node in there:
        back = sum((kept[other.name].double() for other in there if other is not node), torch.zeros(PARAMETERS, dtype=torch.float64))
        expected = world.base[:PARAMETERS].double() + done - back
        found = node.server.replica.local[:PARAMETERS].double()
        assert torch.allclose(found, expected, atol=1e-3), f"{node.name} is {float((found - expected).abs().max())} off"


def replay(name: str, seed: int) -> list[str]:
    """The trace of one schedule, with its failure as the last line."""
    lines: list[str] = []
    try:
        play(dict(combinations())[name], seed, tell=lines.append)
    except Exception as error:
        lines.append(f"{type(error).__name__}: {error}")
    return lines


def is_merge(sync: Sync) -> bool:
    from geotrain.sync.strategy import strategy_of

    return isinstance(strategy_of(parse_sync(sync), 3), Merging)
