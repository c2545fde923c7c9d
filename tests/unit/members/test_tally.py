"""How far every region has come, and where one goes on that lost its state, or whose run goes back."""

from pathlib import Path
from typing import Any

from geotrain.members.tally import Tally
from geotrain.partition.orders import Place
from geotrain.report.folder import RunFolder
from tests.making import points_job

AT_0, AT_129 = {"epoch": 0}, {"epoch": 12}


def rounds(life: int, first: int, end: int) -> list[dict[str, Any]]:
    """Ten rounds an epoch, of two steps and 20 rows."""
    return [
        {"region": "south", "life": life, "round": r, "epoch": r // 10, "done": 2 * (r % 10) + 2, "samples": 20} for r in range(first, end)
    ]


def test_a_region_goes_on_with_the_first_round_that_nobody_holds() -> None:
    tally = Tally()
    assert tally.place("south") is None
    tally.seated("south", 1, AT_0, 0)
    assert tally.place("south") == Place(AT_0, 0)
    tally.heard("south", rounds(1, 0, 131), {"south": 131})
    assert tally.place("south") == Place(AT_0, 0), "its own word does not count"
    tally.heard("north", [], {"south": 129})
    assert tally.place("south") == Place(AT_0, 129, (12, 18))
    assert tally.samples_held("south", 100) == 29 * 20
    assert tally.newest() == 131


def test_after_going_back_a_region_that_took_a_seat_since_begins_where_the_others_do() -> None:
    tally = Tally()
    tally.seated("south", 1, AT_0, 0)
    tally.heard("south", rounds(1, 0, 131), {})
    tally.heard("north", [], {"south": 129})
    tally.seated("south", 2, AT_129, 129)
    assert tally.place("south") == Place(AT_129, 129)
    tally.back_to(100)
    assert tally.place("south") == Place(AT_0, 100, (9, 20))
    tally.heard("south", rounds(2, 129, 140), {})
    assert tally.newest() == 100, "what a seat says that is void is of no account"


def test_however_long_a_segment_is_it_is_known_where_it_began() -> None:
    tally = Tally()
    tally.seated("south", 1, AT_0, 0)
    tally.heard("south", rounds(1, 0, 5000), {})
    tally.heard("north", [], {"south": 5000})
    tally.checkpointed(5000)
    tally.heard("south", rounds(1, 5000, 9900), {})
    tally.heard("north", [], {"south": 9900})
    tally.back_to(5000)
    assert tally.place("south") == Place(AT_0, 5000, (499, 20))


def test_what_the_run_does_not_go_back_to_is_forgotten() -> None:
    tally = Tally()
    tally.seated("south", 1, AT_0, 0)
    tally.heard("south", rounds(1, 0, 300), {})
    tally.heard("north", [], {"south": 150})
    tally.seated("south", 2, AT_129, 150)
    tally.checkpointed(200)
    assert [(seat.life, min(seat.closed, default=None)) for seat in tally._seats["south"]] == [(2, None)]
    tally.heard("south", rounds(2, 150, 300), {})
    tally.heard("north", [], {"south": 300})
    tally.checkpointed(300)
    assert [(seat.life, sorted(seat.closed)) for seat in tally._seats["south"]] == [(2, [299])]


def test_a_resume_takes_the_seat_of_the_checkpoint_and_not_a_later_one(tmp_path: Path) -> None:
    folder = RunFolder.create(points_job(tmp_path), "points-1")
    folder.event("seated", region="south", round=0, life=1, cursor=AT_0)
    folder.event("seated", region="south", round=129, life=2, cursor=AT_129)
    for record in [*rounds(1, 0, 131), *rounds(2, 129, 140)]:
        folder.round(record)
    for r in (99, 140):
        folder.round({"region": "north", "life": 3, "round": r, "epoch": 0, "done": 2, "samples": 20, "settled": {"south": r + 1}})
    folder.flush()
    assert Tally.of(folder, 100).place("south") == Place(AT_0, 100, (9, 20))
    assert Tally.of(folder, 141).place("south") == Place(AT_129, 140, (13, 20))
