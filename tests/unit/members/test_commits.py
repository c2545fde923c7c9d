"""A manifest is committed when every part is written, and not before; and what becomes of one that never will be."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geotrain import checkpoint
from geotrain.checkpoint import Manifest, StoredPart
from geotrain.errors import OutputUnwritable, RunTaken, Stopped
from geotrain.members.commits import Commits
from geotrain.report.folder import RunFolder
from tests.making import points_job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(points_job(tmp_path), "r")


def never() -> None: ...


@pytest.fixture
def commits(folder: RunFolder) -> Iterator[Commits]:
    commits = Commits(folder, never, 3, None)
    yield commits
    commits.close()


def manifest(round: int, *parts: StoredPart, loss: float = 0.0) -> Manifest:
    return Manifest("r", 1, round, 0, 100, None, {"loss": loss}, {}, parts)


def written(folder: RunFolder, region: str, round: int, staging: int = 1) -> dict[str, Any]:
    """What a leader tells when its part is there."""
    url = checkpoint.join(checkpoint.folder(folder.url, round), f"{region}.safetensors")
    part = checkpoint.write_part(region, url, round, {"w": torch.zeros(3)}, {"round": round})
    stored = {name: getattr(part, name) for name in part.__slots__}
    return {"stored": stored, "staging": staging, "life": 7}


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_waits_for_every_part(folder: RunFolder, commits: Commits) -> None:
    away = StoredPart("west", "x/checkpoints/00000005/west.safetensors", "", 0, 5)
    commits.begin(manifest(10, away), {"north": (7, 1), "south": (7, 1)}, never)
    commits.heard("north", written(folder, "north", 10))
    assert checkpoint.latest(folder.url) is None
    commits.heard("south", written(folder, "south", 10))
    commits.settle(never)
    assert commits.last == checkpoint.latest(folder.url)
    assert commits.last is not None
    assert [part.region for part in commits.last.parts] == ["north", "south", "west"]


def test_what_another_seat_or_an_earlier_staging_wrote_does_not_count(folder: RunFolder, commits: Commits) -> None:
    commits.heard("north", written(folder, "north", 10, staging=1))  # told before the barrier
    commits.begin(manifest(10), {"north": (7, 2)}, never)
    assert commits.awaited == ["north"]
    commits.heard("north", written(folder, "north", 10, staging=2) | {"life": 6})
    assert commits.awaited == ["north"]
    commits.heard("north", written(folder, "north", 10, staging=2))
    commits.settle(never)
    assert commits.last is not None


def test_a_region_may_be_a_segment_ahead(folder: RunFolder, commits: Commits) -> None:
    commits.begin(manifest(10), {"north": (7, 1), "south": (7, 1)}, never)
    commits.heard("north", written(folder, "north", 10, 1))
    commits.heard("north", written(folder, "north", 20, 2))
    commits.heard("south", written(folder, "south", 10, 1))
    commits.begin(manifest(20), {"north": (7, 2), "south": (7, 2)}, never)
    assert commits.last is not None
    assert [part.round for part in commits.last.parts] == [10, 10]
    commits.heard("south", written(folder, "south", 20, 2))
    commits.settle(never)
    assert [part.round for part in commits.last.parts] == [20, 20]


def test_a_region_lost_before_its_part_was_written_takes_the_checkpoint_with_it(folder: RunFolder, commits: Commits) -> None:
    commits.begin(manifest(10), {"north": (7, 1), "south": (7, 1)}, never)
    commits.heard("north", written(folder, "north", 10))
    commits.lost("north")  # its part is there
    assert commits.last is None
    commits.lost("south")
    commits.settle(never)
    assert commits.last is None
    folder.flush()
    assert [event["round"] for event in folder.lines("events.jsonl") if event["event"] == "checkpoint_lost"] == [10]
    commits.begin(manifest(20), {"north": (7, 2)}, never)
    commits.heard("north", written(folder, "north", 20, staging=2))
    commits.settle(never)
    assert commits.last is not None


def test_one_that_cannot_be_written_is_said_and_ends_the_segment(folder: RunFolder, commits: Commits) -> None:
    told: list[bool] = []
    commits.failed = lambda: told.append(True)
    commits.begin(manifest(10), {"north": (7, 1)}, never)
    commits.heard("north", {"unwritten": ["region north", "s3://full", "No space left"], "staging": 1, "life": 7})
    with pytest.raises(OutputUnwritable, match="region north cannot write s3://full"):
        commits.settle(never)
    assert told == [True]
    with pytest.raises(OutputUnwritable):
        commits.begin(manifest(20), {"north": (7, 2)}, never)


def test_nobody_commits_for_a_run_that_another_process_has_taken(folder: RunFolder) -> None:
    def taken() -> None:
        raise RunTaken("r", "process 1")

    commits = Commits(folder, taken, 3, None)
    commits.begin(manifest(10), {"north": (7, 1)}, never)
    commits.heard("north", written(folder, "north", 10))
    with pytest.raises(RunTaken):
        commits.settle(never)
    assert checkpoint.latest(folder.url) is None


def test_the_wait_ends_with_the_run(commits: Commits) -> None:
    def aborted() -> None:
        raise Stopped("r")

    commits.begin(manifest(10), {"north": (7, 1)}, never)
    with pytest.raises(Stopped):
        commits.settle(aborted)


def test_the_newest_and_the_best_are_kept(folder: RunFolder) -> None:
    commits = Commits(folder, never, 2, ("loss", False))
    for staging, (round, loss) in enumerate([(10, 0.5), (20, 0.1), (30, 0.4), (40, 0.3), (50, 0.2)]):
        written(folder, "west", round - 5)  # never committed
        commits.begin(manifest(round, loss=loss), {"north": (7, staging)}, never)
        commits.heard("north", written(folder, "north", round, staging))
        commits.settle(never)
    there = sorted(int(path.name) for path in (Path(folder.url) / "checkpoints").iterdir())
    assert there == [20, 40, 50]
