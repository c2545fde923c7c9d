"""A full merge: the mean of all replicas by samples, after which all regions are equal to the bit.

It ends every run whose strategy leaves the regions with replicas of their own (late merging, arXiv 2507.06542), and begins a view
in a push strategy, where the crash of a region can have left its last update with some and not with others.
"""

from dataclasses import dataclass, field, replace

from geotrain.sync.messages import Apply, Discard, Instruction, Kind, Merge, Produce, Send, Update
from geotrain.sync.progress import Progress


@dataclass(slots=True)
class FullMerge:
    """One full merge in one view. All of the view take part, by rows; the owner of fragment 0 merges."""

    at: Progress
    number: int = 0
    """How many there were before in this view."""
    agreed: int | None = None
    """The round from which all go on, once agreed."""
    _replicas: dict[str, Update] = field(default_factory=dict)

    def begin(self) -> list[Instruction]:
        at, owner = self.at, self.at.view.owner(0)
        samples = 0 if at.fresh else at.rows
        absent = [made for region, made in sorted(at.newest.items()) if not at.view.has(region)]
        made = (*at.lately, *([at.made()] if at.steps else []), *absent)
        mine = Update(Kind.REPLICA, at.view.epoch, at.region, at.round, self.number, samples, at.last, made=made)
        return [Produce(mine), *(self.received(mine) if owner == at.region else [Send(mine, owner)])]

    def received(self, update: Update) -> list[Instruction]:
        """A REPLICA or AGREED of this view."""
        if self.agreed is not None:
            return [Discard(update, "already applied")]
        at = self.at
        if update.kind is Kind.AGREED:
            return self._agree(update)
        if update.origin in self._replicas or at.region != at.view.owner(0):
            return [Discard(update, "already here" if update.origin in self._replicas else "not the owner")]
        self._replicas[update.origin] = update
        if len(self._replicas) < len(at.view.regions):
            return []
        parts = tuple(self._replicas[region] for region in sorted(self._replicas))
        if not any(part.samples for part in parts):
            parts = tuple(replace(part, samples=1) for part in parts)
        mean = Update(
            Kind.AGREED,
            at.view.epoch,
            at.region,
            round=max(part.round for part in parts),
            fragment=self.number,
            samples=sum(part.samples for part in parts),
            last=min((part.last for part in parts if part.last is not None), default=None),
            members=tuple(part.origin for part in parts),
            made=tuple(made for part in parts for made in part.made),
        )
        return [Merge(mean, parts), *(Send(mean, other) for other in at.view.others(at.region)), *self._agree(mean)]

    def _agree(self, mean: Update) -> list[Instruction]:
        self.agreed = mean.round
        self.at.end_before(mean.last)
        for made in mean.made:
            self.at.heard_of(made)
        return [Apply(mean, 1.0, 0)]

    def abandon(self) -> list[Instruction]:
        """The view changed: forget what was collected of others."""
        return [Discard(update, "the view changed") for update in self._replicas.values()] if self.agreed is None else []
