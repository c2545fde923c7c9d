"""RoundMachine: when to exchange and what to accept. Events in, instructions out; it never sees a number of the model.

Two patterns cover the strategies. In a *push* (`pushing.py`) a region sends after its last inner step of a round and goes on,
applying what comes when it comes. In a *merge* (`merging.py`) every region contributes to a round, the owners merge, and all take
the same outer step.

What both guarantee, given a transport that loses nothing between two changes of view: an update is applied at most once; it is
applied or discarded with a reason; a segment ends with the same round everywhere; after it no update is under way.
"""

from typing import assert_never

from geotrain.sync.agree import FullMerge
from geotrain.sync.merging import MergeMachine
from geotrain.sync.messages import View
from geotrain.sync.progress import Progress
from geotrain.sync.pushing import PushMachine
from geotrain.sync.strategy import Merging, Pushing, Strategy

RoundMachine = MergeMachine | PushMachine

NEWCOMER = -1
"""The lineage of a region that joins without any state."""


def outside(region: str) -> View:
    """The view of a region that has not been taken in yet: older than any."""
    return View(-1, (region,), (region,))


def round_machine(strategy: Strategy, at: Progress, *, joins: bool = False) -> RoundMachine:
    """The machine of one partition.

    `joins`: without any state; the ViewChanged that takes it in brings it up to date. Its view until then is `outside`.
    """
    at.fresh = joins
    match strategy:
        case Merging():
            waiting_for: dict[str, tuple[int, int] | None] = {at.region: None} if joins else {}
            return MergeMachine(at, strategy, lineage=NEWCOMER if joins else at.view.epoch, waiting_for=waiting_for)
        case Pushing():
            return PushMachine(at, strategy, full=FullMerge(at) if joins else None)
        case _:
            assert_never(strategy)
