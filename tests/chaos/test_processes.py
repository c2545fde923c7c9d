"""Real processes die in mid-run: the others go on, the region comes back, the run ends right, and the ledger balances."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.making import conduct, points_job

STRATEGIES: dict[str, dict[str, Any]] = {
    "ma": {"strategy": "ma", "every": 2},
    "streaming": {"strategy": "streaming", "every": 4, "fragments": 2, "overlap_steps": 1, "codec": "int8"},
    "asgd_ga": {"strategy": "asgd_ga", "every": 4},
}
EPOCHS = 60


def pid_of(run: Run, region: str, worker: int = 0) -> int:
    partition = run.partitions[region]
    address = partition.workers[worker]
    pid: int = partition.client.run(os.getpid, workers=[address])[address]
    return pid


def later(run: Run, round: int, act: Callable[[], None], region: str = "north") -> threading.Thread:
    """Do something once a region has told of a round."""

    def wait() -> None:
        while run.board.rows[region].rounds <= round:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def events(run: Run, *names: str) -> list[dict[str, Any]]:
    return [event for event in run.folder.lines("events.jsonl") if event["event"] in names]


def job_of(root: Path, strategy: str, regions: tuple[str, ...] = ("north", "south", "west"), **changes: Any) -> Any:
    return points_job(
        root,
        regions=regions,
        sync=STRATEGIES[strategy],
        train={"batch_size": 10, "epochs": EPOCHS, "seed": 3},
        schedule={"segment_rounds": 100},
        shape={"mbit_per_s": 100, "rtt_ms": 10},
        task_args={"lr": 0.01},
        **changes,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("victim", ["north", "west"], ids=["the-owner", "another"])
def test_a_leader_is_killed_and_comes_back(tmp_path: Path, strategy: str, victim: str) -> None:
    run = Run.start(job_of(tmp_path, strategy))
    begun: list[int] = []

    def kill(run: Run, segment: int) -> None:
        if not begun:
            begun.append(segment)
            later(run, 120, lambda: os.kill(pid_of(run, victim), signal.SIGKILL))

    summary = conduct(run, before_segment=kill)
    assert [event["region"] for event in events(run, "lost")] == [victim]
    assert [event["region"] for event in events(run, "back")] == [victim]
    views = [set(event["regions"]) for event in events(run, "view")]
    assert views == [{"north", "south", "west"} - {victim}, {"north", "south", "west"}]
    assert summary["metrics"]["mse"] < 1.0
    found = ledger(run.folder)
    assert {row["region"] for row in found["regions"]} == {"north", "south", "west"}
    assert found["balanced"], found
