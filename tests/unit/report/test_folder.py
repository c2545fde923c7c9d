"""What is appended to a run's folder is there whole or not at all."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from geotrain.errors import OutputUnwritable
from geotrain.report.folder import RunFolder
from tests.making import points_job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(points_job(tmp_path), "r")


@pytest.fixture
def full(folder: RunFolder) -> Iterator[None]:
    """Files can grow to a hundred bytes more than events.jsonl has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (Path(folder.url) / "events.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kinds(folder: RunFolder) -> list[str]:
    return [event["event"] for event in folder.lines("events.jsonl")]


def test_a_disk_that_is_full_leaves_no_half_line(folder: RunFolder, full: None) -> None:
    folder.event("long", words="x" * 300)
    folder.flush(must=False)
    assert kinds(folder) == ["created"]
    assert (Path(folder.url) / "events.jsonl").read_text().endswith("}\n")
    with pytest.raises(OutputUnwritable):
        folder.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    folder.event("later")
    folder.flush()
    assert kinds(folder) == ["created", "long", "later"]


def test_a_line_that_a_crash_cut_off_hides_nothing_else(folder: RunFolder) -> None:
    with (Path(folder.url) / "events.jsonl").open("a") as file:
        file.write('{"event": "cut o\n{"at": 0, "event": "later"}\n')
    assert kinds(folder) == ["created", "later"]
