"""The roster: which regions are in, as they are lost, come back, join and leave; and the barrier at a segment's end.

Every change makes a new view, which all regions in it must hear of: those that train at once, those that wait at the barrier by
going into the segment again, the others with their next segment. Called from a thread per region.
"""

import threading
import time
from collections.abc import Callable, Sequence

from geotrain.errors import QuorumLost, Stopped
from geotrain.sync.messages import View

POLL_S = 0.2


class Roster:
    """Who is in. Every method may be called from any thread."""

    def __init__(self, run: str, view: View, quorum: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.view, self.quorum, self.clock = run, view, quorum, clock
        self._owners = view.owners
        """As planned; one that is lost is replaced until it is back."""
        self._ended: dict[str, tuple[int, int]] = {}
        """Region -> (ticket, epoch of the view) of the segment that it ended last."""
        self._over = 0
        """The ticket of the last segment that all ended."""
        self._below_since = 0.0
        self._changed = threading.Condition(threading.RLock())

    @property
    def enough(self) -> bool:
        return len(self.view.regions) >= self.quorum

    def lose(self, region: str) -> View:
        """It left, or cannot be reached: the view of the others."""
        return self._change([other for other in self.view.regions if other != region])

    def with_(self, region: str) -> View:
        """What `admit` would say now."""
        return self._view([*self.view.regions, region])

    def admit(self, region: str, ticket: int) -> View | None:
        """It is ready: the view with it; None when the segment is over, whose others would not hear of it."""
        with self._changed:
            return None if self.over(ticket) else self._change([*self.view.regions, region])

    def begin_again(self) -> View:
        """A view of the same regions: one of them has to be brought up to date by the others."""
        return self._change(self.view.regions)

    def _change(self, regions: Sequence[str]) -> View:
        with self._changed:
            enough, self.view = self.enough, self._view(regions)
            if enough and not self.enough:
                self._below_since = self.clock()
            self._changed.notify_all()
            return self.view

    def _view(self, regions: Sequence[str]) -> View:
        present = sorted(set(regions))
        owners = tuple(owner if owner in present else present[n % len(present)] for n, owner in enumerate(self._owners) if present)
        return View(self.view.epoch + 1, tuple(present), owners)

    def end(self, region: str, ticket: int, epoch: int, aborted: threading.Event) -> bool:
        """A region ended a segment in the view of this epoch. Waits until all have; False when the view changed meanwhile: all enter it
        again, since one that comes in needs the others. Raises Stopped.

        A segment can end below the quorum too: with a checkpoint, after which the run waits.
        """
        with self._changed:
            self._ended[region] = ticket, epoch
            if region in self.view.regions and all(self._ended.get(other) == (ticket, self.view.epoch) for other in self.view.regions):
                self._over = ticket
                self._changed.notify_all()
            while self._over < ticket and self.view.epoch == epoch:
                if aborted.is_set():
                    raise Stopped(self.run)
                self._changed.wait(POLL_S)
            return self._over >= ticket and region in self.view.regions

    def has_ended(self, region: str, ticket: int) -> bool:
        """Whether a region ended this segment, in whatever view."""
        return self._ended.get(region, (0, 0))[0] == ticket

    def over(self, ticket: int) -> bool:
        """Whether all that are in have ended this segment."""
        return self._over >= ticket

    def wait_for_quorum(self, ticket: int, check: Callable[[], None], give_up_after_s: float) -> None:
        """Until there is one, or the others have ended the segment without it. `check`: called meanwhile; raises when nobody is to wait any
        longer. Raises QuorumLost.
        """
        with self._changed:
            while not self.enough and not self.over(ticket):
                check()
                self.check_quorum(give_up_after_s)
                self._changed.wait(POLL_S)

    def check_quorum(self, give_up_after_s: float) -> None:
        """Raises QuorumLost when too few have been in for so long."""
        if not self.enough and self.clock() - self._below_since > give_up_after_s:
            raise QuorumLost(len(self.view.regions), self.quorum, give_up_after_s)
