"""make_plan: the placement of a job with its predictions, a pure function of what is known about data, offers and links."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from geotrain.data.inventory import Inventory
from geotrain.job import JobSpec
from geotrain.plan.links import Exchange, best_owner, merge_exchange, push_exchange, transfer_s
from geotrain.plan.power import Allocation, Offer, cheapest, compute, everything, load_power, usd_per_hour
from geotrain.sync.pace import rounds_per_epoch
from geotrain.sync.strategy import Merging, strategy_of

TRANSFER_MARGIN = 10.0
"""A peer is given up when it stays unreachable for this many times as long as an update takes, and at least a minute."""


@dataclass(frozen=True, slots=True)
class RegionPlan:
    region: str
    rows: int
    bytes: int
    workers: int
    allocation: dict[str, int]
    samples_per_s: float
    steps_per_epoch: int
    compute_s: float
    """Of one round."""
    usd_per_round: float
    load_power: float
    """Epochs per second, as allocated."""
    reason: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was not chosen, and why."""

    what: str
    usd: float
    seconds: float
    why_not: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved placement with predictions. Seconds and dollars are of the training part."""

    regions: tuple[RegionPlan, ...]
    owner: str
    rounds_per_epoch: int
    rounds: int
    segment_rounds: int
    payload_bytes: int
    """Of one update."""
    round_s: float
    exchange_s: float
    hidden: bool
    """The exchange runs beside compute."""
    give_up_s: float
    """Derived: how long a peer may stay unreachable."""
    seconds: float
    usd: float
    wan_bytes: int
    alternatives: tuple[Alternative, ...] = ()

    def region(self, name: str) -> RegionPlan:
        return next(plan for plan in self.regions if plan.region == name)

    @property
    def segments(self) -> int:
        return ceil(self.rounds / self.segment_rounds)

    def segment_end(self, segment: int) -> int:
        """The round before which a segment ends; segments count from 1."""
        return min(self.rounds, segment * self.segment_rounds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Plan":
        regions = tuple(RegionPlan(**region) for region in tree["regions"])
        return cls(**{**tree, "regions": regions, "alternatives": tuple(Alternative(**other) for other in tree["alternatives"])})


@dataclass(frozen=True, slots=True)
class _Draft:
    """An allocation for every region, costed."""

    regions: tuple[RegionPlan, ...]
    rounds_per_epoch: int
    round_s: float
    rounds: int
    exchange: Exchange

    @property
    def seconds(self) -> float:
        return self.rounds * self.round_s

    @property
    def usd(self) -> float:
        return self.rounds * (sum(region.usd_per_round for region in self.regions) + self.exchange.usd)


def make_plan(job: JobSpec, inventory: Mapping[str, Inventory], offers: Mapping[str, Sequence[Offer]], payload_bytes: int) -> Plan:
    """Allocate workers, choose the owner, and predict time, money and bytes.

    The straggler, the region with the least load power when all is allocated, sets the target; every other region gets the
    cheapest allocation that reaches (1 - tolerance) of it. `payload_bytes`: one encoded update. Links are the job's.
    """
    names = [region.name for region in job.regions]
    offers = {name: _usable(offers[name], inventory[name]) for name in names}
    loss = job.schedule.scaling_loss
    rows = {name: inventory[name].rows for name in names}
    full = {name: everything(offers[name]) for name in names}
    powers = {name: load_power(compute(offers[name], full[name], loss), rows[name]) for name in names}
    straggler = min(names, key=lambda name: (powers[name], name))
    target = (1 - job.schedule.tolerance) * powers[straggler]
    matched = {name: full[name] if name == straggler else cheapest(offers[name], rows[name], target, loss) for name in names}
    owner = best_owner(names, payload_bytes, job.link)
    drafts = {
        kind: _draft(job, inventory, offers, chosen, owner, payload_bytes, straggler)
        for kind, chosen in (("matched", matched), ("all", full))
    }
    draft, other = drafts[job.schedule.allocate], drafts["all" if job.schedule.allocate == "matched" else "matched"]
    slowest_s = max((transfer_s(job.link(a, b), payload_bytes) for a in names for b in names if a != b), default=0.0)
    segment_rounds = job.schedule.segment_rounds or max(1, round(job.schedule.segment_s / max(draft.round_s, 1e-6)))
    return Plan(
        regions=draft.regions,
        owner=owner,
        rounds_per_epoch=draft.rounds_per_epoch,
        rounds=draft.rounds,
        segment_rounds=min(segment_rounds, draft.rounds),
        payload_bytes=payload_bytes,
        round_s=draft.round_s,
        exchange_s=draft.exchange.seconds,
        hidden=not isinstance(strategy_of(job.sync), Merging),
        give_up_s=max(60.0, TRANSFER_MARGIN * slowest_s),
        seconds=draft.seconds,
        usd=draft.usd,
        wan_bytes=draft.rounds * sum(draft.exchange.bytes.values()),
        alternatives=_rejected(job, draft, other),
    )


def _usable(offers: Sequence[Offer], inventory: Inventory) -> list[Offer]:
    """A worker without a row group of its own would have nothing to do."""
    groups = len(inventory.row_groups())
    return [replace(offer, count=min(offer.count, groups)) for offer in offers]


def _draft(
    job: JobSpec,
    inventory: Mapping[str, Inventory],
    offers: Mapping[str, Sequence[Offer]],
    chosen: Mapping[str, Allocation],
    owner: str,
    payload_bytes: int,
    straggler: str,
) -> _Draft:
    strategy, loss, batch = strategy_of(job.sync), job.schedule.scaling_loss, job.train.batch_size
    speeds = {name: compute(offers[name], chosen[name], loss) for name in chosen}
    steps = {name: ceil(inventory[name].rows / (batch * sum(chosen[name]))) for name in chosen}
    per_epoch = rounds_per_epoch(max(steps.values()), strategy.every)
    compute_s = {name: inventory[name].rows / per_epoch / speeds[name] for name in chosen}
    slowest = max(compute_s.values())
    if isinstance(strategy, Merging):
        exchange = merge_exchange(list(chosen), owner, payload_bytes, job.link)
        round_s = slowest + exchange.seconds
    else:
        exchange = push_exchange(list(chosen), payload_bytes, job.link)
        round_s = max(slowest, exchange.seconds)
    total_rows = sum(inventory[name].rows for name in chosen)
    epochs = job.train.epochs if job.train.epochs is not None else (job.train.samples or 0) / total_rows
    regions = tuple(
        RegionPlan(
            region=name,
            rows=inventory[name].rows,
            bytes=inventory[name].bytes,
            workers=sum(chosen[name]),
            allocation={offer.kind: n for offer, n in zip(offers[name], chosen[name], strict=True) if n},
            samples_per_s=speeds[name],
            steps_per_epoch=steps[name],
            compute_s=compute_s[name],
            usd_per_round=usd_per_hour(offers[name], chosen[name]) * round_s / 3600,
            load_power=load_power(speeds[name], inventory[name].rows),
            reason=_reason(name, straggler, chosen[name], offers[name]),
        )
        for name in chosen
    )
    return _Draft(regions, per_epoch, round_s, max(1, ceil(epochs * per_epoch - 1e-9)), exchange)


def _reason(name: str, straggler: str, chosen: Allocation, offers: Sequence[Offer]) -> str:
    if name == straggler:
        return "straggler: sets the pace"
    if chosen == everything(offers):
        return "all, to keep up"
    return "cheapest that keeps up"


def _rejected(job: JobSpec, draft: _Draft, other: _Draft) -> tuple[Alternative, ...]:
    """The other way to allocate, where it differs."""
    if [region.workers for region in draft.regions] == [region.workers for region in other.regions]:
        return ()
    if job.schedule.allocate == "matched":
        what, why = "everything allocated", f"{_more(other.usd, draft.usd)} dearer, {_more(draft.seconds, other.seconds)} quicker"
    else:
        what, why = "matched to the straggler", "schedule.allocate: all was asked for"
    return (Alternative(what, other.usd, other.seconds, why),)


def _more(a: float, b: float) -> str:
    return f"{100 * (a / b - 1):.0f} %" if b else "not"
