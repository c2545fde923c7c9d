import time
from pathlib import Path

import pytest

from geotrain.errors import NothingToResume, OutputUnwritable, RunNotFound
from geotrain.report.board import Board
from geotrain.report.folder import RunFolder, list_runs, new_run_id
from geotrain.report.page import loss_chart
from geotrain.report.state import state_of
from geotrain.report.words import duration, money, size
from geotrain.wan.transport import LinkTraffic
from tests.making import points_job


def record(region: str, round: int, at: float, samples: int = 10, loss: float | None = 1.0) -> dict[str, object]:
    return {"region": region, "round": round, "at": at, "samples": samples, "loss": loss, "held_s": 0.5}


def link(wire_bytes: int) -> dict[str, object]:
    return {**LinkTraffic(wire_bytes=wire_bytes).to_dict()}


def test_the_board_adds_up_what_leaders_report() -> None:
    clock = iter(range(1000))
    board = Board(("north", "south"), clock=lambda: float(next(clock)))
    board.heard("north", {"rounds": [record("north", 0, 1.0), record("north", 1, 2.0, loss=0.5)], "links": {"south": link(99)}})
    board.heard("north", {"rounds": [record("north", 2, 3.0, samples=0, loss=None)], "links": {"south": link(100), "west": link(20)}})
    row = board.snapshot()["regions"][0]
    assert (row["rounds"], row["samples"], row["loss"], row["wire_bytes"], row["held_s"]) == (3, 20, 0.5, 120, 1.5)
    assert row["samples_per_s"] == pytest.approx(10 / 2)
    assert board.snapshot()["regions"][1]["samples_per_s"] is None
    assert board.first_step_at is not None


def test_stages_are_noted_once_each() -> None:
    board = Board(("north",))
    for stage in ("planning", "planning", "training"):
        board.enter(stage)
    assert [name for name, _ in board.stages] == ["starting", "planning", "training"]


def test_numbers_read_like_words() -> None:
    assert [duration(s) for s in (4.23, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 05 min"]
    assert [size(b) for b in (512, 1400, 2e9, 3e12)] == ["512 B", "1.4 kB", "2.0 GB", "3.0 TB"]
    assert [money(d) for d in (0.00123, 1234.5)] == ["$0.00123", "$1,234.50"]


def test_a_run_folder_keeps_its_job_and_its_records(tmp_path: Path) -> None:
    job = points_job(tmp_path)
    folder = RunFolder.create(job, new_run_id(job.name))
    folder.round(record("north", 0, 1.0))
    folder.event("segment", metrics={"mse": 0.5}, round=1)
    folder.flush()
    again = RunFolder.find(folder.run, str(tmp_path / "runs"))
    assert again.job() == job
    assert [line["event"] for line in again.lines("events.jsonl")] == ["created", "segment"]
    assert [line["round"] for line in again.lines("rounds.jsonl")] == [0]
    assert [found.run for found in list_runs(str(tmp_path / "runs"))] == [folder.run]
    with pytest.raises(NothingToResume, match=r"before plan\.json was written"):
        again.read_json("plan.json")


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder.create(points_job(tmp_path), "r")
    with (tmp_path / "runs/r/events.jsonl").open("a") as file:
        file.write('{"at": 3, "ev')
    assert [line["event"] for line in folder.lines("events.jsonl")] == ["created"]


def test_an_unknown_run_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match="no run 'absent' in"):
        RunFolder.find("absent", str(tmp_path))


def test_an_output_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(OutputUnwritable, match="cannot write"):
        RunFolder.create(points_job(tmp_path), "r")


def test_the_state_of_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(points_job(tmp_path), "r")
    assert state_of(folder)["status"] == "starting"
    folder.round(record("north", 4, 1e9))
    folder.flush()
    assert state_of(folder, now=2e9)["status"] == "silent"
    folder.event("failed", message="north burned down")
    folder.flush()
    state = state_of(folder)
    assert (state["status"], state["message"], state["round"], state["resumable"]) == ("failed", "north burned down", 5, False)


def test_the_state_says_who_is_away_and_whether_the_quorum_is_there(tmp_path: Path) -> None:
    folder = RunFolder.create(points_job(tmp_path), "r")
    for region in ("north", "south"):
        folder.event("seated", region=region)
        folder.round(record(region, 4, 1e9))
    folder.flush()
    told = time.time()
    assert state_of(folder, now=told)["status"] == "running"
    for quorum, status in ((1, "degraded"), (2, "recovering")):
        folder.event("view", epoch=quorum, regions=["north"], quorum=quorum)
        folder.flush()
        assert state_of(folder, now=told)["status"] == status
    folder.event("view", epoch=3, regions=["north", "south"], quorum=2)
    folder.flush()
    assert state_of(folder, now=told)["status"] == "running"


def test_the_chart_draws_every_region_and_metric() -> None:
    rounds = [record(region, n, n, loss=1 / (n + 1)) for region in ("north", "south") for n in range(3)]
    chart = loss_chart(rounds, [{"round": 3, "metrics": {"accuracy": 0.5}}])
    assert chart.startswith("<svg")
    assert "2026" not in chart, "a chart must not depend on the day"
