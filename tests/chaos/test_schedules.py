"""The invariants in virtual time, over seeded fault schedules. `make chaos SEEDS=n` runs as many as asked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geotrain.sync.merging import MergeMachine
from tests.chaos.invariants import CODECS, RULES, STRATEGIES, combinations, is_merge, play, replay
from tests.world import NAMES, PARAMETERS, Schedule, World, make_world, parse_sync, strategy_of

COMBINATIONS = dict(combinations())
SEEDS = 24


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_invariants_hold(name: str) -> None:
    for seed in range(SEEDS):
        try:
            play(COMBINATIONS[name], seed, calm=seed % 4 == 3)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error}\nreplay it: python -m tests.chaos --only {name} --seed {seed}")


def test_every_strategy_codec_and_rule_is_in() -> None:
    assert {name for name in COMBINATIONS if name.endswith("-fp32")} == {f"{strategy}-fp32" for strategy in STRATEGIES}
    for codec in CODECS:
        assert f"streaming-owners-quorum-{codec}" in COMBINATIONS or codec == "econtrol"
    assert {f"diloco-{rule}" for rule in RULES} <= set(COMBINATIONS)
    assert "ma-async-ring-topk" not in COMBINATIONS


@pytest.mark.parametrize("name", ["asgd_ga-fp32", "streaming-owners-quorum-int4", "delayed-fp32"])
def test_one_seed_is_one_history(name: str) -> None:
    assert replay(name, 5) == replay(name, 5)
    assert replay(name, 5) != replay(name, 6)


def thetas(sync: dict[str, Any], weather: int) -> list[Tensor]:
    """What all agreed on after each round, with the delays and losses of another seed."""
    world = make_world(sync, 1, Schedule(late_s=weather % 7, lost=0.1 * (weather % 2)), regions=4, weather=weather)
    for epoch in (1, 2):
        world.segment(epoch * world.rounds_per_epoch)
    return list(world.after[NAMES[0]].values())


@pytest.mark.parametrize("name", [name for name, sync in STRATEGIES.items() if is_merge(sync) and "quorum" not in sync])
def test_what_a_merge_gives_does_not_depend_on_the_weather(name: str) -> None:
    """So a run that was killed and resumed equals one that was not, to the bit."""
    calm, *others = [thetas({**STRATEGIES[name], "codec": "int8"}, weather) for weather in range(5)]
    assert len(calm) > 3
    assert all(len(calm) == len(other) and all(map(torch.equal, calm, other)) for other in others)


@pytest.mark.parametrize("name", [name for name, sync in COMBINATIONS.items() if is_merge(sync) and "quorum" not in sync])
def test_killed_and_resumed_equals_uninterrupted(name: str) -> None:
    """Between two segments every region ends, and begins again from what a checkpoint keeps."""
    ends = []
    for killed in (False, True):
        world = make_world(COMBINATIONS[name], 2, Schedule(), regions=3)
        world.segment(world.rounds_per_epoch)
        if killed:
            world.kill_and_resume()
        world.segment(2 * world.rounds_per_epoch)
        ends.append(
            [(node.server.replica.local, *(tensor for _, tensor in sorted(node.server.replica.state().items()))) for node in world.there()]
        )
    assert all(torch.equal(a, b) for one, other in zip(*ends, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [name for name, sync in COMBINATIONS.items() if is_merge(sync) and "quorum" not in sync])
def test_stopped_early_killed_and_resumed_equals_uninterrupted(name: str) -> None:
    """What the early end hastened is taken back, and applied when it is due."""
    ends = []
    for stop_at in (None, 4.0):
        world = make_world(COMBINATIONS[name], 2, Schedule(stop_at=stop_at), regions=3)
        until = 2 * world.rounds_per_epoch
        world.segment(until)
        if stop_at is not None:
            assert 0 < world.there()[0].server.machine.at.round < until, "not where it would have ended"
            world.faults = Schedule()
            world.kill_and_resume()
            world.segment(until)
        ends.append(
            [(node.server.replica.local, *(tensor for _, tensor in sorted(node.server.replica.state().items()))) for node in world.there()]
        )
    assert all(torch.equal(a, b) for one, other in zip(*ends, strict=True) for a, b in zip(one, other, strict=True))


def happened(what: str, name: str, seeds: int = 40) -> int:
    """How often an event comes about, over some schedules."""
    return sum(event == what for seed in range(seeds) for _, event, _ in play(COMBINATIONS[name], seed).events)


@pytest.mark.parametrize("what", ["missed", "healed", "discarded"])
def test_the_schedules_do_bring_about_what_they_are_for(what: str) -> None:
    assert happened(what, "delayed-owners-quorum-fp32") > 20


def test_discards_have_all_their_reasons() -> None:
    found = {
        facts["reason"] for seed in range(60) for _, _, facts in play(COMBINATIONS["diloco-quorum-fp32"], seed).events if "reason" in facts
    }
    assert {"already applied", "already merged", "already here", "the view changed"} <= found
    assert any("this is view" in reason for reason in found)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_request_to_stop_ends_segments_early(name: str) -> None:
    for seed in range(10):
        world = make_world(STRATEGIES[name], seed, Schedule(stop_at=3.0), regions=3)
        until = 40 * world.rounds_per_epoch
        world.segment(until)
        ends = {node.server.machine.at.round for node in world.there()}
        assert len(ends) == 1
        assert max(ends) < until


def test_a_region_out_of_reach_is_left_behind_and_heals() -> None:
    cut = Schedule(late_s=0.1, cuts=(("oslo", 2.0, 30.0),), detect_s=3.0)
    world = World(
        strategy_of(parse_sync({"strategy": "diloco", "every": 2}, 3), 3), dict.fromkeys(("cairo", "lima", "oslo"), 40), 20, 1, cut
    )
    world.segment(20)
    assert world.epoch == 5
    assert ("oslo", "healed") in {(name, what) for name, what, _ in world.events}
    machines = [node.server.machine for node in world.there()]
    assert all(isinstance(machine, MergeMachine) and machine.lineage == 5 for machine in machines)


@pytest.mark.parametrize("rule", ["norm_clipped", "median", "trimmed", "flag"])
@pytest.mark.parametrize("sick", [lambda x: x * torch.nan, lambda x: -x, lambda x: 1000 * x], ids=["nan", "sign", "scale"])
def test_garbage_of_one_region_in_five_cannot_ruin_the_model(rule: str, sick: Callable[[Tensor], Tensor]) -> None:
    """All regions pull towards one point; the sick one's contributions are garbage. It is named, and the others get there."""
    world = make_world({"strategy": "ma", "every": 2, "merge": rule}, 3, Schedule(), regions=5)
    world.pull, world.sick = torch.full_like(world.begin, 3.0), {"lima": sick}
    world.segment(30 * world.rounds_per_epoch)
    theta = world.nodes["cairo"].server.replica.theta[:PARAMETERS]
    assert float((theta - 3.0).abs().max()) < 0.5
    assert "lima" in {facts["origin"] for _, what, facts in world.events if what == "suspect"}


def test_a_plain_mean_is_ruined_by_it() -> None:
    world = make_world({"strategy": "ma", "every": 2}, 3, Schedule(), regions=5)
    world.pull, world.sick = torch.full_like(world.begin, 3.0), {"lima": lambda x: 1000 * x}
    world.segment(30 * world.rounds_per_epoch)
    assert float((world.nodes["cairo"].server.replica.theta[:PARAMETERS] - 3.0).abs().max()) > 10
