"""Whole runs on real parts: Dask worker processes, Flight between them, checkpoints on disk. Without Prefect."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from geotrain import checkpoint, registry
from geotrain.charge import ask
from geotrain.clusters import RegionCluster
from geotrain.errors import ClusterTooSmall, Diverged, GeotrainError, JobError, NothingToResume, Stopped
from geotrain.job import JobSpec
from geotrain.partition.partition import Partition
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import ledger, write_spent_rows
from geotrain.run import Run
from geotrain.simulate.simulate import simulate
from tests.making import conduct, points_job, write_points


def model_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.folder.url) / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


STRATEGIES: dict[str, dict[str, Any]] = {
    "ma": {"strategy": "ma", "every": 2},
    "diloco-bf16": {"strategy": "diloco", "every": 4, "codec": "bf16"},
    "asgd": {"strategy": "asgd", "max_staleness": 2},
    "asgd_ga": {"strategy": "asgd_ga", "every": 4},
    "ma-async": {"strategy": "ma", "every": 4, "mode": "async"},
    "streaming": {"strategy": "streaming", "every": 4, "fragments": 2, "overlap_steps": 1, "codec": "int8"},
    "delayed-owners-quorum": {"strategy": "delayed", "every": 2, "topology": "owners", "quorum": 2, "codec": "auto"},
    "ma-econtrol": {"strategy": "ma", "every": 2, "codec": "int4", "feedback": "econtrol"},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_learns_and_leaves_a_whole_folder(tmp_path: Path, name: str) -> None:
    job = points_job(
        tmp_path,
        rows={"north": 200, "south": 120},
        sync=STRATEGIES[name],
        train={"batch_size": 10, "epochs": 12, "seed": 3},
        task_args={"norm": name == "ma"},
        registry={"url": str(tmp_path / "registry"), "model": "points", "metric": "mse", "higher_is_better": False},
    )
    run = Run.start(job)
    summary = conduct(run)
    rounds = list(run.folder.lines("rounds.jsonl"))
    first = [record["loss"] for record in rounds if record["round"] == 0 and record["region"] == "north"][0]
    assert summary["metrics"]["mse"] < 0.6 * first
    assert summary["samples"] == 12 * 320, "every row once per epoch"
    assert {region["region"]: region["samples"] for region in summary["regions"]} == {"north": 2400, "south": 1440}
    assert all(link["updates"] > 0 and link["retries"] == 0 for link in summary["links"])
    assert sorted(path.name for path in Path(run.folder.url).iterdir() if not path.name.startswith(".")) == [
        "checkpoints", "events.jsonl", "inventory.json", "job.yaml", "lease", "model.safetensors", "plan.json",
        "report.html", "report.md", "rounds.jsonl", "summary.json",
    ]  # fmt: skip
    champion = registry.champion(str(tmp_path / "registry"), "points")
    assert champion is not None
    assert same(load_file(champion.url), model_of(run))
    assert "<svg" in (Path(run.folder.url) / "report.html").read_text()
    with pytest.raises(NothingToResume, match="it is complete"):
        Run.resume(run.folder)


@pytest.mark.parametrize("task_args", [{"momentum": 0.9}, {"adam": True, "lr": 0.01, "norm": True}], ids=["momentum", "adam-batchnorm"])
@pytest.mark.parametrize("name", ["ma", "diloco-bf16", "streaming"])
def test_killed_and_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, name: str, task_args: dict[str, Any]) -> None:
    job = points_job(tmp_path, sync=STRATEGIES[name], task_args=task_args, schedule={"segment_rounds": 7})
    whole = Run.start(job)
    conduct(whole)

    def die(run: Run, segment: int) -> None:
        if segment == 3:
            run.commits.settle(lambda: None)
            raise MemoryError("as if killed")

    broken = Run.start(job)
    with pytest.raises(MemoryError):
        conduct(broken, before_segment=die)
    resumed = Run.resume(RunFolder(broken.folder.url))
    assert resumed.round == 14
    summary = conduct(resumed)
    assert same(model_of(resumed), model_of(whole))
    assert summary["samples"] == 4 * 400


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path) -> None:
    job = points_job(tmp_path, schedule={"segment_rounds": 7})
    whole = Run.start(job)
    conduct(whole)

    def die(run: Run, segment: int) -> None:
        if segment == 4:
            run.commits.settle(lambda: None)
            raise MemoryError("as if killed")

    broken = Run.start(job)
    with pytest.raises(MemoryError):
        conduct(broken, before_segment=die)
    manifest = checkpoint.latest(broken.folder.url)
    assert manifest is not None
    part = Path(manifest.parts[0].url)
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    resumed = Run.resume(RunFolder(broken.folder.url))
    assert resumed.round == 21
    conduct(resumed)
    (told,) = [event for event in resumed.folder.lines("events.jsonl") if event["event"] == "bad_checkpoint"]
    assert (told["round"], told["back_to"]) == (21, 14)
    assert "SHA-256" in told["message"]
    assert same(model_of(resumed), model_of(whole))
    assert ledger(resumed.folder)["balanced"]


@pytest.mark.parametrize("name", ["diloco-bf16", "streaming", "ma-econtrol"])
def test_a_simulation_with_numbers_is_the_run_to_the_bit(tmp_path: Path, name: str) -> None:
    """The same job, plan, core and training; only the clock and the network are another."""
    job = points_job(tmp_path, rows={"north": 200, "south": 120}, sync=STRATEGIES[name], links={"mbit_per_s": 10, "rtt_ms": 100})
    summary = conduct(Run.start(job))
    outcome = simulate(job, real=True)
    assert outcome.metrics == summary["metrics"]
    assert outcome.samples == summary["samples"]


def stop_after(rounds: int) -> Callable[[Run, int], None]:
    """A `before_segment` that asks for an end in mid-segment."""

    def hook(run: Run, segment: int) -> None:
        def later() -> None:
            while run.board.rows["north"].rounds < rounds:
                time.sleep(0.05)
            run.control.stop.set()

        threading.Thread(target=later).start()

    return hook


@pytest.mark.parametrize("name", ["ma", "asgd_ga"])
def test_a_stop_drains_to_one_round_and_resumes(tmp_path: Path, name: str) -> None:
    job = points_job(
        tmp_path,
        sync=STRATEGIES[name],
        train={"batch_size": 4, "epochs": 200},
        schedule={"segment_rounds": 100_000},
        shape={"mbit_per_s": 100, "rtt_ms": 5},
    )
    run = Run.start(job)

    with pytest.raises(Stopped):
        conduct(run, stop_after(5))
    manifest = checkpoint.latest(run.folder.url)
    assert manifest is not None
    assert 5 <= manifest.round < run.plan.rounds  # type: ignore[union-attr]
    assert len(manifest.parts) == 2
    resumed = Run.resume(RunFolder(run.folder.url))
    resumed.plan = type(resumed.plan)(**{**_fields(resumed.plan), "rounds": manifest.round + 20})
    assert conduct(resumed)["rounds"] == manifest.round + 20


OVERLAPPING: dict[str, dict[str, Any]] = {
    "streaming": STRATEGIES["streaming"],
    "delayed-econtrol": {"strategy": "delayed", "every": 2, "codec": "int4", "feedback": "econtrol"},
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_stopped_in_mid_segment_and_resumed_is_uninterrupted_to_the_bit(tmp_path: Path, name: str) -> None:
    """The early end hastens the merges that are under way; resumed, they are applied when they are due."""
    tree = points_job(
        tmp_path,
        sync=OVERLAPPING[name],
        train={"batch_size": 10, "epochs": 40, "seed": 3},
        task_args={"adam": True, "lr": 0.01, "norm": True},
        schedule={"segment_rounds": 200, "allocate": "all"},
    ).to_dict()
    tree["regions"][1]["devices"][0]["count"] = 2 if name == "streaming" else 1
    job = JobSpec.model_validate(tree)
    conduct(whole := Run.start(job))
    stopped = Run.start(job)
    with pytest.raises(Stopped):
        conduct(stopped, stop_after(31))
    resumed = Run.resume(RunFolder(stopped.folder.url))
    assert resumed.round % 200, "not where it would have ended"
    conduct(resumed)
    assert same(model_of(resumed), model_of(whole))


def _fields(plan: Any) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__}


def test_a_run_resumes_with_fewer_regions_and_workers_and_with_more_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = points_job(
        tmp_path,
        ("north", "south", "west"),
        train={"batch_size": 10, "epochs": 30, "seed": 3},
        schedule={"segment_rounds": 1000, "allocate": "all"},
        shape={"mbit_per_s": 100, "rtt_ms": 10},
    ).to_dict()
    tree["regions"][1]["devices"][0]["count"] = 2
    run = Run.start(JobSpec.model_validate(tree))
    with pytest.raises(Stopped):
        conduct(run, stop_after(20))
    manifest = checkpoint.latest(run.folder.url)
    assert manifest is not None
    with pytest.raises(JobError, match="--without nowhere: the run has the regions north, south, west"):
        Run.resume(run.folder, without=["nowhere"])

    scale = RegionCluster.scale

    def too_small(self: RegionCluster, workers: int, check: Callable[[], None]) -> list[str]:
        if workers > 1:
            raise ClusterTooSmall(self.region, workers, 1, 0.0)
        return scale(self, workers, check)

    monkeypatch.setattr(RegionCluster, "scale", too_small)
    monkeypatch.setattr(Partition, "spare", lambda self: False)
    resumed = Run.resume(run.folder, without=["west"])
    assert (resumed.round, resumed.accounts.samples) == (manifest.round, manifest.samples)
    with pytest.raises(Stopped):
        conduct(resumed, stop_after(manifest.round + 20))
    monkeypatch.undo()
    again = Run.resume(run.folder)
    assert again.round > manifest.round
    summary = conduct(again)
    assert again.plan is not None
    assert summary["rounds"] == again.plan.rounds
    seats = [event for event in run.folder.lines("events.jsonl") if event["event"] == "seated"]
    assert [seat["workers"] for seat in seats if seat["region"] == "south"] == [2, 1, 2]
    assert len([seat for seat in seats if seat["region"] == "west"]) == 1
    found = ledger(run.folder)
    assert found["balanced"], found
    assert not any(row["again"] for row in found["regions"])
    assert all(row["once"] == row["rows"] for row in found["regions"] if row["region"] != "west")
    assert summary["metrics"]["mse"] < 0.5


def test_without_a_region_a_killed_run_counts_of_it_what_the_checkpoint_has(tmp_path: Path) -> None:
    train = {"batch_size": 10, "epochs": 12, "seed": 3}
    slowly = {"mbit_per_s": 100, "rtt_ms": 100}  # a segment lasts long enough for a request to be heard
    run = Run.start(points_job(tmp_path, ("north", "south", "west"), train=train, schedule={"segment_rounds": 40}, shape=slowly))

    def die(run: Run, segment: int) -> None:
        def at_once() -> None:
            while run.board.rows["west"].rounds < 50:
                time.sleep(0.01)
            ask(run.folder.url, "force")

        if segment == 2:
            threading.Thread(target=at_once, daemon=True).start()

    with pytest.raises(Stopped):
        conduct(run, die)
    told = [record["round"] for record in run.folder.lines("rounds.jsonl") if record["region"] == "west"]
    resumed = Run.resume(run.folder, without=["west"])
    assert (resumed.round, max(told) >= 40) == (40, True)
    summary = conduct(resumed)
    found = ledger(run.folder)
    assert found["balanced"], found
    counted = {name: sum(row["once"] for row in found["regions"] if row["region"] == name) for name in ("north", "south", "west")}
    assert counted == {row["region"]: row["samples"] for row in summary["regions"]}
    assert counted["west"] == 40 * 20
    write_spent_rows(run.folder, tmp_path / "rows.parquet")
    lost = pq.read_table(tmp_path / "rows.parquet", filters=[("region", "=", "west")])
    assert set(lost["round"].to_pylist()) == {round for round in told if round >= 40}
    assert not any(lost["again"].to_pylist())


def test_a_run_that_was_killed_while_it_published_publishes_no_second_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = points_job(tmp_path, registry={"url": str(tmp_path / "registry"), "model": "points", "metric": "mse", "higher_is_better": False})
    run = Run.start(job)
    monkeypatch.setattr(Run, "report", lambda self: (_ for _ in ()).throw(MemoryError("as if killed")))
    with pytest.raises(MemoryError):
        conduct(run)
    monkeypatch.undo()
    summary = conduct(Run.resume(run.folder))
    assert (summary["version"], summary["verdict"]) == (1, "champion: it was entered before")
    assert registry.next_number(str(tmp_path / "registry"), "points") == 2


def test_until_a_metric_is_reached(tmp_path: Path) -> None:
    job = points_job(tmp_path, train={"batch_size": 10, "epochs": 100, "until": {"metric": "mse", "at_most": 3.0}})
    run = Run.start(job)
    summary = conduct(run)
    assert summary["metrics"]["mse"] <= 3.0
    assert summary["rounds"] < run.plan.rounds  # type: ignore[union-attr]


def test_two_workers_train_like_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Gradients of a region's workers are averaged by rows: the same steps, whoever computes them."""
    results = []
    for workers, batch in ((1, 80), (2, 40)):
        job = points_job(
            tmp_path,
            rows={"north": 80, "south": 80},
            train={"batch_size": batch, "epochs": 10, "seed": 3},
            task_args={"fault": "no-dropout"},
            schedule={"allocate": "all", "scaling_loss": 0.0},
            sync={"strategy": "ma", "every": 1},
        )
        tree = job.to_dict()
        for region in tree["regions"]:
            region["devices"][0]["count"] = workers
        run = Run.start(JobSpec.model_validate(tree))
        conduct(run)
        results.append(model_of(run))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-4), name


def test_a_worker_without_rows_of_its_own_is_not_planned(tmp_path: Path) -> None:
    write_points(tmp_path / "south" / "train", 100, group=100)
    write_points(tmp_path / "south" / "eval", 40)
    job = points_job(tmp_path, schedule={"allocate": "all"})
    tree = job.to_dict()
    tree["regions"][1]["devices"][0]["count"] = 2
    run = Run.start(JobSpec.model_validate(tree))
    conduct(run)
    assert run.plan is not None
    assert run.plan.region("south").workers == 1


def test_retraining_begins_from_the_champion(tmp_path: Path) -> None:
    job = points_job(tmp_path, registry={"url": str(tmp_path / "registry"), "model": "points", "metric": "mse", "higher_is_better": False})
    first = Run.start(job)
    conduct(first)
    champion = registry.champion(str(tmp_path / "registry"), "points")
    again = Run.start(job)
    again.warm_start = champion
    conduct(again)
    assert not again.has_new_data(since=champion)
    first_loss, warm_loss = (next(iter(run.folder.lines("rounds.jsonl")))["loss"] for run in (first, again))
    assert warm_loss < 0.5 * first_loss
    newest = registry.version(str(tmp_path / "registry"), "points", 2)
    assert newest.parent == 1
    write_points(tmp_path / "south" / "train", 50, seed=9, files=2)
    third = Run.start(job)
    with third:
        third.in_every_region(third.analyze)
        assert third.has_new_data(since=champion)


def test_data_checkpoints_and_registry_on_s3(tmp_path: Path, bucket: str) -> None:
    import s3fs

    local = points_job(tmp_path)
    s3fs.S3FileSystem().put(str(tmp_path / "north"), f"{bucket}/run/north", recursive=True)
    s3fs.S3FileSystem().put(str(tmp_path / "south"), f"{bucket}/run/south", recursive=True)
    tree = local.to_dict() | {"output": {"url": f"s3://{bucket}/runs"}, "registry": {"url": f"s3://{bucket}/registry", "model": "points"}}
    for region in tree["regions"]:
        name = region["name"]
        region["data"] = {"train": f"s3://{bucket}/run/{name}/train", "eval": f"s3://{bucket}/run/{name}/eval"}
        region["storage_options"] = {
            "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"],
            "secret": {"env": "AWS_SECRET_ACCESS_KEY"},
            "key": {"env": "AWS_ACCESS_KEY_ID"},
        }
    run = Run.start(JobSpec.model_validate(tree))
    summary = conduct(run)
    assert summary["samples"] == 4 * 400
    champion = registry.champion(f"s3://{bucket}/registry", "points")
    assert champion is not None
    assert s3fs.S3FileSystem().exists(champion.url)
    assert len(list(run.folder.lines("rounds.jsonl"))) == 2 * summary["rounds"]


def test_an_interrupt_while_clusters_start_leaves_nothing(tmp_path: Path) -> None:
    run = Run.start(points_job(tmp_path))
    with contextlib.suppress(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert [event["event"] for event in run.folder.lines("events.jsonl")] == ["created", "stopped"]


def test_a_full_merge_that_leaves_regions_with_other_parameters_is_an_error(tmp_path: Path) -> None:
    run = Run.start(points_job(tmp_path))
    run.merged({"north": "a" * 64, "south": "a" * 64})
    with pytest.raises(Diverged, match="the regions hold different parameters: .*'south': 'bbbbbbbbbbbb'"):
        run.merged({"north": "a" * 64, "south": "b" * 64})


def test_errors_of_regions_are_raised_the_first_cause_first(tmp_path: Path) -> None:
    run = Run.start(points_job(tmp_path))

    def stage(region: str) -> None:
        if region == "south":
            time.sleep(0.2)
            raise GeotrainError("the cause")
        run.control.abort.wait(10)
        raise Stopped(run.id)

    with pytest.raises(GeotrainError, match="the cause"):
        run.in_every_region(stage)
