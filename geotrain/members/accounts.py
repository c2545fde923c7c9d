"""What a run has done and sent so far, region by region."""

import threading
from collections.abc import Mapping
from typing import Any

from geotrain.job import JobSpec
from geotrain.partition.orders import SegmentDone

PAID = ("wire_bytes", "egress_usd")
"""What is gone even when it came to nothing."""


class Accounts:
    """Thread-safe."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.totals: dict[str, dict[str, float]] = {}
        """Region -> samples, seconds, held_s, stall_s, wire_bytes, egress_usd."""
        self.traffic: dict[str, dict[str, dict[str, Any]]] = {}
        """Region -> other region -> the counters of the link, as they were told last."""
        self._counted: dict[str, dict[str, dict[str, Any]]] = {}
        """The same, of the seats that there are now."""
        self._lives: dict[str, int] = {}
        """Of the seats whose traffic is counted."""
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Trained on so far, all regions."""
        return int(sum(total["samples"] for total in self.totals.values()))

    def segment(self, done: SegmentDone) -> None:
        """What a region did in a segment."""
        if self._lives.get(done.region) != done.life:
            self._counted.pop(done.region, None)
            self._lives[done.region] = done.life
        self.add(done.region, done.traffic, samples=done.samples, seconds=done.seconds, held_s=done.held_s, stall_s=done.stall_s)

    def seats_anew(self) -> None:
        """Their counters begin at nothing."""
        self._counted.clear()

    def rows(self, region: str, samples: int) -> None:
        """Rows of a seat that was lost, in rounds that others hold."""
        self.add(region, self._counted.get(region, {}), samples=samples, seconds=0.0, held_s=0.0, stall_s=0.0)

    def add(self, region: str, traffic: dict[str, dict[str, Any]], **more: float) -> None:
        """Add to a region's totals: what it did, and what it sent since the last time."""
        with self._lock:
            earlier = self._counted.get(region, {})
            sent = {to: link["wire_bytes"] - earlier.get(to, {}).get("wire_bytes", 0) for to, link in traffic.items()}
            if traffic:
                self.traffic[region] = self._counted[region] = traffic
            more["wire_bytes"] = sum(sent.values())
            more["egress_usd"] = sum(size / 1e9 * self.job.link(region, to).usd_per_gb for to, size in sent.items())
            before = self.totals.get(region, {})
            self.totals[region] = {**before, **{key: before.get(key, 0) + value for key, value in more.items()}}

    def back_to(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """The run goes on from a checkpoint: what came later was done for nothing, but it is paid for."""
        with self._lock:
            paid = {region: {name: now.get(name, 0.0) for name in PAID} for region, now in self.totals.items()}
            self.totals = {
                region: {"samples": 0, "seconds": 0.0, "held_s": 0.0, "stall_s": 0.0, **totals.get(region, {}), **paid.get(region, {})}
                for region in {*totals, *paid}
            }
