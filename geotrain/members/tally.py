"""The tally: how far every region has come in its rows, and what of that is in what the regions hold. So a region that lost its state
goes on with the first row that nobody has learned from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geotrain.partition.orders import Place
from geotrain.report.folder import RunFolder

KEPT = 1000
"""Rounds of a region that are remembered; the others hold all but the last few."""


@dataclass(slots=True)
class _Standing:
    cursor: dict[str, Any]
    """Of its book of leases, when its seat was taken."""
    round: int
    """The first round of that seat."""
    closed: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Round of that seat -> (epoch, inner steps made of it after the round, rows of the round)."""


class Tally:
    """Thread-safe as dicts are: each region is told of by one thread."""

    def __init__(self) -> None:
        self._standing: dict[str, _Standing] = {}
        self._settled: dict[str, int] = {}
        """Region -> the first of its rounds that no other region holds."""

    def seated(self, region: str, cursor: dict[str, Any], round: int) -> None:
        """It begins there."""
        self._standing[region] = _Standing(cursor, round)

    def heard(self, region: str, rounds: Sequence[Mapping[str, Any]], settled: Mapping[str, int]) -> None:
        """What a leader told. Of its own rounds only the others' word counts: theirs is what it will be given."""
        if (standing := self._standing.get(region)) is not None:
            standing.closed.update({record["round"]: (record["epoch"], record["done"], record["samples"]) for record in rounds})
            for old in sorted(standing.closed)[:-KEPT]:
                del standing.closed[old]
        for other, first in settled.items():
            if other != region:
                self._settled[other] = max(first, self._settled.get(other, 0))

    def place(self, region: str) -> Place | None:
        """Where a region goes on that lost its state while others went on; None: it never had a seat."""
        if (standing := self._standing.get(region)) is None:
            return None
        held = [round for round in standing.closed if round < self._settled.get(region, 0)]
        if not held:
            return Place(standing.cursor, standing.round)
        return Place(standing.cursor, max(held) + 1, standing.closed[max(held)][:2])

    def newest(self) -> int:
        """The first round that no region has told of yet."""
        return max((max(standing.closed) + 1 for standing in self._standing.values() if standing.closed), default=0)

    def samples_held(self, region: str, since: int) -> int:
        """Rows of its last seat, from a round on, that another region holds."""
        standing, settled = self._standing.get(region), self._settled.get(region, 0)
        return sum(rows for round, (_, _, rows) in standing.closed.items() if since <= round < settled) if standing else 0

    @classmethod
    def of(cls, folder: RunFolder, round: int) -> "Tally":
        """As it was when the checkpoint before a round was made."""
        tally = cls()
        seats = {event["region"]: event for event in folder.lines("events.jsonl") if event["event"] == "seated"}
        for region, seat in seats.items():
            tally.seated(region, seat["cursor"], seat["round"])
        for record in folder.lines("rounds.jsonl"):
            region = record["region"]
            rounds = [record] if seats[region]["life"] == record["life"] else []
            settled = record.get("settled", {}) if record["round"] < round else {}
            tally.heard(region, rounds, {other: min(first, round) for other, first in settled.items()})
        return tally

    def back_to(self, round: int) -> None:
        """The run goes on from a checkpoint: what came later is void."""
        self._settled = {region: min(first, round) for region, first in self._settled.items()}
        for standing in self._standing.values():
            standing.closed = {closed: what for closed, what in standing.closed.items() if closed < round}
