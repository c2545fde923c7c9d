"""What changes while a run trains, because somebody asks for it or a machine goes or slows down: nothing is lost by it."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from geotrain.charge import ask
from geotrain.job import JobSpec
from geotrain.partition.orders import SeatTaken
from geotrain.partition.partition import Partition
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.chaos.test_processes import EPOCHS, events, in_mid_run, job_of, pid_of
from tests.making import conduct


def test_a_region_that_is_drained_leaves_in_peace(tmp_path: Path) -> None:
    run = Run.start(job_of(tmp_path, "streaming"))
    conduct(run, in_mid_run(lambda run: ask(run.folder.url, "drain", region="west")))
    assert [event["region"] for event in events(run, "left")] == ["west"]
    assert not events(run, "lost")
    (view,) = events(run, "view")
    assert view["regions"] == ["north", "south"]
    found = ledger(run.folder)
    assert found["balanced"], found
    last = {region: max(row["epoch"] for row in found["regions"] if row["region"] == region) for region in ("north", "west")}
    assert last["west"] < last["north"] == EPOCHS - 1


def add_after_refusal(run: Run, refused: Any, region: Any) -> None:
    """Ask for a region that cannot come in, and once that is said for one that can."""
    ask(run.folder.url, "add", region=refused)
    while not events(run, "not_added"):
        time.sleep(0.1)
    ask(run.folder.url, "add", region=region)


@pytest.mark.parametrize("strategy", ["streaming", *(pytest.param(name, marks=pytest.mark.chaos) for name in ("ma", "asgd_ga"))])
def test_a_region_comes_in_and_one_that_cannot_is_told_why(tmp_path: Path, strategy: str) -> None:
    west, epochs = job_of(tmp_path, strategy).to_dict()["regions"][2], 200 if strategy != "asgd_ga" else 800
    run = Run.start(job_of(tmp_path, strategy, regions=("north", "south"), train={"batch_size": 10, "epochs": epochs, "seed": 3}))

    nothing = {**west, "name": "east", "data": {"train": str(tmp_path / "nothing-here")}}
    summary = conduct(run, in_mid_run(lambda run: add_after_refusal(run, nothing, west), round=20))
    assert "region east: cannot list" in events(run, "not_added")[0]["message"]
    assert [event["region"] for event in events(run, "joined")] == ["west"]
    assert not events(run, "lost")
    assert [region["region"] for region in summary["regions"]] == ["north", "south", "west"]
    assert summary["metrics"]["mse"] < 1.0
    found = ledger(run.folder)
    assert found["balanced"], found
    west_rows = [row for row in found["regions"] if row["region"] == "west"]
    assert sum(row["once"] for row in west_rows) == next(row["samples"] for row in summary["regions"] if row["region"] == "west")
    assert west_rows[-1]["epoch"] == epochs - 1
    assert west_rows[-1]["once"] == west_rows[-1]["rows"], "to the end of the epochs that were there already"
    again = Run(run.folder.job(), run.folder)
    assert [region.name for region in again.job.regions] == ["north", "south", "west"], "who resumes knows of it"


@pytest.mark.parametrize(
    ("believed", "margin", "workers"),
    [
        pytest.param((5000.0, 5000.0), 4.0, [1, 2], id="slower"),
        pytest.param((1000.0, 10.0), 50.0, [2, 1], id="faster", marks=pytest.mark.chaos),
    ],
)
def test_a_region_that_is_not_as_fast_as_planned_gets_other_workers(
    tmp_path: Path, believed: tuple[float, float], margin: float, workers: list[int]
) -> None:
    slow = tmp_path / "slow"
    tree = job_of(
        tmp_path,
        "ma",
        regions=("north", "south"),
        train={"batch_size": 10, "epochs": 120, "seed": 3},
        task_args={"lr": 0.01, "slow": str(slow)},
        elastic={"speed_margin": margin, "speed_for_s": 2.0},
    ).to_dict()
    for region, count, speed in zip(tree["regions"], (1, 2), believed, strict=True):
        region["devices"] = [{"kind": "cpu", "count": count, "usd_per_hour": 0.1, "samples_per_s": speed}]
    run = Run.start(JobSpec.model_validate(tree))
    conduct(run, in_mid_run(lambda run: slow.write_text(str(pid_of(run, "south") if workers == [1, 2] else 0)) and None))
    assert "south" in [event["region"] for event in events(run, "speed_changed")]
    (replanned,) = [event for event in events(run, "replanned") if event["workers"]]
    assert replanned["workers"] == {"south": workers}
    assert (replanned["usd_per_hour"][1] > replanned["usd_per_hour"][0]) == (workers == [1, 2])
    seated = [event["workers"] for event in events(run, "seated") if event["region"] == "south"]
    assert seated == workers
    assert not events(run, "lost")
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_a_worker_that_gets_sigterm_leaves_in_peace(tmp_path: Path, workers: int) -> None:
    tree = job_of(tmp_path, "ma", regions=("north", "south")).to_dict()
    tree["regions"][1]["devices"][0]["count"] = workers
    tree["schedule"]["allocate"] = "all"
    run = Run.start(JobSpec.model_validate(tree))
    summary = conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south", worker=workers - 1), signal.SIGTERM)))
    (left,) = events(run, "worker_left")
    assert (left["region"], len(left["workers"])) == ("south", 1)
    assert not [event for event in events(run, "lost") if "SIGTERM" not in event["message"]]
    seated = [event["workers"] for event in events(run, "seated") if event["region"] == "south"]
    assert seated in ([1, 1], [2, 1, 2], [2, 2])
    found = ledger(run.folder)
    assert found["balanced"], found
    assert not any(row["again"] or row["rounds_again"] for row in found["regions"])
    assert summary["metrics"]["mse"] < 1.0


def loses_its_worker(monkeypatch: pytest.MonkeyPatch, region: str, before_seat: int) -> None:
    """A region's worker is killed in the moment in which it is to take its n-th seat."""
    take_seats, taken = Partition.take_seats, list[str]()

    def killed(self: Partition, order: Any) -> Any:
        if self.region == region:
            taken.append(region)
            if len(taken) == before_seat:
                pid = self.client.run(os.getpid, workers=self.workers[:1])[self.workers[0]]
                os.kill(pid, signal.SIGKILL)
        return take_seats(self, order)

    monkeypatch.setattr(Partition, "take_seats", killed)


@pytest.mark.chaos
def test_a_worker_dies_while_all_take_their_seats_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    west = job_of(tmp_path, "ma").to_dict()["regions"][2]
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), train={"batch_size": 10, "epochs": 200, "seed": 3}))
    loses_its_worker(monkeypatch, "south", before_seat=2)
    summary = conduct(run, in_mid_run(lambda run: ask(run.folder.url, "add", region=west), round=20))
    assert [event["region"] for event in events(run, "joined")] == ["west"]
    assert [event["region"] for event in events(run, "lost")] == ["south"]
    assert [event["region"] for event in events(run, "back")] == ["south"]
    found = ledger(run.folder)
    assert found["balanced"], found
    counted = {name: sum(row["once"] for row in found["regions"] if row["region"] == name) for name in ("north", "south", "west")}
    assert {row["region"]: row["samples"] for row in summary["regions"]} == counted


@pytest.mark.chaos
def test_a_newcomer_that_dies_at_the_door_does_not_come_in_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    west = job_of(tmp_path, "ma").to_dict()["regions"][2]
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), train={"batch_size": 10, "epochs": 200, "seed": 3}))
    loses_its_worker(monkeypatch, "west", before_seat=1)
    conduct(run, in_mid_run(lambda run: ask(run.folder.url, "add", region=west), round=20))
    assert "west" in events(run, "not_added")[0]["message"]
    assert not events(run, "joined", "lost")
    assert ledger(run.folder)["balanced"]
    assert [region.name for region in run.folder.job().regions] == ["north", "south"]


@pytest.mark.chaos
def test_a_newcomer_with_another_model_does_not_come_in_and_may_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a region has another version of the task's code."""
    west = job_of(tmp_path, "ma").to_dict()["regions"][2]
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), train={"batch_size": 10, "epochs": 300, "seed": 3}))
    take_seats, wrong = Partition.take_seats, list[str]()

    def differs(self: Partition, order: Any) -> SeatTaken:
        taken = take_seats(self, order)
        if self.region != "west" or wrong:
            return taken
        wrong.append("west")
        return replace(taken, fingerprint={**taken.fingerprint, "4.weight": "float32 1x1"})

    monkeypatch.setattr(Partition, "take_seats", differs)

    summary = conduct(run, in_mid_run(lambda run: add_after_refusal(run, west, west), round=20))
    assert "4.weight" in events(run, "not_added")[0]["message"]
    assert [event["region"] for event in events(run, "joined")] == ["west"]
    assert not events(run, "lost")
    assert ledger(run.folder)["balanced"]
    assert [region["region"] for region in summary["regions"]] == ["north", "south", "west"]


@pytest.mark.chaos
def test_a_newcomer_alone_takes_the_model_of_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only region that has it dies while all take their seats anew."""
    west = job_of(tmp_path, "ma").to_dict()["regions"][2]
    run = Run.start(job_of(tmp_path, "ma", regions=("north",), train={"batch_size": 10, "epochs": 400, "seed": 3}))
    loses_its_worker(monkeypatch, "north", before_seat=2)
    summary = conduct(run, in_mid_run(lambda run: ask(run.folder.url, "add", region=west), round=20))
    assert events(run, "joined")
    rounds = [event["round"] for event in events(run, "segment")]
    assert rounds == sorted(rounds)
    assert summary["metrics"]["mse"] < 1.0
    assert ledger(run.folder)["balanced"]


@pytest.mark.chaos
def test_a_worker_gets_sigterm_while_another_plan_is_about_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    west = job_of(tmp_path, "ma").to_dict()["regions"][2]
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), train={"batch_size": 10, "epochs": 200, "seed": 3}))
    take_in = Run._take_in

    def noticed(self: Run, newcomer: Any) -> None:
        os.kill(pid_of(self, "south"), signal.SIGTERM)
        while not self._noticed:
            time.sleep(0.02)
        take_in(self, newcomer)

    monkeypatch.setattr(Run, "_take_in", noticed)
    conduct(run, in_mid_run(lambda run: ask(run.folder.url, "add", region=west), round=20))
    assert [event["region"] for event in events(run, "worker_left")] == ["south"]
    assert events(run, "joined")
    found = ledger(run.folder)
    assert found["balanced"], found
    assert not any(row["again"] for row in found["regions"])
