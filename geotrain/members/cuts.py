"""Cuts: regions that cannot reach each other over the WAN, and which of them the others go on without. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping

Pair = tuple[str, str]
"""(from, to)"""


class Cuts:
    """What leaders tell of silent peers. A silence is a reason to look, no more: who waits for whom depends on the topology."""

    def __init__(self, after_s: float) -> None:
        """`after_s`: how long a peer may answer nothing of what is sent to it."""
        self.after_s = after_s
        self._silent: dict[str, Mapping[str, float]] = {}

    def heard(self, region: str, silent: Mapping[str, float]) -> None:
        """A leader told for how many seconds its peers have been silent."""
        self._silent[region] = silent

    def forget(self, region: str) -> None:
        """It is in, or out, anew."""
        self._silent.pop(region, None)
        self._silent = {name: {to: s for to, s in silent.items() if to != region} for name, silent in list(self._silent.items())}

    def suspected(self, present: Collection[str]) -> bool:
        """Whether a peer has been silent for the whole time."""
        pairs = ((a, b, s) for a, of in list(self._silent.items()) for b, s in of.items())
        return any(s > self.after_s and a in present and b in present for a, b, s in pairs)


def to_leave(cut: Collection[Pair], present: Collection[str]) -> dict[str, list[str]]:
    """Region -> the regions it is cut off from: as few as have to go until the others reach each other.

    The one with the most cut links goes first; among equals the one that others cannot dial, then the last by name.
    """
    links, gone = {link for link in cut if set(link) <= set(present)}, dict[str, list[str]]()
    while links:
        ends, named = Counter(name for link in links for name in link), Counter(to for _, to in links)
        worst = max(ends, key=lambda name: (ends[name], named[name], name))
        gone[worst] = sorted({name for link in links if worst in link for name in link} - {worst})
        links = {link for link in links if worst not in link}
    return gone
