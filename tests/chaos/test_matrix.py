"""Every fault with every strategy at moments that a seed draws: `CHAOS_SEED=7 make chaos`. One seed strikes at the same rounds again."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest

from geotrain.job import JobSpec
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.chaos.test_processes import STRATEGIES, events, in_mid_run, job_of, pid_of
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

REGIONS, TWO_WORKERS = ("north", "south", "west"), "south"
SEED = int(os.environ.get("CHAOS_SEED", "1"))
Strike = Callable[[Run, random.Random, dict[str, Valve]], None]


def kill(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    os.kill(pid_of(run, rng.choice(REGIONS)), signal.SIGKILL)


def kill_two(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    for pid in [pid_of(run, region) for region in rng.sample(REGIONS, 2)]:
        os.kill(pid, signal.SIGKILL)


def kill_all(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    for pid in [pid_of(run, region) for region in REGIONS]:
        os.kill(pid, signal.SIGKILL)


def kill_again(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    """The one that brings the first back, or the one that is being brought back, or another."""
    first = rng.choice(REGIONS)
    os.kill(pid_of(run, first), signal.SIGKILL)
    time.sleep(rng.uniform(0, 1))
    try:
        victim = pid_of(run, rng.choice(REGIONS))
    except (OSError, KeyError, ValueError):  # it has no worker at the moment
        return
    os.kill(victim, signal.SIGKILL)


def kill_fork_server(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    """What all local workers are forked from: they end with it."""
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]


def hang(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    os.kill(pid_of(run, rng.choice(REGIONS)), signal.SIGSTOP)


def cut(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    valve = valves[rng.choice(REGIONS)]
    valve.open.clear()
    threading.Timer(rng.uniform(0.5, 6.0), valve.open.set).start()


def kill_one_of_two(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    os.kill(pid_of(run, TWO_WORKERS, rng.randrange(2)), signal.SIGKILL)


def give_notice(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    os.kill(pid_of(run, rng.choice(REGIONS)), signal.SIGTERM)


def spoil(run: Run, rng: random.Random, valves: dict[str, Valve]) -> None:
    Path(run.job.task_args["sick"]).write_text(str(pid_of(run, rng.choice(REGIONS))))


STRIKES: dict[str, Strike] = {
    "one killed": kill,
    "one of two killed": kill_one_of_two,
    "two killed": kill_two,
    "all killed": kill_all,
    "killed again": kill_again,
    "fork server killed": kill_fork_server,
    "one hangs": hang,
    "link cut": cut,
    "notice": give_notice,
    "NaN": spoil,
}
SIGNS = {"link cut": (), "notice": ("worker_left",), "NaN": ("void_round",)}
"""Events of which there is one at least; of any other fault that a region was lost."""


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", STRIKES)
def test_whatever_fails_the_run_ends_right(tmp_path: Path, strategy: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.plan.planner.LEAST_GIVE_UP_S", 2.0)
    monkeypatch.setattr("geotrain.plan.planner.TRANSFER_MARGIN", 0.0)
    monkeypatch.setattr("geotrain.plan.planner.LEAST_HANG_S", 2.0)
    rng = random.Random(f"{SEED} {strategy} {fault}")
    tree = job_of(tmp_path, strategy, elastic={"quorum": 1}, task_args={"sick": str(tmp_path / "sick")}).to_dict()
    if fault == "one of two killed":
        tree["schedule"]["allocate"] = "all"
        next(region for region in tree["regions"] if region["name"] == TWO_WORKERS)["devices"][0]["count"] = 2
    valves = {}
    for region in tree["regions"]:
        port = free_port()
        valves[region["name"]] = valve = Valve(port)
        region["wan"] = {"listen": f"127.0.0.1:{port}", "advertise": valve.address}
    run = Run.start(JobSpec.model_validate(tree))
    summary = conduct(run, in_mid_run(lambda run: STRIKES[fault](run, rng, valves), round=rng.randrange(20, 300)))
    for valve in valves.values():
        valve.close()
    signs = SIGNS.get(fault, ("lost", "lost_at_end"))
    assert not signs or events(run, *signs), "it did strike"
    assert summary["metrics"]["mse"] < 1.0
    found = ledger(run.folder)
    assert found["balanced"], (found, events(run, "lost", "back", "view", "rolled_back"))
    counted = {name: sum(row["once"] for row in found["regions"] if row["region"] == name) for name in REGIONS}
    assert {row["region"]: row["samples"] for row in summary["regions"]} == counted
