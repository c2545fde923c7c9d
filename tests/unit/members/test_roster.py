"""The barrier at a segment's end, for those that are not in any more."""

import threading

from geotrain.members.roster import Roster
from geotrain.sync.messages import View


def test_a_segment_of_nobody_does_not_end() -> None:
    roster = Roster("run", View(0, ("north",), ("north",)), 1)
    roster.lose("north")
    assert not roster.end("north", 1, 0, threading.Event())
    assert not roster.over(1)


def test_who_was_lost_on_the_way_to_the_barrier_has_not_ended_what_the_others_end() -> None:
    roster = Roster("run", View(0, ("north", "south"), ("north",)), 1)
    view = roster.lose("south")
    assert roster.end("north", 1, view.epoch, threading.Event())
    assert not roster.end("south", 1, 0, threading.Event())
    assert roster.over(1)
