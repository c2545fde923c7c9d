"""A bucket that is down for a while, a disk that is full for a while, and one that stays unusable, in mid-run."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import s3fs

from geotrain import checkpoint
from geotrain.errors import OutputUnwritable
from geotrain.job import JobSpec
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.chaos.test_processes import events, in_mid_run, job_of
from tests.making import conduct
from tests.s3 import Flaky


@pytest.mark.parametrize("outage_s", [8.0, pytest.param(60.0, marks=pytest.mark.chaos)])
def test_a_bucket_that_answers_500_for_a_while(tmp_path: Path, flaky: Flaky, bucket: str, outage_s: float) -> None:
    """Data, checkpoints and the run folder are in it."""
    tree: dict[str, Any] = job_of(tmp_path, "ma", regions=("north", "south"), schedule={"segment_rounds": 50}).to_dict()
    tree["output"] = {"url": f"s3://{bucket}/outage-{outage_s:.0f}"}
    for region in tree["regions"]:
        there = f"{bucket}/{tmp_path.name}/{region['name']}"
        s3fs.S3FileSystem().put(str(tmp_path / region["name"]), there, recursive=True)
        region["data"] = {"train": f"s3://{there}/train", "eval": f"s3://{there}/eval"}
    run = Run.start(JobSpec.model_validate(tree))
    restored: list[float] = []

    def fail(run: Run) -> None:
        flaky.down = True

        def restore() -> None:
            time.sleep(outage_s)
            flaky.down = False
            restored.append(time.time())

        threading.Thread(target=restore).start()

    summary = conduct(run, in_mid_run(fail, round=60))
    assert summary["rounds"] == run.plan.rounds  # type: ignore[union-attr]
    assert events(run, "checkpoint")[-1]["at"] > restored[0]
    assert not events(run, "lost")
    assert ledger(run.folder)["balanced"]


@contextmanager
def small_disk(disk: Path, megabytes: int) -> Iterator[None]:
    """Raises OSError where none can be mounted."""
    if os.geteuid() != 0:
        raise PermissionError("mounting a small disk needs root")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], capture_output=True).returncode != 0:
        raise OSError("this machine mounts no tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(ballast: Path) -> None:
    """All that is left of a disk."""
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(65536))
            file.flush()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 4 MiB."""
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(disk := tmp_path / "disk", megabytes=4))
        except OSError as error:
            pytest.skip(str(error))
        yield disk


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, disk: Path) -> None:
    tree = job_of(tmp_path, "ma", regions=("north", "south"), schedule={"segment_rounds": 50}).to_dict()
    tree["output"] = {"url": str(disk / "runs")}
    run = Run.start(JobSpec.model_validate(tree))
    ballast, freed = disk / "ballast", list[int]()

    def fills(run: Run) -> None:
        fill(ballast)
        at = run.round

        def free() -> None:
            while run.board.rows["north"].rounds < at + 70:  # training goes on meanwhile
                time.sleep(0.02)
            time.sleep(1.0)
            ballast.unlink()
            freed.append(run.round)

        threading.Thread(target=free).start()

    summary = conduct(run, in_mid_run(fills, round=60))
    assert summary["rounds"] == run.plan.rounds  # type: ignore[union-attr]
    assert freed
    assert events(run, "checkpoint")[-1]["round"] == run.plan.rounds  # type: ignore[union-attr]
    assert not events(run, "lost")
    assert ledger(run.folder)["balanced"]


def test_a_place_that_is_gone_ends_the_run_with_the_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    run = Run.start(job_of(tmp_path, "ma", regions=("north", "south"), schedule={"segment_rounds": 50}))
    checkpoints, aside = Path(run.folder.url) / "checkpoints", tmp_path / "aside"
    kept: list[int] = []

    def lose(run: Run, segment: int) -> None:
        if segment == 3:
            run.commits.settle(lambda: None)
            kept.append(run.commits.last.round)  # type: ignore[union-attr]
            checkpoints.rename(aside)
            checkpoints.write_text("in the way")

    with pytest.raises(OutputUnwritable, match=r"region (north|south) cannot write .*checkpoints"):
        conduct(run, lose)
    checkpoints.unlink()
    shutil.move(aside, checkpoints)
    manifest = checkpoint.latest(run.folder.url)
    assert manifest is not None
    assert manifest.round == kept[0]
    assert conduct(Run.resume(RunFolder(run.folder.url)))["metrics"]["mse"] < 1.0
    assert ledger(run.folder)["balanced"]
