"""Links between the regions of a run: where their endpoints are, which way each takes, and whom the others cannot reach at the moment."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from geotrain.errors import ClusterUnreachable, PeerUnreachable
from geotrain.job import JobSpec
from geotrain.members.cuts import Cuts, Pair, to_leave
from geotrain.partition.orders import Directory, SeatTaken
from geotrain.partition.partition import Partition
from geotrain.partition.ways import directory_of, others_with_a_choice
from geotrain.report.folder import RunFolder
from geotrain.sync.messages import View

LOOK_AGAIN_S = 5.0
"""Between two looks at who reaches whom, while somebody is silent."""


class Links:
    """Changed by who holds the membership's lock; looks at the links in a thread of its own."""

    def __init__(
        self, job: JobSpec, partitions: Mapping[str, Partition], folder: RunFolder, view: Callable[[], View], silent_s: float
    ) -> None:
        """`view`: who is in now. `silent_s`: how long a peer may answer nothing of what is sent to it."""
        self.job, self.partitions, self.folder, self.view = job, partitions, folder, view
        self.directory = Directory({}, {})
        self.cut_off: dict[str, list[str]] = {}
        """Region -> those that cannot reach it."""
        self._addresses: dict[str, dict[str, str]] = {}
        self._tried: dict[str, Mapping[str, str | None]] = {}
        self._left_at: dict[str, tuple[str, set[Pair]]] = {}
        """Region -> where its last endpoint was, and the links from and to it that were dialled then."""
        self._cuts = Cuts(silent_s)
        self._looking: threading.Thread | None = None
        self._looked_at = -LOOK_AGAIN_S
        self._closed = False

    # Where they are.

    def introduce(self, seats: Sequence[SeatTaken], in_every_region: Callable[..., list[Any]]) -> None:
        """All begin: it is settled how each leader reaches the others."""
        self._addresses = {seat.region: seat.wan for seat in seats}
        names = [seat.region for seat in seats]
        self._tried = dict(zip(names, in_every_region(self._try, regions=names) if names else [], strict=True))
        self.settle(self.view())
        for region, dialled in self._tried.items():
            for to, why in dialled.items():
                way = self.directory.ways[f"{region}>{to}"]
                self.folder.event("link", region=region, to=to, transport=way, why=why or "the leader can dial it")

    def _try(self, region: str) -> dict[str, str | None]:
        """Other region -> why the leader cannot dial it, None where it can; of the links that have a choice."""
        there = {other: address for other in others_with_a_choice(self.job, region) if (address := self._flight_address(other))}
        try:
            return self.partitions[region].reach(there) if there else {}
        except ClusterUnreachable:  # it is lost by now, and that is noticed when it is to train
            return dict.fromkeys(there, "its leader cannot be asked")

    def settle(self, view: View) -> None:
        """The directory of those that are in."""
        there = {region: self._addresses[region] for region in view.regions if region in self._addresses}
        self.directory = directory_of(self.job, there, self._tried)

    def came(self, region: str, wan: dict[str, str]) -> None:
        """It has a new seat, with an endpoint there."""
        self._addresses[region] = wan

    def left(self, region: str, before: Sequence[str], *, cut_off: bool) -> None:
        """It is out. `before`: those that were in; `cut_off`: since it cannot be reached."""
        if not cut_off:
            self.cut_off.pop(region, None)
        self._cuts.forget(region)
        self._left_at[region] = self._flight_address(region), {pair for pair in self._dialled(before) if region in pair}
        self.forget(region)

    def forget(self, region: str) -> None:
        """Nobody will find it where it was."""
        self._addresses.pop(region, None)

    def _flight_address(self, region: str) -> str:
        """Empty where it has none."""
        return self._addresses.get(region, {}).get("flight", "")

    def _dialled(self, regions: Sequence[str]) -> set[Pair]:
        """The links between these that are dialled."""
        return {(a, b) for a in regions for b in regions if self.directory.ways.get(f"{a}>{b}") == "flight"}

    # Who is cut off.

    def heard(self, region: str, silent: Mapping[str, float]) -> None:
        """A leader told for how many seconds its peers have been silent; who is for too long is looked for."""
        self._cuts.heard(region, silent)
        view, looking = self.view(), self._looking is not None and self._looking.is_alive()
        if self._cuts.suspected(view.regions) and not looking and time.monotonic() - self._looked_at > LOOK_AGAIN_S:
            self._looked_at = time.monotonic()
            self._looking = threading.Thread(target=self._look, args=(view,), name="geotrain-links", daemon=True)
            self._looking.start()

    def _look(self, view: View) -> None:
        """Which leaders can dial each other now; who cannot be reached by the others is told to end."""
        dialled, addresses = self._dialled(view.regions), dict(self._addresses)

        def cut_from(region: str) -> set[Pair]:
            there = {b: addresses[b]["flight"] for a, b in dialled if a == region and b in addresses}
            try:
                return {(region, b) for b, why in self.partitions[region].reach(there).items() if why}
            except ClusterUnreachable:
                return set()  # it is being lost otherwise

        with ThreadPoolExecutor(max_workers=len(view.regions)) as threads:
            cut = set().union(*threads.map(cut_from, view.regions))
        if self._closed or self.view().epoch != view.epoch:
            return
        for gone, others in to_leave(cut, view.regions).items():
            self.cut_off[gone] = others
            self.partitions[gone].tell_abort()

    def why_cut_off(self, region: str) -> PeerUnreachable | None:
        """Why a region's leader was told to end, if it cannot be reached by others."""
        if (others := self.cut_off.get(region)) is None:
            return None
        return PeerUnreachable(", ".join(others), region, self._flight_address(region) or "its address", "silence")

    def heal(self, region: str) -> bool:
        """Whether a region that was cut off and those that are in can dial each other again, where they could before."""
        address, before = self._left_at[region]
        to = {b: there for a, b in before if a == region and (there := self._flight_address(b))}
        back = [a for a, b in before if b == region and a in self.view().regions]
        try:
            if any(self.partitions[region].reach(to).values()):
                return False
            return not any(self.partitions[other].reach({region: address})[region] for other in back)
        except ClusterUnreachable:
            return True  # its process, or another, is gone: the way back is that of any other loss

    def close(self) -> None:
        """Nobody is told to end any more."""
        self._closed = True

    def join(self) -> None:
        """Once the clusters are closed, which ends what waits for them."""
        if self._looking is not None:
            self._looking.join()
