"""With `codec: auto`: a leader chooses its bits again when its links are other than planned. Every payload says how it is coded."""

from collections.abc import Mapping, Sequence

from geotrain.job import JobSpec, LinkSpec
from geotrain.plan.bits import Bits, exchange_budget_s, region_bits
from geotrain.sync.codec import BITS
from geotrain.sync.messages import View
from geotrain.sync.strategy import Merging, Strategy
from geotrain.sync.topology import targets
from geotrain.wan.transport import LinkTraffic

IN_A_ROW = 2
"""Rounds that must call for the same other choice."""


class BitsAdapter:
    """One region's choice, round after round."""

    def __init__(
        self, job: JobSpec, region: str, strategy: Strategy, view: View, shares: Sequence[float], bits: Bits | None, parameters: int
    ) -> None:
        self.job, self.region, self.strategy, self.bits = job, region, strategy, bits
        self.shares = dict(zip(view.owners, shares, strict=False)) if isinstance(strategy, Merging) else {}
        self.others = targets(strategy.topology, view, region) if not isinstance(strategy, Merging) else view.others(region)
        self.elements = parameters / (strategy.turns if isinstance(strategy, Merging) else 1)
        self.why = ""
        self._wanted: Bits | None = None
        self._times = 0
        self._traffic: Mapping[str, LinkTraffic] = {}

    def _link(self, source: str, target: str) -> LinkSpec:
        """As measured, where it was."""
        believed, link = self.job.link(source, target), self._traffic.get(target)
        if source != self.region or link is None or not link.bytes_per_s:
            return believed
        return LinkSpec(mbit_per_s=link.bytes_per_s * 8e-6, rtt_ms=1000 * link.rtt_s or believed.rtt_ms)

    def after_round(self, traffic: Mapping[str, LinkTraffic], compute_s: float) -> Bits | None:
        """The new choice, when the links have called for it twice in a row."""
        if self.bits is None:
            return None
        self._traffic = traffic
        budget_s = exchange_budget_s(compute_s, hides=not isinstance(self.strategy, Merging) or self.strategy.tau != 0)
        wanted = region_bits(self.region, self.others, self.shares, self.elements, budget_s, self._link)
        self._times = self._times + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if wanted == self.bits or self._times < IN_A_ROW:
            return None
        rates = ", ".join(f"{other} {self._link(self.region, other).mbit_per_s:.0f} Mbit/s" for other in self.others)
        self.why = f"{rates}; {1000 * budget_s:.0f} ms for one way of an exchange"
        self.bits = wanted
        return wanted

    def names(self, choices: Sequence[int]) -> str:
        return "/".join(BITS[choice] for choice in choices)
