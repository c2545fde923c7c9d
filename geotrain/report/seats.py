"""What a run's folder says of its seats: the rounds that each made, and which of them somebody holds."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from geotrain.data.ledger import RoundOfRows, Seating
from geotrain.report.folder import RunFolder


def seats_of(folder: RunFolder, back_to: float = math.inf) -> tuple[dict[str, dict[int, Seating]], dict[str, int]]:
    """(region -> life -> its seat, with its rounds, and up to where these count; region -> the first of its rounds that no other holds).

    `back_to`: the run goes on from before that round.
    """
    history = _History()
    for event in folder.lines("events.jsonl"):
        history.event(event)
    history.go_back(back_to)
    for record in folder.lines("rounds.jsonl"):
        history.round(record)
    history.end()
    return history.seats, history.held


class _History:
    """First all events, then all rounds."""

    def __init__(self) -> None:
        self.seats: dict[str, dict[int, Seating]] = {}
        self.held: dict[str, int] = {}
        """Region -> the first of its rounds that no other holds."""
        self._absent: dict[str, int] = {}
        """The same of regions that are away, as the others had told when one was lost or a checkpoint was made: what those held who were
        lost since is not in it."""
        self._staged: dict[int, dict[str, int]] = {}
        """Round of a checkpoint -> the same of all regions, once it is committed."""
        self._told: dict[str, int] = {}
        """The same, as those have told that are in at the end."""
        self._away: set[str] = set()
        self._by_others: dict[tuple[str, int, int], RoundOfRows] = {}
        """(region, life, round) -> what others told of it last: the most that one of them held then."""

    def event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "seated":
                self.seats.setdefault(event["region"], {})[event["life"]] = Seating(event["cursor"], event["round"])
                self._away.discard(event["region"])
                self._absent.pop(event["region"], None)
            case "lost":
                self._away.add(event["region"])
                self._absent |= event.get("held_of_absent", {})
            case "segment":  # at whose end all had the same, themselves among them
                there, absent = dict.fromkeys(event.get("hashes", ()), event["round"]), event.get("held_of_absent", {})
                self.held |= there
                self._absent |= absent
                self._staged[event["round"]] = there | absent
            case "checkpoint":  # who was lost meanwhile is in it
                staged = self._staged.get(event["round"], {})
                self._absent = {region: max(first, staged.get(region, 0)) for region, first in self._absent.items()}
            case "rolled_back" | "resumed":
                self.go_back(event["round"])
            case "bad_checkpoint" if event.get("back_to") is not None:
                self.go_back(event["back_to"])

    def go_back(self, round: float) -> None:
        """To the checkpoint before that round."""
        for seat in [seat for lives in self.seats.values() for seat in lives.values()]:
            seat.until = min(seat.until, round)
        for firsts in (self.held, self._absent):
            firsts.update({region: int(min(before, round)) for region, before in firsts.items()})

    def round(self, record: Mapping[str, Any]) -> None:
        region, life = record["region"], record["life"]
        if (seat := self.seats.get(region, {}).get(life)) is None:
            return  # the process was killed before it could say that
        void = bool(record["steps"]) and not record["samples"]
        made = RoundOfRows(record["round"], record["epoch"], record["done"], record["steps"], void, record["samples"])
        if record.get("by_others"):
            self._by_others[region, life, made.round] = made
            return
        seat.rounds.append(made)
        if region in self._away or life != max(self.seats[region]):
            return  # what it held was lost with it, but for what those had who were left
        for other, first in record.get("settled", {}).items():
            if other != region:
                self._told[other] = max(self._told.get(other, 0), int(min(first, seat.until)))

    def end(self) -> None:
        """All was heard."""
        for (region, life, _), made in self._by_others.items():
            _take_from_others(self.seats[region][life], made)
        self.held |= self._absent
        self.held |= {region: max(first, self.held.get(region, 0)) for region, first in self._told.items()}
        for region in self._away & self.seats.keys():  # what only it had went with it
            last = self.seats[region][max(self.seats[region])]
            last.until = min(last.until, self.held.get(region, 0))


def _take_from_others(seat: Seating, made: RoundOfRows) -> None:
    """What they hold of a round counts; what its own leader made of it beyond that was lost with it."""
    own = next((own for own in reversed(seat.rounds) if own.round == made.round), None)
    if own is not None:
        rest = own.steps - made.steps
        seat.rounds.remove(own)
        if rest > 0:
            seat.rounds.append(replace(own, steps=rest, samples=own.samples - made.samples))
    seat.rounds.append(made)
