"""Which region leaves when links are cut."""

from geotrain.members.cuts import Cuts

ALL = ("east", "north", "west")


def told(**silent: dict[str, float]) -> Cuts:
    cuts = Cuts(60.0)
    for region, of in silent.items():
        cuts.heard(region, of)
    return cuts


def test_nobody_leaves_before_the_time() -> None:
    assert not told(north={"west": 59.0}, west={"north": 59.0}).to_leave(ALL)


def test_the_region_that_nobody_reaches_leaves_and_not_who_told_of_it() -> None:
    assert told(west={"north": 61.0, "east": 40.0}, north={"west": 40.0}, east={"west": 35.0}).to_leave(ALL) == {"west": ["east", "north"]}
    assert told(east={"north": 61.0}, west={"north": 40.0}).to_leave(ALL) == {"north": ["east", "west"]}


def test_of_two_the_one_that_does_not_answer_leaves_or_else_the_last() -> None:
    assert told(west={"north": 61.0}).to_leave(ALL) == {"north": ["west"]}
    assert told(west={"north": 61.0}, north={"west": 61.0}).to_leave(ALL) == {"west": ["north"]}


def test_a_short_silence_elsewhere_is_no_cut() -> None:
    assert told(north={"west": 61.0, "east": 5.0}, east={"west": 61.0}).to_leave(ALL) == {"west": ["east", "north"]}


def test_two_pairs_lose_two() -> None:
    cuts = told(a={"b": 61.0}, b={"a": 61.0}, c={"d": 61.0}, d={"c": 61.0})
    assert sorted(cuts.to_leave("abcd")) == ["b", "d"]


def test_what_is_out_or_came_back_counts_no_more() -> None:
    cuts = told(west={"north": 61.0}, north={"west": 61.0})
    assert not cuts.to_leave(("north", "east"))
    cuts.forget("west")
    assert not cuts.to_leave(ALL)
