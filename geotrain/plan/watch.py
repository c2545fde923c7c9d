"""Whether links carry, and regions compute, what the plan believes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geotrain.job import JobSpec

CHANGED = 1.5
"""A link is another one when it carries so many times more, or less [ours]."""
IN_A_ROW = 2
"""Updates that must say so."""


class LinkWatch:
    """Compares what senders measure with what is believed; what has changed is believed from then on."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self._believed: dict[str, float] = {}
        """`tokyo>virginia` -> bytes per second, where that is no longer what the job says."""
        self._seen: dict[str, int] = {}
        self._off: dict[str, int] = {}

    def believed(self, source: str, target: str) -> float:
        """Bytes per second."""
        return self._believed.get(f"{source}>{target}", self.job.link(source, target).mbit_per_s * 1e6 / 8)

    def heard(self, source: str, links: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A sender's counters per target. Returns the changes: {to, mbit_per_s: [believed, measured]}."""
        changes = []
        for target, link in links.items():
            pair, rate = f"{source}>{target}", link["bytes_per_s"]
            if not rate or link["updates"] == self._seen.get(pair):
                continue
            self._seen[pair] = link["updates"]
            before = self.believed(source, target)
            self._off[pair] = 0 if 1 / CHANGED < rate / before < CHANGED else self._off.get(pair, 0) + 1
            if self._off[pair] >= IN_A_ROW:
                self._off[pair], self._believed[pair] = 0, rate
                changes.append({"to": target, "mbit_per_s": [round(before * 8e-6, 1), round(rate * 8e-6, 1)]})
        return changes

    def measured(self) -> dict[str, tuple[float, float]]:
        """`tokyo>virginia` -> (Mbit/s, round trip in ms) of the links that changed; the round trip is the job's."""
        links = {}
        for pair, rate in self._believed.items():
            source, _, target = pair.partition(">")
            links[pair] = (rate * 8e-6, self.job.link(source, target).rtt_ms)
        return links


LEAST_ROUNDS = 3


@dataclass(slots=True)
class _Off:
    """Rounds in a row that were all faster, or all slower, than believed."""

    faster: bool
    rounds: int = 0
    samples: int = 0
    seconds: float = 0.0


class SpeedWatch:
    """Compares how fast regions make inner steps with what is believed; what a round waits for the WAN does not count."""

    def __init__(self, margin: float, for_s: float) -> None:
        """A region is another one when it is `margin` times faster, or slower, in every round of `for_s` seconds of inner steps [ours]."""
        self.margin, self.for_s = margin, for_s
        self._off: dict[str, _Off] = {}

    def heard(self, region: str, believed: float, rounds: Sequence[Mapping[str, Any]]) -> float | None:
        """Round records of a region that should make `believed` samples per second. Returns the speed that it has, once that is sure."""
        for record in rounds:
            if not record["samples"] or not record["compute_s"]:
                continue
            ratio = record["samples"] / record["compute_s"] / believed
            if 1 / self.margin < ratio < self.margin:
                self._off.pop(region, None)
                continue
            if region not in self._off or self._off[region].faster != (ratio > 1):
                self._off[region] = _Off(ratio > 1)
            off = self._off[region]
            off.rounds, off.samples, off.seconds = off.rounds + 1, off.samples + record["samples"], off.seconds + record["compute_s"]
            if off.rounds >= LEAST_ROUNDS and off.seconds >= self.for_s:
                del self._off[region]
                return off.samples / off.seconds
        return None
