"""Real processes die in mid-run: the others go on, the region comes back, the run ends right, and the ledger balances."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from distributed import Future, LocalCluster
from safetensors.torch import load_file

from geotrain.charge import ask
from geotrain.errors import ClusterTooSmall, DeviceFailed, Diverged, NobodyGoesOn, NonFiniteLoss, QuorumLost, StateDamaged, Stopped
from geotrain.job import JobSpec, load_job
from geotrain.partition.partition import Partition
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import ledger, write_spent_rows
from geotrain.run import Run
from tests.making import conduct, points_job
from tests.points import flip_a_bit_of_the_next_state, lose_the_next_hello, never_write_a_part, tell_seldom
from tests.s3 import free_port
from tests.valve import Valve

STRATEGIES: dict[str, dict[str, Any]] = {
    "ma": {"strategy": "ma", "every": 2},
    "streaming": {"strategy": "streaming", "every": 4, "fragments": 2, "overlap_steps": 1, "codec": "int8"},
    "asgd_ga": {"strategy": "asgd_ga", "every": 4},
}
EPOCHS = 40
LR = {"asgd_ga": 0.003}
"""A push adds up what three regions learned: with 0.01 the loss swings between 0.1 and 1 however long it trains."""


def pid_of(run: Run, region: str, worker: int = 0) -> int:
    partition = run.partitions[region]
    address = partition.workers[worker]
    pid: int = partition.client.run(os.getpid, workers=[address])[address]
    return pid


def on_leader(run: Run, region: str, call: Callable[..., Any], *args: Any) -> Any:
    """Its answer, from the process of a region's leader."""
    partition = run.partitions[region]
    return partition.client.run(call, *args, workers=partition.workers[:1])[partition.workers[0]]


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
    epochs = EPOCHS if strategy != "asgd_ga" else 3 * EPOCHS  # a push waits for nobody, and must still train when something dies
    defaults: dict[str, Any] = {
        "train": {"batch_size": 10, "epochs": epochs, "seed": 3},
        "schedule": {"segment_rounds": 100},
        "shape": {"mbit_per_s": 100, "rtt_ms": 10},
    }
    task_args = {"lr": LR.get(strategy, 0.01), **changes.pop("task_args", {})}
    return points_job(root, regions=regions, sync=STRATEGIES[strategy], task_args=task_args, **{**defaults, **changes})


def in_mid_run(act: Callable[[Run], None], round: int = 120) -> Callable[[Run, int], None]:
    """A `before_segment` that does something once, in mid-segment."""
    begun: list[int] = []

    def hook(run: Run, segment: int) -> None:
        if not begun:
            begun.append(segment)
            later(run, round, lambda: act(run))

    return hook


@pytest.mark.parametrize(
    ("strategy", "victim"),
    [
        ("ma", "north"),
        ("streaming", "north"),
        ("asgd_ga", "west"),
        pytest.param("ma", "west", marks=pytest.mark.chaos),
        pytest.param("streaming", "west", marks=pytest.mark.chaos),
        pytest.param("asgd_ga", "north", marks=pytest.mark.chaos),
    ],
)
def test_a_leader_is_killed_and_comes_back(tmp_path: Path, strategy: str, victim: str) -> None:
    run = Run.start(job_of(tmp_path, strategy))
    summary = conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, victim), signal.SIGKILL)))
    assert [event["region"] for event in events(run, "lost")] == [victim]
    assert [event["region"] for event in events(run, "back")] == [victim]
    views = [set(event["regions"]) for event in events(run, "view")]
    assert views == [{"north", "south", "west"} - {victim}, {"north", "south", "west"}]
    assert strategy == "asgd_ga" or victim in [event["region"] for event in events(run, "healed")], "by a peer"
    assert summary["metrics"]["mse"] < 1.0
    found = ledger(run.folder)
    assert {row["region"] for row in found["regions"]} == {"north", "south", "west"}
    assert found["balanced"], found
    counted = {name: sum(row["once"] for row in found["regions"] if row["region"] == name) for name in ("north", "south", "west")}
    assert {row["region"]: row["samples"] for row in summary["regions"]} == counted


@pytest.mark.parametrize("strategy", ["asgd_ga", pytest.param("ma", marks=pytest.mark.chaos)])
def test_a_region_is_back_before_the_others_have_heard_that_it_was_lost(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its old address, where its new process hears first what was meant for the old one."""
    tree = job_of(tmp_path, strategy).to_dict()
    next(spec for spec in tree["regions"] if spec["name"] == "south")["wan"] = {"listen": f"127.0.0.1:{free_port()}"}
    run, tell_view, kept = Run.start(JobSpec.model_validate(tree)), Partition.tell_view, dict[str, Any]()

    def late(self: Partition, view: Any, directory: Any) -> None:
        if "south" not in view.regions:
            kept[self.region] = view, directory
            return
        if self.region in kept:
            time.sleep(1.0)
            tell_view(self, *kept.pop(self.region))
            time.sleep(0.5)
        tell_view(self, view, directory)

    monkeypatch.setattr(Partition, "tell_view", late)
    conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south"), signal.SIGKILL)))
    assert [event["region"] for event in events(run, "lost")] == [event["region"] for event in events(run, "back")] == ["south"]
    assert not kept
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize(
    ("strategy", "silent"),
    [
        ("streaming", "the others"),
        ("ma", "its own leader"),
        *(pytest.param(name, "the others", marks=pytest.mark.chaos) for name in ("ma", "asgd_ga")),
        *(pytest.param(name, "its own leader", marks=pytest.mark.chaos) for name in ("streaming", "asgd_ga")),
    ],
)
def test_a_region_goes_on_where_the_others_hold_its_rounds_though_nobody_told_of_them(tmp_path: Path, strategy: str, silent: str) -> None:
    """Whatever its own leader told last: what the others hold of it they know of themselves."""
    run, told = Run.start(job_of(tmp_path, strategy)), list[int]()

    def strike(run: Run) -> None:
        quiet, heard = (("north", "west"), "south") if silent == "the others" else (("south",), "north")
        for region in quiet:
            on_leader(run, region, tell_seldom)
        wait_for(lambda: run.board.rows[heard].rounds > 170)
        os.kill(pid_of(run, "south"), signal.SIGKILL)
        told.append(run.board.rows[heard].rounds)

    summary = conduct(run, in_mid_run(strike))
    _, again = [event for event in events(run, "seated") if event["region"] == "south"]
    assert told[0] - 20 < again["round"], "its last rounds may be with nobody"
    by_others = [record["round"] for record in run.folder.lines("rounds.jsonl") if record.get("by_others")]
    assert silent == "the others" or again["round"] - 1 in by_others, "nobody else was left to tell of it"
    found = ledger(run.folder)
    assert found["balanced"]
    counted = {name: sum(row["once"] for row in found["regions"] if row["region"] == name) for name in ("north", "south", "west")}
    assert {row["region"]: row["samples"] for row in summary["regions"]} == counted


def test_a_region_whose_model_takes_longer_to_build_than_a_segment_lasts_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take_seats = Run.start(job_of(tmp_path, "ma", schedule={"segment_rounds": 20})), Partition.take_seats

    def slowly(self: Partition, *args: Any) -> Any:
        ticket = run._ticket
        taken = take_seats(self, *args)
        if events(run, "lost"):
            wait_for(lambda: run.membership.roster.over(ticket))
        return taken

    monkeypatch.setattr(Partition, "take_seats", slowly)
    conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south"), signal.SIGKILL), round=50))
    assert [event["region"] for event in events(run, "back")] == ["south"]
    assert "south" in [event["region"] for event in events(run, "healed")]
    assert ledger(run.folder)["balanced"]


def test_a_worker_that_dies_as_soon_as_it_has_finished_its_segment_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it could hand over what it did."""
    run, result, victims = Run.start(job_of(tmp_path, "ma")), Future.result, list[int]()

    def dies_first(self: Future, *args: Any, **more: Any) -> Any:
        partition = run.partitions.get("south")
        if victims and partition is not None and self.client is partition.client:
            os.kill(pid := victims.pop(), signal.SIGKILL)
            wait_for(lambda: not psutil.pid_exists(pid))
            time.sleep(0.2)
        return result(self, *args, **more)

    monkeypatch.setattr(Future, "result", dies_first)
    conduct(run, in_mid_run(lambda run: victims.append(pid_of(run, "south"))))
    assert not victims
    assert [event["region"] for event in events(run, "lost")] == [event["region"] for event in events(run, "back")] == ["south"]
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize(
    ("strategy", "at"),
    [
        ("asgd_ga", "evaluate"),
        *(pytest.param("asgd_ga", at, marks=pytest.mark.chaos) for at in ("merge_fully", "write_model")),
        *(pytest.param("ma", at, marks=pytest.mark.chaos) for at in ("evaluate", "write_model")),
    ],
)
def test_a_worker_that_dies_after_the_last_segment_does_not_end_the_run(
    tmp_path: Path, strategy: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, does, killed = Run.start(job_of(tmp_path, strategy, regions=("north", "south"))), getattr(Partition, at), list[str]()

    def loses(self: Partition, *args: Any) -> Any:
        if self.region == run.plan.owner and not killed:  # type: ignore[union-attr]
            killed.append(self.region)
            os.kill(pid_of(run, self.region), signal.SIGKILL)
        return does(self, *args)

    monkeypatch.setattr(Partition, at, loses)
    summary = conduct(run)
    (lost,) = events(run, "lost_at_end")
    assert f"region {killed[0]}: worker" in lost["message"]
    evaluated = [event["metrics"] for event in events(run, "evaluated")]
    assert len(evaluated) == (2 if at == "write_model" else 1)
    assert all(metrics == evaluated[0] for metrics in evaluated), "nothing was trained"
    if strategy == "ma":
        assert evaluated[0] == events(run, "segment")[-1]["metrics"]
    assert summary["metrics"]["mse"] < 1.0
    assert (Path(run.folder.url) / "model.safetensors").exists()
    assert ledger(run.folder)["balanced"]


def test_a_region_that_evaluates_while_another_is_lost_keeps_its_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long its evaluation would take: it ends with the batch that it is at."""
    slow, restarted = tmp_path / "slow", list[str]()
    monkeypatch.setattr(Partition, "_restart", lambda self, workers: restarted.extend(workers))
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), task_args={"lr": 0.01, "slow_to_evaluate": str(slow)}))

    def strike(run: Run) -> None:
        slow.write_text("all")
        wait_for(lambda: run.board.rows["south"].status == run.board.rows["north"].status == "evaluating")
        time.sleep(0.5)
        os.kill(pid_of(run, "south"), signal.SIGKILL)
        wait_for(lambda: bool(events(run, "lost_at_end")))
        slow.unlink()

    conduct(run, in_mid_run(strike, round=EPOCHS * 10 - 50))
    assert events(run, "lost_at_end")
    assert not restarted


@pytest.mark.parametrize("before_its_first_step", [False, pytest.param(True, marks=pytest.mark.chaos)])
def test_a_worker_that_hangs_is_ended_and_replaced(tmp_path: Path, before_its_first_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.plan.planner.LEAST_HANG_S", 2.0)
    run = Run.start(job_of(tmp_path, "ma"))

    def stop(run: Run) -> None:
        os.kill(pid_of(run, "south"), signal.SIGSTOP)

    def at_once(run: Run, segment: int) -> None:
        if segment == 1 and not events(run, "lost"):
            monkeypatch.setattr("geotrain.partition.signs.FROZEN_S", 8.0)
            stop(run)

    conduct(run, at_once if before_its_first_step else in_mid_run(stop))
    (lost,) = events(run, "lost")
    assert "region south: worker" in lost["message"]
    assert "gave no sign of progress" in lost["message"]
    assert events(run, "back")
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize("worker", [1, pytest.param(0, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.chaos)])
def test_one_of_two_workers_is_killed_and_replaced_at_the_next_segment(
    tmp_path: Path, worker: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 0 is the leader: the region goes on with another."""
    usable = Partition._usable

    def slow_to_replace(self: Partition) -> list[str]:
        return [there for there in usable(self) if there in self.workers or events(run, "back")]

    if hangs := number == signal.SIGSTOP:
        monkeypatch.setattr("geotrain.plan.planner.LEAST_HANG_S", 3.0)
    else:
        monkeypatch.setattr("geotrain.members.membership.REPLACED_S", 0.5)
        monkeypatch.setattr(Partition, "_usable", slow_to_replace)
    regions = ("north", "south", "west")[: 2 + hangs]  # two that go on take longer than one: it must come back in time
    job = job_of(tmp_path, "ma", regions=regions, train={"batch_size": 10, "epochs": (1 + hangs) * EPOCHS, "seed": 3})
    tree = job.to_dict()
    tree["regions"][1]["devices"][0]["count"] = 2
    tree["schedule"]["allocate"] = "all"
    run = Run.start(JobSpec.model_validate(tree))
    conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south", worker), number)))
    assert [event["region"] for event in events(run, "lost")] == ["south"]
    seated = [event["workers"] for event in events(run, "seated") if event["region"] == "south"]
    assert seated == [2, 1, 2] or (hangs and seated == [2, 2]), "a worker that hangs may be replaced before the region comes back"
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize("mended", [True, pytest.param(False, marks=pytest.mark.chaos)])
def test_a_device_that_fails_costs_its_worker_and_not_the_run(tmp_path: Path, mended: bool) -> None:
    """As a GPU that is full or broken. In a new process it may be well again; if not, the run ends."""
    broken = tmp_path / "broken"
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), task_args={"lr": 0.01, "broken": str(broken)}))

    def fails(run: Run) -> None:
        broken.write_text(str(pid_of(run, "south")) if mended else "all")

    if not mended:
        with pytest.raises(DeviceFailed, match="OutOfMemoryError: CUDA out of memory"):
            conduct(run, in_mid_run(fails))
        assert {event["region"] for event in events(run, "lost")} == {"north", "south"}
        return
    conduct(run, in_mid_run(fails))
    (lost,) = events(run, "lost")
    assert "region south: the device or the memory of worker tcp://" in lost["message"]
    assert [event["region"] for event in events(run, "back")] == ["south"]
    assert ledger(run.folder)["balanced"]


@pytest.mark.chaos
def test_a_region_whose_numbers_are_wrong_for_a_while_is_healed_by_the_others(tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), task_args={"lr": 0.01, "sick": str(sick)}))
    summary = conduct(run, in_mid_run(lambda run: sick.write_text(str(pid_of(run, "south"))) and None))
    assert [event["in_a_row"] for event in events(run, "void_round")][:2] == [1, 2]
    (lost,) = events(run, "lost")
    assert "region south: the loss or the parameters became NaN" in lost["message"]
    assert [event["region"] for event in events(run, "back")] == ["south"]
    assert summary["metrics"]["mse"] < 1.0
    found = ledger(run.folder)
    assert found["balanced"], found


@pytest.mark.chaos
@pytest.mark.parametrize("again", [False, True])
def test_what_a_peer_gives_and_is_damaged_is_asked_for_once_more(tmp_path: Path, again: bool) -> None:
    run, damage = Run.start(job_of(tmp_path, "ma")), tmp_path / "damage"

    def strike(run: Run) -> None:
        damage.write_text("always" if again else "once")
        for region in ("north", "west"):
            on_leader(run, region, flip_a_bit_of_the_next_state, str(damage))
        os.kill(pid_of(run, "south"), signal.SIGKILL)

    if again:
        with pytest.raises(StateDamaged, match="arrived with another SHA-256"):
            conduct(run, in_mid_run(strike))
        return
    conduct(run, in_mid_run(strike))
    killed, damaged = events(run, "lost")
    assert (killed["region"], damaged["region"]) == ("south", "south")
    assert "arrived with another SHA-256" in damaged["message"]
    assert [event["region"] for event in events(run, "back")] == ["south", "south"]
    assert ledger(run.folder)["balanced"]


@pytest.mark.parametrize(
    ("regions", "again"),
    [
        (("north", "south"), False),
        pytest.param(("north", "south"), True, marks=pytest.mark.chaos),
        pytest.param(("north", "south", "west"), False, marks=pytest.mark.chaos),
    ],
)
def test_where_all_wait_for_each_other_they_go_back_to_the_last_checkpoint(
    tmp_path: Path, regions: tuple[str, ...], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geotrain.plan.planner.LEAST_HANG_S", 2.0)
    monkeypatch.setattr("geotrain.plan.planner.HANG_FACTOR", 0.0)
    run = Run.start(job_of(tmp_path, "ma", regions=regions))

    def strike(run: Run) -> None:
        on_leader(run, "north", partial(lose_the_next_hello, always=again), "south")
        os.kill(pid_of(run, "south"), signal.SIGKILL)

    if again:
        with pytest.raises(NobodyGoesOn, match="finding out who is ahead"):
            conduct(run, in_mid_run(strike))
        assert len(events(run, "standstill")) == 2
        return
    summary = conduct(run, in_mid_run(strike))
    (standstill,) = events(run, "standstill")
    assert standstill["waits_for"].keys() == set(regions)
    assert standstill["waits_for"]["north"].endswith("finding out who is ahead")
    assert "all regions waited for each other" in events(run, "lost")[1]["message"]
    assert [event["round"] for event in events(run, "rolled_back")] == [100]
    assert [event["round"] for event in events(run, "seated")[-len(regions) :]] == [100] * len(regions), "south was back already"
    assert summary["metrics"]["mse"] < 1.0
    assert ledger(run.folder)["balanced"]


@pytest.mark.chaos
def test_a_leader_that_dies_before_its_part_is_written_costs_that_checkpoint_alone(tmp_path: Path) -> None:
    run = Run.start(job_of(tmp_path, "ma"))

    def strike(run: Run) -> None:
        on_leader(run, "south", never_write_a_part)
        wait_for(lambda: run.board.rows["south"].rounds > 210)
        os.kill(pid_of(run, "south"), signal.SIGKILL)

    conduct(run, in_mid_run(strike))
    assert [event["round"] for event in events(run, "checkpoint_lost")] == [200]
    assert [event["region"] for event in events(run, "back")] == ["south"]
    assert 300 in [event["round"] for event in events(run, "checkpoint")]
    assert ledger(run.folder)["balanced"]


@pytest.mark.chaos
def test_a_region_whose_numbers_stay_wrong_ends_the_run(tmp_path: Path) -> None:
    sick, over = tmp_path / "sick", threading.Event()
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), task_args={"lr": 0.01, "sick": str(sick)}))

    def strike(run: Run) -> None:
        while not over.wait(0.05):
            with suppress(Exception):  # it has no worker at the moment
                sick.write_text(str(pid_of(run, "south")))

    try:
        with pytest.raises(NonFiniteLoss, match="region south"):
            conduct(run, in_mid_run(strike))
    finally:
        over.set()
    assert [event["region"] for event in events(run, "lost")] == ["south"]
    assert [event["region"] for event in events(run, "back")] == ["south"]


@pytest.mark.parametrize("again", [False, True])
def test_regions_that_no_longer_agree_go_back_to_the_last_checkpoint(tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that computes wrongly without a word is found by the hash of what it holds."""
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), train={"batch_size": 10, "epochs": 20, "seed": 3}))
    train, wrong = Partition.train, list[int]()

    def differs(self: Partition, order: Any, *args: Any) -> Any:
        done = train(self, order, *args)
        if self.region == "south" and order.number == 2 and (again or not wrong):
            wrong.append(done.round)
            return replace(done, sha256="0" * 64)
        return done

    monkeypatch.setattr(Partition, "train", differs)
    if again:
        with pytest.raises(Diverged, match="after round 200 the regions hold different parameters"):
            conduct(run)
        assert len(wrong) == 2
        return
    conduct(run)
    (back,) = events(run, "rolled_back")
    assert back["round"] == 100
    assert "different parameters" in back["why"]
    found = ledger(run.folder)
    assert found["balanced"], found
    assert {round for row in found["regions"] for round in row["rounds_again"]} == set(range(100, 200))


@pytest.mark.parametrize(
    "strategy", ["ma", pytest.param("streaming", marks=pytest.mark.chaos), pytest.param("asgd_ga", marks=pytest.mark.chaos)]
)
def test_a_region_whose_links_are_cut_is_left_out_until_they_heal(tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.plan.planner.LEAST_GIVE_UP_S", 3.0)
    monkeypatch.setattr("geotrain.plan.planner.TRANSFER_MARGIN", 0.0)
    tree = job_of(tmp_path, strategy).to_dict()
    valves = {}
    for region in tree["regions"]:
        port = free_port()
        valves[region["name"]] = valve = Valve(port)
        region["wan"] = {"listen": f"127.0.0.1:{port}", "advertise": valve.address}
    run = Run.start(JobSpec.model_validate(tree))

    def cut(run: Run) -> None:
        valves["west"].open.clear()
        before = run.board.rows["north"].rounds
        until = time.monotonic() + 60
        while run.board.rows["north"].rounds < before + 20 or not events(run, "lost"):  # the others go on without it
            assert time.monotonic() < until
            time.sleep(0.05)
        valves["west"].open.set()

    conduct(run, in_mid_run(cut))
    (lost,) = events(run, "lost")
    assert lost["region"] == "west"
    assert "cannot reach west" in lost["message"]
    assert [event["region"] for event in events(run, "back")] == ["west"]
    assert not events(run, "speed_changed"), "it is the link that was slow"
    assert [set(event["regions"]) for event in events(run, "view")] == [{"north", "south"}, {"north", "south", "west"}]
    assert ledger(run.folder)["balanced"]
    for valve in valves.values():
        valve.close()


def test_all_regions_lost_at_once_go_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), elastic={"quorum": 2}))

    def kill(run: Run) -> None:
        wait_for(lambda: run.board.rows["south"].rounds > 110)  # what no leader has told of is in no ledger
        for pid in [pid_of(run, region) for region in ("north", "south")]:
            os.kill(pid, signal.SIGKILL)

    summary = conduct(run, in_mid_run(kill))
    assert {event["region"] for event in events(run, "lost")} == {"north", "south"}
    (back,) = events(run, "rolled_back")
    assert back["round"] >= 100
    found = ledger(run.folder)
    assert found["balanced"], found
    again = [row for row in found["regions"] if row["again"]]
    assert {row["region"] for row in again} == {"north", "south"}
    assert min(min(row["rounds_again"]) for row in again) == back["round"]
    write_spent_rows(run.folder, tmp_path / "rows.parquet")
    rows = pq.read_table(tmp_path / "rows.parquet", filters=[("again", "=", True)])
    assert rows.num_rows == sum(row["again"] for row in again)
    assert all(Path(row["file"]).is_relative_to(tmp_path / row["region"] / "train") for row in rows.to_pylist())
    assert summary["samples"] == EPOCHS * 400


def test_below_the_quorum_the_run_pauses_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"segment_rounds": 10**6}
    run = Run.start(job_of(tmp_path, "asgd_ga", regions=("north", "south"), elastic={"quorum": 2}, schedule=whole))
    regroup = Partition.regroup

    def late(self: Partition, *args: Any) -> int:
        wait_for(lambda: not run.membership._in_segment)
        return regroup(self, *args)

    monkeypatch.setattr(Partition, "regroup", late)
    conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south"), signal.SIGKILL)))
    lost = run.board.stages
    assert any(stage == "recovering: waiting for south" for stage, _ in lost), lost
    rounds = [event["round"] for event in events(run, "segment")]
    assert len(rounds) > 1, f"the segment ended early: {rounds}"
    order = [event["event"] for event in events(run, "lost", "segment", "back")]
    assert order[order.index("lost") :][:3] == ["lost", "segment", "back"], "the checkpoint does not wait for the region"
    assert ledger(run.folder)["balanced"]


def test_a_stop_is_heard_while_the_quorum_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Partition, "regroup", lambda self, workers, patience_s: (_ for _ in ()).throw(ClusterTooSmall(self.region, 1, 0, 1))
    )
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), elastic={"quorum": 2}))

    def strike(run: Run) -> None:
        os.kill(pid_of(run, "south"), signal.SIGKILL)
        while run.membership.roster.enough or run.membership._in_segment:
            time.sleep(0.05)
        ask(run.folder.url, "stop")

    with pytest.raises(Stopped):
        conduct(run, in_mid_run(strike))
    monkeypatch.undo()
    conduct(Run.resume(run.folder))
    assert ledger(run.folder)["balanced"]


def test_a_run_gives_up_when_the_quorum_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Partition, "regroup", lambda self, workers, patience_s: (_ for _ in ()).throw(ClusterTooSmall(self.region, 1, 0, 1))
    )
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), elastic={"quorum": 2, "give_up_after_s": 3}))
    with pytest.raises(QuorumLost, match="1 regions are left, 2 are needed"):
        conduct(run, in_mid_run(lambda run: os.kill(pid_of(run, "south"), signal.SIGKILL)))
    monkeypatch.undo()
    resumed = Run.resume(run.folder)
    conduct(resumed)
    assert ledger(run.folder)["balanced"]


class DaskProcesses:
    """A scheduler and a worker as processes, as an operator runs them; both can be ended and begun again at the same address."""

    def __init__(self) -> None:
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> None:
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}
        scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"]
        worker = ["distributed.cli.dask_worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        for module in (scheduler, worker):
            self.processes.append(subprocess.Popen([sys.executable, "-m", *module], **quiet))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()


def without_a_scheduler(root: Path, strategy: str, strike: Callable[[Run, DaskProcesses], None]) -> None:
    """For a while, in mid-run: west, whose cluster is one of its own."""
    theirs = DaskProcesses()
    try:
        tree = job_of(root, strategy).to_dict()
        tree["regions"][2]["cluster"] = {"kind": "address", "address": theirs.address}
        run = Run.start(JobSpec.model_validate(tree))
        conduct(run, in_mid_run(lambda run: strike(run, theirs)))
        assert {event["region"] for event in events(run, "lost")} == {"west"}
        assert events(run, "back")
        assert ledger(run.folder)["balanced"]
    finally:
        theirs.end()


@pytest.mark.chaos
def test_a_regions_scheduler_that_stands_still_is_left_out_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.ANSWER_S", 2.0)
    monkeypatch.setattr("geotrain.partition.partition.REOPEN_S", 2.0)

    def stand_still(run: Run, theirs: DaskProcesses) -> None:
        theirs.processes[0].send_signal(signal.SIGSTOP)
        wait_for(lambda: events(run, "lost") != [])
        before = run.board.rows["north"].rounds
        wait_for(lambda: run.board.rows["north"].rounds > before + 20)  # the others go on without it
        theirs.processes[0].send_signal(signal.SIGCONT)

    without_a_scheduler(tmp_path, "ma", stand_still)


@pytest.mark.parametrize("reached_anew", [False, pytest.param(True, marks=pytest.mark.chaos)])
def test_a_run_that_is_to_end_at_once_does_not_wait_for_a_scheduler_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached_anew: bool
) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.ANSWER_S", 2.0 if reached_anew else 600.0)
    monkeypatch.setattr("geotrain.partition.partition.REOPEN_S", 600.0)

    def strike(run: Run, theirs: DaskProcesses) -> None:
        theirs.processes[0].send_signal(signal.SIGSTOP)
        if reached_anew:
            wait_for(lambda: events(run, "lost") != [])
        time.sleep(3.0)  # somebody has asked it for its workers by now, or for a connection
        ask(run.folder.url, "force")

    with pytest.raises(Stopped):
        without_a_scheduler(tmp_path, "ma", strike)


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_regions_scheduler_is_lost_and_begun_again(tmp_path: Path, strategy: str) -> None:
    def begin_again(_: Run, theirs: DaskProcesses) -> None:
        theirs.end()
        time.sleep(3.0)
        theirs.start()

    without_a_scheduler(tmp_path, strategy, begin_again)


FLOW = """
import sys
from geotrain.job import load_job
from geotrain.run import Run
from tests.making import conduct
conduct(Run.start(load_job(sys.argv[1])))
"""


@contextmanager
def a_flow_elsewhere(root: Path, strategy: str, epochs: int) -> Iterator[tuple[subprocess.Popen[str], RunFolder]]:
    """A process that trains two regions, on clusters that outlive it; those that it starts itself end with it."""
    with ExitStack() as stack:
        tree = job_of(root, strategy, regions=("north", "south"), train={"batch_size": 10, "epochs": epochs, "seed": 3}).to_dict()
        tree["schedule"]["segment_rounds"] = 10**6
        for region in tree["regions"]:
            cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL)
            region["cluster"] = {"kind": "address", "address": stack.enter_context(cluster).scheduler_address}
        (root / "job.yaml").write_text(yaml.safe_dump(tree))
        errors = stack.enter_context((root / "flow.err").open("w"))
        words = [sys.executable, "-c", FLOW, str(root / "job.yaml")]
        flow = subprocess.Popen(words, cwd=Path(__file__).parents[2], stderr=errors, text=True)
        try:
            wait_for(lambda: any("rounds" in path.name for path in root.glob("runs/*/rounds.jsonl")))
            yield flow, RunFolder(str(next(root.glob("runs/*"))))
        finally:
            flow.kill()
            flow.wait()


def ended_with_a_checkpoint(folder: RunFolder) -> bool:
    return len(list(Path(folder.url).glob("checkpoints/*/*.done.json"))) == 2


@pytest.mark.parametrize("strategy", ["ma", pytest.param("streaming", marks=pytest.mark.chaos)])
def test_the_flow_is_killed_and_the_regions_end_their_segment_with_a_checkpoint(tmp_path: Path, strategy: str) -> None:
    """And who resumes ends where it would have, to the bit."""
    with a_flow_elsewhere(tmp_path, strategy, EPOCHS) as (flow, folder):
        flow.kill()
        wait_for(lambda: ended_with_a_checkpoint(folder))
        flow.wait()
        resumed = Run.resume(folder)
        assert 0 < resumed.round < EPOCHS * 10
        summary = conduct(resumed)
    assert summary["samples"] == EPOCHS * 400
    assert ledger(folder)["balanced"], ledger(folder)
    whole = load_job(str(tmp_path / "job.yaml")).to_dict() | {"output": {"url": str(tmp_path / "whole")}}
    for region in whole["regions"]:
        region["cluster"] = {"kind": "local"}
    conduct(undisturbed := Run.start(JobSpec.model_validate(whole)))
    models = [load_file(f"{run.folder.url}/model.safetensors") for run in (undisturbed, resumed)]
    assert all(bool((models[0][name] == models[1][name]).all()) for name in models[0])


@pytest.mark.chaos
def test_a_flow_that_stood_still_and_was_overtaken_is_fenced_off_when_it_wakes(tmp_path: Path) -> None:
    with a_flow_elsewhere(tmp_path, "ma", epochs := 300) as (flow, folder):
        flow.send_signal(signal.SIGSTOP)
        wait_for(lambda: ended_with_a_checkpoint(folder))
        resumed = Run.resume(folder)
        summary = conduct(resumed, in_mid_run(lambda run: flow.send_signal(signal.SIGCONT), round=resumed.round + 20))
        assert flow.wait(timeout=60) != 0
        assert "RunTaken" in (tmp_path / "flow.err").read_text() or "Stopped" in (tmp_path / "flow.err").read_text()
    assert not events(resumed, "lost"), "it takes nobody's seat with it"
    kinds = [event["event"] for event in events(resumed, "created", "stopped", "failed", "resumed", "completed")]
    assert kinds == ["created", "resumed", "completed"], "it writes nothing more"
    assert summary["samples"] == epochs * 400
    assert ledger(folder)["balanced"], ledger(folder)


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["ma", "streaming"])
def test_a_flow_that_is_killed_in_mid_segment_resumes_to_the_bit(tmp_path: Path, strategy: str) -> None:
    job = job_of(tmp_path, strategy, regions=("north", "south"))
    conduct(whole := Run.start(job))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job.to_dict(), "output": {"url": str(tmp_path / "killed")}}))
    flow = subprocess.Popen([sys.executable, "-c", FLOW, str(tmp_path / "job.yaml")], cwd=Path(__file__).parents[2])
    try:
        wait_for(lambda: [*tmp_path.glob("killed/*/checkpoints/*/manifest.json")])
        time.sleep(random.Random(strategy).uniform(0.0, 2.0))
    finally:
        flow.kill()
        flow.wait()
    resumed = Run.resume(RunFolder(str(next(tmp_path.glob("killed/*")))))
    assert 0 < resumed.round < EPOCHS * 10
    conduct(resumed)
    models = [load_file(f"{run.folder.url}/model.safetensors") for run in (whole, resumed)]
    assert all(bool((models[0][name] == models[1][name]).all()) for name in models[0])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
