"""The invariants in virtual time, over seeded fault schedules. The seed stands in the test's name."""

import random

import pytest
import torch

from geotrain.sync.strategy import Merging, Pushing
from tests.world import PARAMETERS, Faults, World

SEEDS = range(150)
MERGES = [Merging(every=3), Merging(every=5, outer_lr=0.7, outer_momentum=0.9)]
PUSHES = [Pushing("delta", 1, 2), Pushing("delta", 4, 1), Pushing("parameters", 3, 3)]


def world(strategy: Merging | Pushing, seed: int, codec: str = "fp32") -> World:
    choose = random.Random(seed)
    steps = {name: choose.randint(0 if n else 1, 14) for n, name in enumerate(("oslo", "lima", "cairo", "perth")[: choose.randint(2, 4)])}
    rounds = max(1, -(-max(steps.values()) // strategy.every))
    stop_at = choose.uniform(0, 20) if choose.random() < 0.3 else None
    return World(strategy, steps, rounds, seed, Faults(choose.uniform(0, 5), stop_at=stop_at), codec)


def run(strategy: Merging | Pushing, seed: int, codec: str = "fp32") -> World:
    built = world(strategy, seed, codec)
    rounds = built.servers[built.names[0]].machine.at.pace.rounds_per_epoch
    built.segment(rounds)
    built.segment(2 * rounds)
    return built


def ends_together(built: World) -> None:
    ends = {server.machine.at.round for server in built.servers.values()}
    assert len(ends) == 1, ends
    assert all(rounds == list(range(next(iter(ends)))) for rounds in built.closed.values())


def applied_at_most_once(built: World) -> None:
    keys = [(region, key) for region, key, _ in built.applied]
    assert len(set(keys)) == len(keys)


def nothing_is_kept(built: World) -> None:
    assert all(not server._payloads for server in built.servers.values())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strategy", MERGES, ids=["ma", "diloco"])
def test_after_a_merge_all_agree_to_the_bit(strategy: Merging, seed: int) -> None:
    built = run(strategy, seed, codec=random.Random(seed).choice(["fp32", "bf16"]))
    ends_together(built)
    applied_at_most_once(built)
    nothing_is_kept(built)
    first, *others = built.names
    for other in others:
        for round, parameters in built.after[first].items():
            assert torch.equal(parameters, built.after[other][round]), f"round {round}"
    assert {staleness for _, _, staleness in built.applied} <= {0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("strategy", PUSHES, ids=["asgd", "asgd_ga", "ma-async"])
def test_a_push_run_drains_within_its_bound(strategy: Pushing, seed: int) -> None:
    built = run(strategy, seed)
    ends_together(built)
    applied_at_most_once(built)
    nothing_is_kept(built)
    assert all(0 <= staleness <= strategy.max_staleness for _, _, staleness in built.applied)
    rounds = len(built.closed[built.names[0]])
    assert len(built.applied) == rounds * len(built.names) * (len(built.names) - 1)
    if strategy.sends == "delta":
        expected = built.begin.double() + built.produced
        for name in built.names:
            assert torch.allclose(built.parameters(name)[:PARAMETERS].double(), expected[:PARAMETERS], atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_one_seed_is_one_history(seed: int) -> None:
    first, second = run(MERGES[1], seed), run(MERGES[1], seed)
    assert first.applied == second.applied
    assert first.discarded == second.discarded
    assert all(torch.equal(first.parameters(name), second.parameters(name)) for name in first.names)


def test_duplicates_and_ghosts_do_come_and_are_discarded_with_a_reason() -> None:
    reasons = {reason for seed in range(20) for strategy in (*MERGES, *PUSHES) for _, reason in run(strategy, seed).discarded}
    assert {"already applied", "already merged", "of view 2, this is view 3"} <= reasons
    assert all(reasons)


@pytest.mark.parametrize("strategy", [*MERGES, *PUSHES], ids=["ma", "diloco", "asgd", "asgd_ga", "ma-async"])
def test_a_request_to_stop_does_end_segments_early(strategy: Merging | Pushing) -> None:
    early = 0
    for seed in range(30):
        built = World(strategy, {"oslo": 40, "lima": 40, "cairo": 40}, 40 // strategy.every, seed, Faults(stop_at=3.0))
        built.segment(10 * (40 // strategy.every))
        ends_together(built)
        early += built.servers["oslo"].machine.at.round < 10 * (40 // strategy.every)
    assert early == 30
