"""Checkpoints that nobody was left to commit are committed one after the other, with everything that they add up to."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from geotrain import checkpoint
from geotrain.checkpoint import Manifest
from geotrain.members.late import commit_late
from geotrain.partition.orders import SegmentDone
from geotrain.report.folder import RunFolder
from tests.making import points_job

REGIONS = ("north", "south")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(points_job(tmp_path), "r")
    for region in REGIONS:
        folder.event("seated", region=region, round=0, life=7, workers=1, cursor={"epoch": 0, "used": [0]})
    folder.flush()
    return folder


def ended(folder: RunFolder, region: str, round: int, sha256: str = "same") -> None:
    """A region ended a segment of ten rounds of five rows before this round, and wrote its part."""
    closed = tuple((number, 0, number + 1, 1, 5) for number in range(round - 10, round))
    where = checkpoint.folder(folder.url, round)
    part = checkpoint.write_part(region, checkpoint.join(where, f"{region}.safetensors"), round, {"w": torch.zeros(2)}, {"round": round})
    done = SegmentDone(
        region=region, segment=round // 10, round=round, samples=50, steps=10, loss=0.5, seconds=1.0, held_s=0.0, sha256=sha256,
        staging=round // 10, stall_s=0.0, metrics={"mse": (4.0, 2)}, traffic={}, life=7, closed=closed,
    )  # fmt: skip
    note = json.dumps({"done": asdict(done), "part": asdict(part)}).encode()
    checkpoint.write_bytes(region, checkpoint.join(where, f"{region}.done.json"), note)


def test_every_segment_counts(folder: RunFolder) -> None:
    for round in (10, 20):
        for region in REGIONS:
            ended(folder, region, round)
    manifest = commit_late(folder, None, REGIONS, agree=True)
    assert manifest == checkpoint.latest(folder.url)
    assert manifest is not None
    assert (manifest.round, manifest.samples, manifest.totals["north"]["samples"]) == (20, 200, 100)
    assert len(list(folder.lines("rounds.jsonl"))) == 2 * 20
    assert commit_late(folder, manifest, REGIONS, agree=True) is None


def test_one_that_a_region_did_not_write_or_that_differs_does_not_count(folder: RunFolder) -> None:
    for region in REGIONS:
        ended(folder, region, 10)
    ended(folder, "north", 20)
    manifest = commit_late(folder, None, REGIONS, agree=True)
    assert manifest is not None
    assert manifest.round == 10
    ended(folder, "south", 20, sha256="another")
    assert commit_late(folder, manifest, REGIONS, agree=True) is None
    assert commit_late(folder, manifest, REGIONS, agree=False) is not None


def test_a_region_that_was_away_is_not_waited_for_and_one_that_came_is_in(folder: RunFolder) -> None:
    ended(folder, "north", 10)
    old = commit_late(folder, None, ("north",), agree=True)
    assert isinstance(old, Manifest)
    ended(folder, "north", 20)
    alone = commit_late(folder, old, REGIONS, agree=True)
    assert alone is not None
    assert [part.region for part in alone.parts] == ["north"]
    for region in REGIONS:
        ended(folder, region, 30)
    both = commit_late(folder, alone, REGIONS, agree=True)
    assert both is not None
    assert both.totals["south"]["samples"] == 50


def test_a_region_that_was_lost_meanwhile_is_not_waited_for_and_its_rounds_count_as_far_as_others_hold_them(folder: RunFolder) -> None:
    for region in REGIONS:
        ended(folder, region, 10)
    manifest = commit_late(folder, None, REGIONS, agree=True)
    assert manifest is not None
    for round in range(10, 15):
        same = {"at": 0.0, "round": round, "epoch": 0, "done": round + 1, "steps": 1, "samples": 5, "life": 7}
        folder.round({**same, "region": "south"})
        folder.round({**same, "region": "north", "settled": {"south": 13}})
    folder.event("lost", region="south", message="killed")
    folder.flush()
    ended(folder, "north", 20)
    late = commit_late(folder, manifest, REGIONS, agree=True)
    assert late is not None
    assert (late.round, late.totals["north"]["samples"], late.totals["south"]["samples"]) == (20, 100, 50 + 3 * 5)


def test_what_an_earlier_seat_wrote_is_not_committed(folder: RunFolder) -> None:
    for region in REGIONS:
        ended(folder, region, 10)
    folder.event("seated", region="south", round=0, life=8, workers=1, cursor={"epoch": 0, "used": [0]})
    folder.flush()
    assert commit_late(folder, None, REGIONS, agree=True) is None
