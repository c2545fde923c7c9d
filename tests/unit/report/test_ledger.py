"""Which rounds of a run's folder count: those that somebody holds."""

from pathlib import Path
from typing import Any

import pytest

from geotrain.report.folder import RunFolder
from geotrain.report.ledger import samples_counted
from geotrain.sync.messages import RoundMade
from tests.making import points_job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(points_job(tmp_path), "r")


def seated(folder: RunFolder, region: str, life: int, round: int) -> None:
    folder.event("seated", region=region, life=life, round=round, workers=1, cursor={"epoch": 0, "used": [0]})


def made(folder: RunFolder, region: str, life: int, rounds: range, **settled: int) -> None:
    for round in rounds:
        record: dict[str, Any] = {"at": 0.0, "epoch": 0, "done": round + 1, "steps": 1, "samples": 1, "settled": settled}
        folder.round({**record, "region": region, "life": life, "round": round})


def counted(folder: RunFolder, until: int = 1000) -> dict[str, int]:
    folder.flush()
    return samples_counted(folder, until)


def test_a_region_that_is_lost_for_good_counts_as_far_as_others_hold_it(folder: RunFolder) -> None:
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
        made(folder, region, 1, range(20), **({"south": 17} if region == "north" else {}))
    folder.event("lost", region="south", message="killed")
    assert counted(folder) == {"north": 20, "south": 17}
    assert counted(folder, until=15) == {"north": 15, "south": 15}


def test_what_all_agreed_on_counts_unless_the_run_went_back(folder: RunFolder) -> None:
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
        made(folder, region, 1, range(20))
    folder.event("segment", round=20, hashes={"north": "a", "south": "a"})
    folder.event("lost", region="south", message="killed")
    assert counted(folder) == {"north": 20, "south": 20}
    folder.event("resumed", round=10)
    for region in ("north", "south"):
        seated(folder, region, 2, 10)
        made(folder, region, 2, range(10, 15), **({"south": 13} if region == "north" else {}))
    folder.event("lost", region="south", message="killed again")
    assert counted(folder) == {"north": 15, "south": 13}


@pytest.mark.parametrize("event", [{"event": "rolled_back", "round": 10}, {"event": "bad_checkpoint", "back_to": 10, "round": 20}])
def test_a_region_without_another_seat_counts_up_to_where_the_run_went_back(folder: RunFolder, event: dict[str, Any]) -> None:
    seated(folder, "south", 1, 0)
    made(folder, "south", 1, range(20))
    folder.event(**event)
    folder.event("left", region="south")
    assert counted(folder) == {"south": 10}


def test_what_a_lost_region_held_goes_with_it_unless_others_have_it(folder: RunFolder) -> None:
    """Two leaders are lost within one exchange, and the flow ends before the next checkpoint."""
    for region in ("north", "south", "west"):
        seated(folder, region, 1, 0)
    made(folder, "south", 1, range(20))
    made(folder, "west", 1, range(20), south=19)
    made(folder, "north", 1, range(20), south=15)
    folder.event("lost", region="south", message="killed", held_of_absent={"south": 19})
    assert counted(folder)["south"] == 19
    folder.event("lost", region="west", message="killed", held_of_absent={"south": 15, "west": 12})
    assert counted(folder) == {"north": 20, "south": 15, "west": 12}
    made(folder, "north", 1, range(20, 21), south=16, west=12)
    assert counted(folder) == {"north": 21, "south": 16, "west": 12}, "told since"


def test_a_round_that_only_others_told_of_counts_unless_its_leader_did(folder: RunFolder) -> None:
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
    made(folder, "south", 1, range(10))
    for round in (9, 10):
        folder.round_by_others(RoundMade("south", 1, round, epoch=0, done=round + 1, steps=1, samples=1))
    made(folder, "north", 1, range(12), south=11)
    folder.event("lost", region="south", message="killed")
    assert counted(folder) == {"north": 12, "south": 11}
    made(folder, "south", 1, range(10, 11))
    assert counted(folder) == {"north": 12, "south": 11}, "heard late"


def test_of_a_round_that_others_hold_in_part_that_part_counts(folder: RunFolder) -> None:
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
    made(folder, "south", 1, range(10))
    whole = {"at": 0.0, "region": "south", "life": 1, "round": 10, "epoch": 0, "done": 14, "steps": 4, "samples": 4, "settled": {}}
    folder.round(whole)
    for steps in (1, 2, 3):
        folder.round_by_others(RoundMade("south", 1, 10, epoch=0, done=10 + steps, steps=steps, samples=steps))
    made(folder, "north", 1, range(12), south=11)
    folder.event("lost", region="south", message="killed")
    assert counted(folder) == {"north": 12, "south": 13}
    folder.round_by_others(RoundMade("south", 1, 10, epoch=0, done=14, steps=4, samples=4))
    assert counted(folder) == {"north": 12, "south": 14}, "told later"


def test_who_was_lost_while_a_checkpoint_was_written_is_in_it(folder: RunFolder) -> None:
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
        made(folder, region, 1, range(20))
    folder.event("segment", round=20, hashes={"north": "a", "south": "a"}, held_of_absent={})
    folder.event("lost", region="south", message="killed", held_of_absent={"south": 17})
    assert counted(folder) == {"north": 20, "south": 17}
    folder.event("checkpoint", round=20)
    assert counted(folder) == {"north": 20, "south": 20}


def test_what_a_checkpoint_says_of_a_region_that_is_away_is_final(folder: RunFolder) -> None:
    """Its last merge was told in no round, or by one that was lost with it."""
    for region in ("north", "south"):
        seated(folder, region, 1, 0)
        made(folder, region, 1, range(20), **({"south": 17} if region == "north" else {}))
    folder.event("lost", region="south", message="killed")
    folder.event("segment", round=20, hashes={"north": "a"}, held_of_absent={"south": 18})
    assert counted(folder) == {"north": 20, "south": 18}
    seated(folder, "south", 2, 18)
    made(folder, "south", 2, range(20, 25))
    folder.event("lost", region="south", message="killed again")
    made(folder, "north", 1, range(20, 25), south=22)
    assert counted(folder) == {"north": 25, "south": 20}
