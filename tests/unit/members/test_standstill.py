"""When all are taken to wait for each other."""

from geotrain.members.standstill import Standstill
from tests.making import Clock

ALL = ("north", "south")


def test_all_that_wait_for_too_long_are_told_of_once() -> None:
    clock = Clock()
    standstill = Standstill(10.0, clock)
    assert standstill.heard("north", "a merge", ALL) is None
    clock.now = 1020.0
    assert standstill.heard("south", "a hello", ALL) is None, "it only began to wait"
    clock.now = 1029.0
    assert standstill.heard("north", "a merge", ALL) is None
    clock.now = 1030.0
    assert standstill.heard("north", "a merge", ALL) == {"north": "a merge", "south": "a hello"}
    assert standstill.heard("south", "a hello", ALL) is None


def test_one_that_goes_on_is_what_the_others_wait_for() -> None:
    clock = Clock()
    standstill = Standstill(10.0, clock)
    for region in ALL:
        standstill.heard(region, "a merge", ALL)
    clock.now = 1009.0
    standstill.heard("south", None, ALL)
    clock.now = 1012.0
    assert standstill.heard("south", "a merge", ALL) is None
    clock.now = 1021.9
    assert standstill.heard("north", "a merge", ALL) is None
    clock.now = 1022.0
    assert standstill.heard("north", "a merge", ALL) is not None


def test_a_change_of_who_is_in_begins_anew() -> None:
    clock = Clock()
    standstill = Standstill(10.0, clock)
    for region in ALL:
        standstill.heard(region, "a merge", ALL)
    clock.now = 1011.0
    standstill.changed()
    assert standstill.heard("north", "a hello", ALL) is None
    assert standstill.heard("north", "a hello", ("north",)) is None
    clock.now = 1021.0
    assert standstill.heard("north", "a hello", ("north",)) == {"north": "a hello"}
