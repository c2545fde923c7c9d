"""When links are looked at, and which region leaves when some are cut."""

from geotrain.members.cuts import Cuts, to_leave

ALL = ("east", "north", "west")


def both_ways(*pairs: tuple[str, str]) -> set[tuple[str, str]]:
    return {*pairs, *((b, a) for a, b in pairs)}


def test_a_silence_is_suspected_after_the_time_and_among_those_that_are_in() -> None:
    cuts = Cuts(60.0)
    cuts.heard("north", {"west": 59.0})
    assert not cuts.suspected(ALL)
    cuts.heard("north", {"west": 61.0})
    assert cuts.suspected(ALL)
    assert not cuts.suspected(("north", "east"))
    cuts.forget("west")
    assert not cuts.suspected(ALL)


def test_the_region_that_nobody_reaches_leaves() -> None:
    cut = both_ways(("west", "north"), ("west", "east"))
    assert to_leave(cut, ALL) == {"west": ["east", "north"]}
    assert to_leave(both_ways(("north", "west"), ("north", "east")), ALL) == {"north": ["east", "west"]}


def test_one_that_dials_the_others_but_cannot_be_dialled_leaves() -> None:
    assert to_leave({("north", "west"), ("east", "west")}, ALL) == {"west": ["east", "north"]}


def test_of_two_the_one_that_cannot_be_dialled_leaves_or_else_the_last() -> None:
    assert to_leave({("west", "north")}, ALL) == {"north": ["west"]}
    assert to_leave(both_ways(("west", "north")), ALL) == {"west": ["north"]}


def test_two_pairs_lose_two() -> None:
    assert sorted(to_leave(both_ways(("a", "b"), ("c", "d")), "abcd")) == ["b", "d"]


def test_what_is_out_counts_no_more() -> None:
    assert not to_leave(both_ways(("west", "north")), ("north", "east"))
