"""Cuts: regions that cannot reach each other over the WAN, as their leaders tell; and which of them the others go on without. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping

ALREADY = 0.5
"""A link that was silent for this share of the time counts as cut once another was for all of it: one cause, seen at two moments."""


class Cuts:
    """Each region is told of by one thread."""

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
        self._silent = {name: {to: s for to, s in silent.items() if to != region} for name, silent in self._silent.items()}

    def between(self, present: Collection[str]) -> set[tuple[str, str]]:
        """(from, to) of the links that are cut; none unless one of them has been silent for the whole time."""
        silent = {(a, b): s for a, of in self._silent.items() for b, s in of.items() if a in present and b in present}
        if not any(seconds > self.after_s for seconds in silent.values()):
            return set()
        return {link for link, seconds in silent.items() if seconds > ALREADY * self.after_s}

    def to_leave(self, present: Collection[str]) -> dict[str, list[str]]:
        """Region -> the regions it is cut off from: as few as have to go until the others reach each other.

        The one with the most cut links goes first; among equals the one that answers nobody, then the last by name.
        """
        links, gone = self.between(present), dict[str, list[str]]()
        while links:
            ends, named = Counter(name for link in links for name in set(link)), Counter(to for _, to in links)
            worst = max(ends, key=lambda name: (ends[name], named[name], name))
            gone[worst] = sorted({name for link in links if worst in link for name in link} - {worst})
            links = {link for link in links if worst not in link}
        return gone
