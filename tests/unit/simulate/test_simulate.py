"""Simulated runs: against what can be reckoned by hand, with and without numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from geotrain.cli import app
from geotrain.errors import JobError
from geotrain.job import JobSpec, MetricGoal, parse_job
from geotrain.simulate.body import Trained
from geotrain.simulate.network import DUPLEX
from geotrain.simulate.simulate import many, parse_goal, simulate, sweeps
from tests.chaos.invariants import CODECS, STRATEGIES, combinations
from tests.making import job_tree, points_job


def bare(regions: int = 2, **changes: Any) -> JobSpec:
    """A job without data: 1000 rows a region, 100 steps of 0.1 s, a model of 1 MB."""
    names = [f"r{i}" for i in range(regions)]
    tree = {
        **job_tree(Path("/nowhere"), names),
        "links": {"mbit_per_s": 80, "rtt_ms": 100, "usd_per_gb": 1.0},
        "train": {"batch_size": 10, "epochs": 1},
        "simulate": {"rows": 1000, "samples_per_s": 100, "step_spread": 0, "model_mb": 1},
        **changes,
    }
    return parse_job(tree)


def test_a_blocking_run_takes_its_steps_and_its_exchanges() -> None:
    outcome = simulate(bare(sync={"strategy": "ma", "every": 10}), real=False)
    exchange = 2 * (0.1 + 0.05)
    assert outcome.seconds == pytest.approx(100 * 0.1 + 10 * exchange, abs=0.01)
    assert outcome.samples == 2000
    assert outcome.wan_bytes == pytest.approx(20 * 1e6, rel=0.001)
    assert outcome.usd == pytest.approx(0.02 + outcome.seconds * 0.2 / 3600, rel=0.01)


def test_an_exchange_behind_compute_costs_only_the_last() -> None:
    for sync in (
        {"strategy": "delayed", "every": 10},
        {"strategy": "streaming", "every": 20, "fragments": 2, "overlap_steps": 8, "mix": 0},
    ):
        outcome = simulate(bare(sync=sync), real=False)
        assert 10.0 < outcome.seconds < 10.0 + 0.9, sync


def test_a_saturated_push_is_as_fast_as_its_link() -> None:
    outcome = simulate(bare(sync={"strategy": "asgd"}, links={"mbit_per_s": 40, "rtt_ms": 100}), real=False)
    fills, final_merge = 10 * (0.1 + 0.05), 2 * (0.2 + 0.05)
    least = 100 * 0.2 + fills + final_merge  # ten segments, each of which fills the pipe anew
    assert least <= outcome.seconds <= least / DUPLEX


def test_owners_send_the_same_whatever_the_number_of_regions() -> None:
    most = {}
    for topology in ("star", "owners"):
        for count in (3, 9):
            outcome = simulate(bare(count, sync={"strategy": "ma", "every": 10, "topology": topology}), real=False)
            most[topology, count] = max(region["wire_bytes"] for region in outcome.regions.values()) / outcome.rounds
    assert most["star", 9] > 3.5 * most["star", 3]
    assert most["owners", 9] < 1.4 * most["owners", 3]


@pytest.mark.parametrize("name", [name for name, _ in combinations() if name.endswith(("-fp32", "-dgc", "-auto"))])
def test_real_numbers_take_the_same_virtual_time(name: str, tmp_path: Path) -> None:
    """Payload sizes that are only reckoned with are those that are encoded."""
    base = {
        "links": {"mbit_per_s": 0.01, "rtt_ms": 100},
        "simulate": {"samples_per_s": 100, "step_spread": 0},
        "schedule": {"segment_rounds": 6},
    }
    job = points_job(
        tmp_path, ("north", "south", "west"), rows={"north": 120, "south": 200, "west": 160}, **base, sync=dict(combinations())[name]
    )
    ghost, real = (
        simulate(job.model_copy(update={"train": job.train.model_copy(update={"epochs": 2.0})}), real=real) for real in (False, True)
    )
    whole_steps = 0.1 if "quorum" in name else 0.02  # without numbers a merge that comes without a region finds it between two steps
    assert real.seconds == pytest.approx(ghost.seconds, rel=whole_steps)
    assert real.wan_bytes == pytest.approx(ghost.wan_bytes, rel=0.02)
    assert (real.samples, real.rounds) == (ghost.samples, ghost.rounds)
    assert real.metrics
    assert not ghost.metrics


def test_a_simulation_is_the_same_every_time(tmp_path: Path) -> None:
    job = points_job(tmp_path, sync=STRATEGIES["delayed-owners-quorum"] | CODECS["int8"])
    assert simulate(job, real=True) == simulate(job, real=True)


def test_a_region_that_is_lost_leaves_and_one_that_returns_heals() -> None:
    sync = {"strategy": "ma", "every": 10}
    outages = [{"region": "r1", "from_s": 3.0, "to_s": 8.0}]
    base = {"rows": 1000, "samples_per_s": 100, "step_spread": 0, "model_mb": 1}
    whole = simulate(bare(3, sync=sync), real=False)
    held = simulate(bare(3, sync=sync, simulate={**base, "outages": outages, "detect_s": 2.0}), real=False)
    assert not held.stuck
    assert whole.seconds + 1.0 < held.seconds < whole.seconds + 5.5
    gone = simulate(bare(3, sync=sync, simulate={**base, "outages": [{"region": "r1", "from_s": 3.0}], "detect_s": 2.0}), real=False)
    assert not gone.stuck
    assert gone.rounds == whole.rounds
    assert gone.regions["r1"]["samples"] < whole.regions["r1"]["samples"]


def test_a_region_that_returns_goes_on_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("north", "south", "west")
    last: dict[str, tuple[int, bool]] = {}
    close = Trained.close
    monkeypatch.setattr(Trained, "close", lambda body: (last.update({body.trainer.region: at_end(body)}), close(body))[-1])

    def at_end(body: Trained) -> tuple[int, bool]:
        rows = body.trainer.rows
        return rows.epoch, rows.book(rows.epoch).spent

    outage = {"region": "south", "from_s": 3.15, "to_s": 3.4}
    job = points_job(
        tmp_path,
        names,
        links={"mbit_per_s": 80, "rtt_ms": 20},
        train={"batch_size": 10, "epochs": 3},
        sync={"strategy": "ma", "every": 5},
        simulate={"samples_per_s": 100, "step_spread": 0, "outages": [outage], "detect_s": 0.1},
    )
    outcome = simulate(job, real=True)
    assert not outcome.stuck
    assert last == dict.fromkeys(names, (2, True))
    assert {region["steps"] for name, region in outcome.regions.items() if name != "south"} == {60}


def test_rows_of_tables_are_wanted_of_a_model_without_tables(tmp_path: Path) -> None:
    job = points_job(tmp_path, sync={"strategy": "ma", "every": 4, "sparse_embeddings": True})
    for real in (False, True):
        with pytest.raises(JobError, match="no nn.Embedding"):
            simulate(job, real=real)


def test_a_trace_slows_what_falls_into_it(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("seconds,link,mbit_per_s\n4,all,8\n8,all,80\n")
    slow = bare(sync={"strategy": "ma", "every": 10}, links={"mbit_per_s": 80, "rtt_ms": 100, "trace": str(file)})
    plain = bare(sync={"strategy": "ma", "every": 10})
    extra = simulate(slow, real=False).seconds - simulate(plain, real=False).seconds
    assert 1.5 < extra < 4.0


def test_a_target_ends_a_run_where_it_is_reached(tmp_path: Path) -> None:
    job = points_job(tmp_path, sync={"strategy": "ma", "every": 2}, schedule={"segment_rounds": 2})
    full = simulate(job, real=True)
    goal = MetricGoal(metric="mse", at_most=full.curve[len(full.curve) // 2].metrics["mse"])
    outcome = simulate(job, real=True, goal=goal)
    assert outcome.reached is not None
    assert outcome.samples < full.samples
    with pytest.raises(JobError, match="no metric 'f1'"):
        simulate(job, real=True, goal=MetricGoal(metric="f1", at_least=1))


def test_many_regions_and_few_of_them_in_memory() -> None:
    job = many(bare(3, sync={"strategy": "ma", "every": 10}), 200)
    assert len({region.name for region in job.regions}) == 200
    outcome = simulate(job, real=False)
    assert (outcome.rounds, outcome.samples) == (10, 200_000)


def test_targets_and_axes_are_read() -> None:
    assert parse_goal("accuracy>=0.9") == MetricGoal(metric="accuracy", at_least=0.9)
    assert parse_goal("loss <= 2") == MetricGoal(metric="loss", at_most=2)
    with pytest.raises(JobError, match="METRIC"):
        parse_goal("accuracy")
    assert sweeps([("a", [1, 2]), ("b", ["x"])]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert sweeps([]) == [{}]


def test_touched_rows_of_embeddings_give_the_same_model_for_fewer_bytes(tmp_path: Path) -> None:
    from geotrain.examples import make_example

    make_example("clicks", tmp_path, ("north", "south"), skew=0.5, rows=600, seed=0)
    tree = {
        **job_tree(tmp_path),
        "task": "geotrain.examples.clicks:Clicks",
        "task_args": {"sparse": True, "lr": 0.05, "dim": 8},
        "train": {"batch_size": 16, "epochs": 1},
    }
    dense, sparse = (
        simulate(parse_job({**tree, "sync": {"strategy": "ma", "every": 4, "sparse_embeddings": on}}), real=True) for on in (False, True)
    )
    assert sparse.metrics == dense.metrics
    assert sparse.wan_bytes < 0.3 * dense.wan_bytes


def test_a_sweep_is_a_table_a_picture_and_its_numbers(tmp_path: Path) -> None:
    points_job(tmp_path)
    (tmp_path / "job.yaml").write_text(json.dumps(job_tree(tmp_path)))
    words = ["simulate", str(tmp_path / "job.yaml"), "--sweep", "sync.strategy=asgd,ma,diloco", "--sweep", "links.mbit_per_s=1,100,-3"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--format", "json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["data"]["simulations"]
    assert len(rows) == 9
    refused = [row for row in rows if "refused" in row]
    assert [row["keys"]["links.mbit_per_s"] for row in refused] == [-3, -3, -3]
    assert all("mbit_per_s" in row["refused"] for row in refused)
    slow, fast = (next(row["seconds"] for row in rows if row["keys"] == {"sync.strategy": "ma", "links.mbit_per_s": m}) for m in (1, 100))
    assert slow > fast
    assert (tmp_path / "out/sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "out/sweep.svg").read_text()
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 9
