"""How far every region has come, and where one goes on that lost its state, or whose run goes back."""

from dataclasses import asdict
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
        {"region": "south", "life": life, "round": r, "epoch": r // 10, "done": 2 * (r % 10) + 2, "steps": 2, "samples": 20}
        for r in range(first, end)
    ]


def values(told: list[dict[str, Any]]) -> list[list[Any]]:
    return [list(one.values()) for one in told]


def a_run() -> Tally:
    """North trains, and what it holds of south is told; south has its first seat."""
    tally = Tally()
    tally.seated("north", 9, AT_0, 0)
    tally.seated("south", 1, AT_0, 0)
    return tally


def test_a_region_goes_on_with_the_first_round_that_nobody_holds() -> None:
    tally = Tally()
    assert tally.place("south") is None
    tally = a_run()
    assert tally.place("south") == Place(AT_0, 0)
    tally.heard("south", 1, rounds(1, 0, 131), {"south": 131})
    assert tally.place("south") == Place(AT_0, 0), "its own word does not count"
    tally.heard("north", 9, [], {"south": 129})
    assert tally.place("south") == Place(AT_0, 129, (12, 18))
    assert tally.newest() == 131


def test_rows_of_a_lost_seat_count_as_far_as_others_hold_them_and_once() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 131), {})
    tally.heard("north", 9, [], {"south": 129})
    assert not any(tally.rows_made_up().values())
    tally.lost("south", epoch=1, since=100)
    assert tally.rows_made_up() == {"south": 29 * 20}
    tally.lost("south", epoch=1, since=100)
    tally.seated("south", 2, AT_129, 120)
    assert tally.rows_made_up()["south"] == 20 * 20, "the next seat takes the others again"
    assert not any(tally.rows_made_up().values())


def test_rounds_that_a_leader_had_not_told_of_are_known_from_those_who_hold_them() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 127), {})
    tally.heard("north", 9, [], {"south": 129}, values(rounds(1, 125, 129)))
    assert tally.told_by_others() == [], "it may still tell"
    tally.heard("south", 1, rounds(1, 127, 128), {})
    tally.lost("south", epoch=1, since=100)
    assert [asdict(made) for made in tally.told_by_others()] == rounds(1, 128, 129), "of the others it told itself"
    assert tally.told_by_others() == []
    assert tally.place("south") == Place(AT_0, 129, (12, 18)), "none of its rows is trained on again"
    assert tally.rows_made_up()["south"] == 29 * 20
    tally.heard("north", 9, [], {"south": 130}, values(rounds(1, 129, 130)))
    assert [made.round for made in tally.told_by_others()] == [129], "heard late"
    assert tally.held_of_absent() == {"south": 130}


def test_a_region_goes_on_in_the_round_of_which_the_others_hold_a_part() -> None:
    """It was lost after a merge of all that had its round under way in part; it had made all of it, and told so."""
    tally, (told,) = a_run(), rounds(1, 5, 6)
    tally.heard("south", 1, rounds(1, 0, 6), {})
    tally.heard("north", 9, [], {"south": 6}, values([{**told, "done": 11, "steps": 1, "samples": 10}]))
    tally.lost("south", epoch=1, since=0)
    assert tally.place("south") == Place(AT_0, 6, (0, 11))
    assert [(made.round, made.steps) for made in tally.told_by_others()] == [(5, 1)]
    assert tally.rows_made_up()["south"] == 5 * 20 + 10
    tally.heard("north", 9, [], {"south": 6}, values([told]))
    assert tally.place("south") == Place(AT_0, 6, (0, 12)), "the rest had come too"
    tally.seated("west", 5, AT_0, 0)
    tally.heard("west", 5, [], {"south": 6}, values([{**told, "done": 11, "steps": 1, "samples": 10}]))
    assert tally.place("south") == Place(AT_0, 6, (0, 12)), "heard late"
    tally.told_by_others()
    tally.lost("north", epoch=2, since=0)
    assert tally.place("south") == Place(AT_0, 6, (0, 11)), "who had the rest is lost too"
    assert [(made.round, made.steps) for made in tally.told_by_others()] == [(5, 1)]


def test_it_is_settled_what_others_hold_once_they_told_something_in_a_view_without_the_region() -> None:
    tally = a_run()
    tally.told("north", 4)
    assert tally.is_settled("south", ["north"]), "it never was lost"
    tally.lost("south", epoch=5, since=0)
    assert not tally.is_settled("south", ["north"])
    tally.told("north", 5)
    assert tally.is_settled("south", ["north"])
    tally.lost("north", epoch=6, since=0)
    tally.seated("north", 10, AT_0, 0)
    assert not tally.is_settled("south", ["north"]), "another process, which may have been given what the first held"
    tally.told("north", float("inf"))
    assert tally.is_settled("south", ["north"]), "its segment is over"


def test_what_a_region_holds_goes_with_it_unless_it_is_in_the_checkpoint_or_was_given_on() -> None:
    tally = a_run()
    tally.seated("west", 5, AT_0, 0)
    tally.heard("south", 1, rounds(1, 0, 131), {})
    tally.heard("north", 9, [], {"south": 100})
    tally.checkpoints(100, ["north", "west", "south"])
    tally.checkpointed(100)
    tally.heard("north", 9, [], {"south": 129})
    tally.lost("west", epoch=1, since=0)
    tally.seated("west", 6, AT_0, 100)
    tally.healed("west", "north", 120)
    tally.lost("north", epoch=1, since=0)
    assert tally.place("south") == Place(AT_0, 120, (11, 20)), "west was given it"
    tally.heard("north", 9, [], {"south": 129})
    assert tally.place("south") == Place(AT_0, 120, (11, 20)), "who is lost holds nothing, whatever it still says"
    tally.lost("west", epoch=1, since=0)
    assert tally.place("south") == Place(AT_0, 100, (9, 20)), "the checkpoint has it"
    assert tally.place("north") == Place(AT_0, 0), "it told of no round"


def test_who_comes_in_by_a_merge_of_all_holds_what_the_others_do() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 131), {})
    tally.heard("north", 9, [], {"south": 129})
    tally.seated("west", 5, AT_0, 0)
    tally.heard("west", 5, [], {})
    tally.came_in("west")
    tally.lost("north", epoch=1, since=0)
    assert tally.place("south") == Place(AT_0, 129, (12, 18))


def test_a_checkpoint_holds_what_was_held_when_it_was_begun(tmp_path: Path) -> None:
    """It is committed once all that told of it are lost."""
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 60), {})
    tally.heard("north", 9, [], {"south": 50})
    tally.lost("south", epoch=1, since=0)
    assert tally.checkpoints(100, ["north"]) == {"south": 50}
    tally.lost("north", epoch=1, since=0)
    tally.checkpointed(100)
    tally.back_to(100)
    assert tally.place("south") == Place(AT_0, 50, (4, 20))


def test_after_going_back_a_region_that_took_a_seat_since_begins_where_the_others_do() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 100), {})
    tally.heard("north", 9, [], {"south": 100})
    tally.checkpoints(100, ["north", "south"])
    tally.checkpointed(100)
    tally.heard("south", 1, rounds(1, 100, 131), {})
    tally.heard("north", 9, [], {"south": 129})
    tally.seated("south", 2, AT_129, 129)
    assert tally.place("south") == Place(AT_129, 129)
    for region in ("north", "south"):
        tally.lost(region, epoch=1, since=100)
    tally.back_to(100)
    assert tally.place("south") == Place(AT_0, 100, (9, 20))
    tally.heard("south", 2, rounds(2, 129, 140), {})
    assert tally.newest() == 100, "what a seat says that is void is of no account"


def test_however_long_a_segment_is_it_is_known_where_it_began() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 5000), {})
    tally.checkpoints(5000, ["north", "south"])
    tally.checkpointed(5000)
    tally.heard("south", 1, rounds(1, 5000, 9900), {})
    tally.heard("north", 9, [], {"south": 9900})
    tally.back_to(5000)
    assert tally.place("south") == Place(AT_0, 5000, (499, 20))


def test_what_the_run_does_not_go_back_to_is_forgotten() -> None:
    tally = a_run()
    tally.heard("south", 1, rounds(1, 0, 300), {})
    tally.heard("north", 9, [], {"south": 150})
    tally.seated("south", 2, AT_129, 150)
    assert tally.checkpoints(200, ["north"]) == {"south": 150}
    tally.checkpointed(200)
    assert [(seat.life, min(seat.closed, default=None)) for seat in tally._seats["south"]] == [(2, None)]
    tally.heard("south", 2, rounds(2, 150, 300), {})
    assert tally.checkpoints(300, ["north", "south"]) == {}
    tally.checkpointed(300)
    assert [(seat.life, sorted(seat.closed)) for seat in tally._seats["south"]] == [(2, [299])]


def folder_of(root: Path, *seats: tuple[str, int, int]) -> RunFolder:
    folder = RunFolder.create(points_job(root), "points-1")
    for region, life, round in seats:
        folder.event("seated", region=region, round=round, life=life, cursor=AT_0 if round == 0 else AT_129)
    return folder


def says(folder: RunFolder, life: int, *held: int) -> None:
    """North, of what it holds of south."""
    for first in held:
        record = {"life": life, "round": first - 1, "epoch": 0, "done": 2, "steps": 2, "samples": 20, "settled": {"south": first}}
        folder.round({"region": "north", **record})


def test_a_resume_takes_the_seat_of_the_checkpoint_and_not_a_later_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ("north", 9, 0), ("south", 1, 0), ("south", 2, 129))
    for record in [*rounds(1, 0, 131), *rounds(2, 129, 140)]:
        folder.round(record)
    says(folder, 9, 100, 141)
    folder.flush()
    assert Tally.of(folder, 100).place("south") == Place(AT_0, 100, (9, 20))
    assert Tally.of(folder, 141).place("south") == Place(AT_129, 140, (13, 20))


def test_a_resume_knows_what_was_void_already(tmp_path: Path) -> None:
    """All went back to 100; south, which had come back at 129, did not again, and north made a checkpoint at 150 alone."""
    folder = folder_of(tmp_path, ("north", 8, 0), ("south", 1, 0), ("south", 2, 129))
    folder.event("segment", round=100, hashes={"north": "", "south": ""})
    folder.event("rolled_back", round=100)
    folder.event("seated", region="north", round=100, life=9, cursor=AT_129)
    folder.event("segment", round=150, hashes={"north": ""})
    for record in rounds(1, 0, 140):
        folder.round(record)
    says(folder, 8, 140)
    folder.flush()
    assert Tally.of(folder, 150).place("south") == Place(AT_0, 100, (9, 20))
