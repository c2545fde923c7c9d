"""The tally: how far every region has come in its rows, and what of that is in what the regions hold. So a region that lost its state
goes on with the first row that nobody has learned from, and after a checkpoint to which all went back, with the first row after that.
"""

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geotrain.partition.orders import Place
from geotrain.report.folder import RunFolder
from geotrain.report.seats import seats_of
from geotrain.sync.messages import RoundMade


@dataclass(slots=True)
class _Seat:
    life: int
    cursor: dict[str, Any]
    """Of its book of leases, when it was taken."""
    round: int
    """Its first."""
    closed: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Round -> (epoch, inner steps made of it after the round, rows of the round)."""
    by: dict[str, dict[int, RoundMade]] = field(default_factory=dict)
    """Region that is in -> those that it holds, as it told: that counts, though the seat's own leader has made more of a round."""
    written: dict[int, RoundMade] = field(default_factory=dict)
    """What was passed on by `untold`."""
    news: set[int] = field(default_factory=set)
    """Rounds that `untold` is to look at."""

    def take(self, teller: str, made: RoundMade) -> None:
        """It holds that."""
        there = self.by.setdefault(teller, {})
        if (before := there.get(made.round)) is None or made.steps > before.steps:
            there[made.round] = made
            self.news.add(made.round)

    def leave_out(self, teller: str) -> None:
        """What it held is gone."""
        self.news.update(self.by.pop(teller, ()))

    def held(self, round: int) -> RoundMade | None:
        """The most of that round that another region holds."""
        return max((there[round] for there in self.by.values() if round in there), key=lambda made: made.steps, default=None)

    def by_others(self) -> dict[int, RoundMade]:
        """That of each round."""
        rounds = {round for there in self.by.values() for round in there}
        return {round: made for round in sorted(rounds) if (made := self.held(round)) is not None}

    def known(self) -> dict[int, tuple[int, int, int]]:
        """As `closed`, of all that is known."""
        return self.closed | {round: _short(made) for round, made in self.by_others().items()}

    def untold(self) -> list[RoundMade]:
        """What others told that its leader did not, or told otherwise; each once, and again when they hold something else."""
        found = []
        for round in sorted(self.news):
            made, told = self.held(round), self.written.get(round)
            if made is not None and (made != told if told is not None else _short(made) != self.closed.get(round)):
                found.append(made)
        self.news.clear()
        self.written |= {made.round: made for made in found}
        return found

    def forget(self, first: int, end: float) -> None:
        """All rounds but those from `first` on, and before `end`."""
        kept: list[dict[int, Any]] = [self.closed, self.written, *self.by.values()]
        for rounds in kept:
            for round in [round for round in rounds if not first <= round < end]:
                del rounds[round]
        self.news = {round for round in self.news if first <= round < end}


class Tally:
    """Thread-safe."""

    def __init__(self) -> None:
        self._seats: dict[str, list[_Seat]] = {}
        """Of each region, the oldest first: those that the run may go back to."""
        self._in: set[str] = set()
        """Regions that have not lost their last seat."""
        self._lost_since: dict[str, int] = {}
        """Regions of which a seat was lost, and the round at which that segment began: their rows in rounds that the others hold are to
        be counted still."""
        self._made_up: dict[str, int] = {}
        """Region -> such rows."""
        self._lost_in: dict[str, int] = {}
        """Region -> epoch of the first view without it."""
        self._told_in: dict[str, float] = {}
        """Region that is in -> epoch of the view in which its leader told something last; infinite once its segment was over."""
        self._claims: dict[str, dict[str, int]] = {}
        """Region that is in -> other -> the first of its rounds that the one does not hold, as the one said."""
        self._healed: set[str] = set()
        """Regions whose claims begin with those of the one that brought them up to date."""
        self._stored: dict[str, int] = {}
        """Region -> the first of its rounds that the last checkpoint does not hold."""
        self._to_be_stored: dict[int, dict[str, int]] = {}
        """The same of checkpoints that are not committed yet, by their round."""
        self._lock = threading.Lock()

    def seated(self, region: str, life: int, cursor: dict[str, Any], round: int) -> None:
        """It begins there."""
        with self._lock:
            self._make_up(region, round)
            self._seats.setdefault(region, []).append(_Seat(life, cursor, round))
            self._in.add(region)
            self._forget(region)

    def lost(self, region: str, epoch: int, since: int) -> None:
        """What it holds is gone with it. `epoch`: of the first view without it; `since`: the round at which the segment began."""
        with self._lock:
            self._in.discard(region)
            self._forget(region)
            self._lost_in[region] = epoch
            self._lost_since.setdefault(region, since)

    def _forget(self, region: str) -> None:
        self._claims.pop(region, None)
        self._told_in.pop(region, None)
        self._healed.discard(region)
        for seat in self._all_seats():
            seat.leave_out(region)

    def _all_seats(self) -> list[_Seat]:
        return [seat for seats in self._seats.values() for seat in seats]

    def told(self, region: str, epoch: float) -> None:
        """It told something in the view of that epoch."""
        with self._lock:
            self._told_in[region] = epoch

    def is_settled(self, region: str, others: Collection[str]) -> bool:
        """Whether these have told something since they have heard that it is lost: nothing more of its rounds is taken then."""
        with self._lock:
            return all(self._told_in.get(other, -1) >= self._lost_in.get(region, -1) for other in others)

    def is_in(self, region: str, life: int) -> bool:
        """Whether that is the life of a region's seat, which it has not lost."""
        with self._lock:
            return self._is_in(region, life)

    def _is_in(self, region: str, life: int) -> bool:
        return region in self._in and self._seats[region][-1].life == life

    def heard(
        self,
        region: str,
        life: int,
        rounds: Sequence[Mapping[str, Any]],
        settled: Mapping[str, int],
        held: Sequence[Sequence[Any]] = (),
    ) -> None:
        """What a leader told. Of its own rounds only the others' word counts: theirs is what it will be given. One that is lost by now may
        still say what it did, and holds nothing. `held`: the values of a RoundMade each, of others.
        """
        with self._lock:
            for record in rounds:
                if (seat := self._seat(region, record["life"])) is not None:
                    seat.closed[record["round"]] = record["epoch"], record["done"], record["samples"]
                    seat.news.add(record["round"])
            if self._is_in(region, life):
                for made in [RoundMade(*values) for values in held]:
                    seat = self._seat(made.region, made.life)
                    if seat is not None and seat is self._seats[made.region][-1] and made.region != region:
                        seat.take(region, made)
                claims = self._claims.setdefault(region, {})
                claims.update({other: max(first, claims.get(other, 0)) for other, first in settled.items() if other != region})

    def _seat(self, region: str, life: int) -> _Seat | None:
        return next((seat for seat in self._seats.get(region, ()) if seat.life == life), None)

    def told_by_others(self) -> list[RoundMade]:
        """Rounds of lost seats of which others hold what their own leaders did not tell, or only a part; each once."""
        with self._lock:
            lost = [seat for region, seats in self._seats.items() for seat in seats if not self._is_in(region, seat.life)]
            return [made for seat in lost for made in seat.untold()]

    def healed(self, region: str, by: str, round: int) -> None:
        """It holds what another held before a round."""
        with self._lock:
            if region in self._in:
                held = {**self._claims.get(by, {}), by: round}
                self._claims[region] = {other: min(first, round) for other, first in held.items() if other != region}
                self._healed.add(region)
                for seat in self._all_seats():
                    seat.by[region] = {made.round: made for made in seat.by.get(by, {}).values() if made.round < round}

    def came_in(self, region: str) -> None:
        """It trains: where it was not healed it took part in a merge of all, and holds what the others do."""
        with self._lock:
            if region in self._in and region not in self._healed:
                others = {other for claims in self._claims.values() for other in claims}
                self._claims[region] = {other: self._held(other) for other in others if other != region}
                for seat in self._all_seats():
                    seat.by[region] = seat.by_others()

    def _held(self, region: str) -> int:
        """The first of its rounds that neither the last checkpoint nor another region holds."""
        return max([self._stored.get(region, 0), *(claims.get(region, 0) for teller, claims in self._claims.items() if teller != region)])

    def place(self, region: str) -> Place | None:
        """Where a region goes on that lost its state while others went on; None: it never had a seat."""
        with self._lock:
            if not (seats := self._seats.get(region)):
                return None
            seat = seats[-1]
            if (last := _last_before(seat, self._held(region))) is None:
                return Place(seat.cursor, seat.round)
            return Place(seat.cursor, last + 1, seat.known()[last][:2])

    def newest(self) -> int:
        """The first round that no region has told of yet."""
        with self._lock:
            return max((max(seats[-1].known()) + 1 for seats in self._seats.values() if seats[-1].known()), default=0)

    def rows_made_up(self) -> dict[str, int]:
        """Region -> rows of seats that were lost in this segment, in rounds that the others hold; each is told once."""
        with self._lock:
            for region in list(self._lost_since):
                self._make_up(region)
            told, self._made_up = self._made_up, {}
            return told

    def _make_up(self, region: str, until: float = math.inf) -> None:
        """`until`: the first round of the region's next seat."""
        since, seats = self._lost_since.pop(region, math.inf), self._seats.get(region, ())
        end = min(until, self._held(region))
        rows = sum(rows for seat in seats[-1:] for round, (_, _, rows) in seat.known().items() if since <= round < end)
        self._made_up[region] = self._made_up.get(region, 0) + rows

    def back_to(self, round: int) -> None:
        """The run goes on from the last checkpoint: what came later is void, and so are seats that were taken later."""
        with self._lock:
            self._claims.clear()
            self._made_up.clear()
            self._lost_in.clear()
            self._lost_since = dict.fromkeys(self._lost_since, round)
            for seats in self._seats.values():
                del seats[_at(seats, round) + 1 :]
                for seat in seats:
                    seat.forget(0, round)

    def checkpoints(self, round: int, regions: Collection[str]) -> dict[str, int]:
        """A checkpoint is being made before that round, of these regions; of each other one the first of its rounds that is not in it."""
        with self._lock:
            away = {region: min(round, held) for region, held in self._held_of(self._seats.keys() - set(regions)).items()}
            self._to_be_stored[round] = away | dict.fromkeys(regions, round)
            return away

    def held_of_absent(self) -> dict[str, int]:
        """Region that is lost -> the first of its rounds that is gone with it, as far as the others have told."""
        with self._lock:
            return self._held_of(self._seats.keys() - self._in)

    def _held_of(self, regions: Collection[str]) -> dict[str, int]:
        return {region: self._held(region) for region in sorted(regions)}

    def checkpointed(self, round: int) -> None:
        """It is committed: the run goes back no further."""
        with self._lock:
            if round not in self._to_be_stored:
                return
            self._stored = self._to_be_stored[round]
            self._to_be_stored = {later: firsts for later, firsts in self._to_be_stored.items() if later > round}
            for region, seats in self._seats.items():
                del seats[: _at(seats, round)]
                for seat in seats:
                    seat.forget(_last_before(seat, self._stored.get(region, 0)) or 0, math.inf)

    @classmethod
    def of(cls, folder: RunFolder, round: int) -> "Tally":
        """As it was when the checkpoint before a round was made."""
        seats, held = seats_of(folder, round)
        tally = cls()
        tally._stored = held
        for region, lives in seats.items():
            for number, (life, seating) in enumerate(sorted(lives.items())):
                if number and seating.until < seating.round:
                    continue  # it was void already
                closed = {made.round: (made.epoch, made.done, made.samples) for made in seating.rounds if made.round < seating.until}
                tally._seats.setdefault(region, []).append(_Seat(life, seating.cursor, seating.round, closed))
        tally.back_to(round)
        return tally


def _short(made: RoundMade) -> tuple[int, int, int]:
    return made.epoch, made.done, made.samples


def _at(seats: Sequence[_Seat], round: int) -> int:
    """The number of the seat that a region had at a round: the last that began by then, or else the first."""
    return max((number for number, seat in enumerate(seats) if seat.round <= round), default=0)


def _last_before(seat: _Seat, round: int) -> int | None:
    """Its last round before that one."""
    return max((closed for closed in seat.known() if closed < round), default=None)
