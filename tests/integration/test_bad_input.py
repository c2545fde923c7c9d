"""What is wrong is found as early as it can be, and named: region, thing, remedy. On two small clusters that all tests share."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster

from geotrain import checkpoint
from geotrain.clusters import quiet_dask
from geotrain.errors import (
    BadCheckpoint,
    ClusterTooSmall,
    ClusterUnreachable,
    DataUnreachable,
    EmptyRegion,
    GeotrainError,
    MissingColumn,
    ModelMismatch,
    NonFiniteLoss,
    OutputUnwritable,
    SchemaMismatch,
    TaskFailed,
    TaskImportError,
    UnreadableShard,
)
from geotrain.job import JobSpec, parse_job
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import ledger
from geotrain.run import InThreads, Run, locate_and_plan
from tests.making import conduct, job_tree, points_job, write_points


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    quiet_dask()
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address=":0", host="127.0.0.1")
            ).scheduler_address
            for name in ("north", "south")
        }


def on(addresses: dict[str, str], root: Path, **changes: Any) -> dict[str, Any]:
    """A sound job on the shared clusters, as a tree to spoil."""
    points_job(root)
    tree = job_tree(root, **changes)
    for region in tree["regions"]:
        region["cluster"] = {"kind": "address", "address": addresses[region["name"]]}
    return tree


def stages(job: JobSpec, *, train: bool = False) -> Run:
    """Analyse, plan and provision; train as well when asked."""
    run = Run.start(job)
    with run:
        locate_and_plan(run, InThreads(run))
        run.introduce(run.in_every_region(run.provision))
        for segment in run.segments_left() if train else []:
            run.synchronize(segment, run.in_every_region(run.train, segment))
    return run


def failing(tree: dict[str, Any], kind: type[GeotrainError], *, train: bool = False) -> str:
    with pytest.raises(kind) as caught:
        stages(parse_job(tree), train=train)
    assert caught.value.advice, "no remedy"
    return str(caught.value)


def test_the_sound_job_runs(addresses: dict[str, str], tmp_path: Path) -> None:
    assert stages(parse_job(on(addresses, tmp_path)), train=True).round == 40


def test_a_missing_bucket(addresses: dict[str, str], tmp_path: Path, bucket: str, s3_server: str) -> None:
    tree = on(addresses, tmp_path)
    tree["regions"][1]["data"]["train"] = "s3://no-such-bucket-here/train"
    tree["regions"][1]["storage_options"] = {"endpoint_url": s3_server, "anon": True}
    assert "region south: cannot list s3://no-such-bucket-here/train" in failing(tree, DataUnreachable)


def test_a_truncated_file(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    file = tmp_path / "south/train/part-0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert "region south" in (text := failing(tree, UnreadableShard))
    assert str(file) in text


def test_a_missing_column(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    pq.write_table(pa.table({"x": [[1.0] * 4] * 5}), tmp_path / "north/train/part-9.parquet")
    assert "no column 'y'" in (text := failing(tree, MissingColumn))
    assert "region north" in text


def test_schemas_that_differ_between_regions(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    pq.write_table(pa.table({"x": [[1.0] * 4] * 50, "y": np.zeros(50)}), tmp_path / "south/train/part-0.parquet")
    text = failing(tree, SchemaMismatch)
    assert "region south: column 'x'" in text
    assert "(region north)" in text


def test_an_empty_region(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    (tmp_path / "south/train/part-0.parquet").unlink()
    assert "region south" in failing(tree, EmptyRegion)


def test_a_task_that_cannot_be_imported(addresses: dict[str, str], tmp_path: Path) -> None:
    assert "no_such_task" in failing(on(addresses, tmp_path, task="no_such_task:Task"), TaskImportError)
    assert "unexpected keyword" in failing(on(addresses, tmp_path, task_args={"lrr": 1}), TaskImportError)


@pytest.mark.parametrize(("fault", "where"), [("batch", "batch"), ("loss", "loss or backward")])
def test_a_task_that_fails_is_found_by_the_probe(addresses: dict[str, str], tmp_path: Path, fault: str, where: str) -> None:
    text = failing(on(addresses, tmp_path, task_args={"fault": fault}), TaskFailed)
    assert f"the task failed in {where}" in text


def test_a_model_that_differs_between_regions(addresses: dict[str, str], tmp_path: Path) -> None:
    assert "0.weight: its initial values differ" in failing(on(addresses, tmp_path, task_args={"fault": "unseeded"}), ModelMismatch)


def test_a_nan_in_the_data_stops_before_anything_leaves_the_region(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path, schedule={"segment_rounds": 5}, elastic={"bad_rounds": 1})
    shutil.rmtree(tmp_path / "south/train")
    write_points(tmp_path / "south/train", 200, nan_at=199)
    with pytest.raises(NonFiniteLoss, match="region south: the loss or the parameters became NaN") as caught:
        stages(parse_job(tree), train=True)
    assert "part-0.parquet" in str(caught.value)
    run = next(iter((tmp_path / "runs").iterdir()))
    manifest = checkpoint.latest(str(run))
    if manifest is not None:
        for part in manifest.parts:
            tensors, _ = checkpoint.read_part(part)
            assert all(bool(tensor.isfinite().all()) for tensor in tensors.values()), "the checkpoint is intact"


def test_a_round_with_a_nan_is_void_and_the_run_goes_on(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    shutil.rmtree(tmp_path / "south/train")
    write_points(tmp_path / "south/train", 200, nan_at=199)
    run = Run.start(parse_job(tree))
    summary = conduct(run)
    void = [event for event in run.folder.lines("events.jsonl") if event["event"] == "void_round"]
    assert [event["region"] for event in void] == ["south"] * 4, "once an epoch"
    found = ledger(run.folder)
    assert found["balanced"]
    assert sum(row["discarded"] for row in found["regions"] if row["region"] == "south") == 4 * 20
    assert all(row["discarded"] == 0 for row in found["regions"] if row["region"] == "north")
    assert summary["metrics"]["mse"] < 2.0


def test_a_cluster_that_cannot_be_reached(addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.CONNECT_S", 1.0)
    tree = on(addresses, tmp_path)
    tree["regions"][1]["cluster"]["address"] = "tcp://127.0.0.1:1"
    assert "region south: no Dask cluster at tcp://127.0.0.1:1" in failing(tree, ClusterUnreachable)


def test_a_cluster_that_is_too_small(addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.GROW_MARGIN_S", 0.5)
    tree = on(addresses, tmp_path, schedule={"allocate": "all"})
    tree["regions"][0]["devices"][0]["count"] = 3
    assert "region north: 3 workers were planned, 1 came" in failing(tree, ClusterTooSmall)


def test_an_output_that_cannot_be_written(addresses: dict[str, str], tmp_path: Path) -> None:
    tree = on(addresses, tmp_path)
    (tmp_path / "runs").write_text("in the way")
    assert "cannot write" in failing(tree, OutputUnwritable)


def test_a_checkpoint_with_a_flipped_bit_is_named_on_resume(addresses: dict[str, str], tmp_path: Path) -> None:
    run = stages(parse_job(on(addresses, tmp_path)), train=True)
    manifest = checkpoint.latest(run.folder.url)
    assert manifest is not None
    part = Path(manifest.part("north").url)
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    resumed = Run.resume(RunFolder(run.folder.url))
    with pytest.raises(BadCheckpoint, match=r"north\.safetensors"), resumed:
        locate_and_plan(resumed, InThreads(resumed))
        resumed.in_every_region(resumed.provision)
