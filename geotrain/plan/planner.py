"""make_plan: the placement of a job with its predictions, a pure function of what is known about data, offers and links."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from geotrain.data.inventory import Inventory
from geotrain.job import JobSpec, LinkSpec, Streaming
from geotrain.plan.bits import BLOCKING_SHARE, BYTES_PER_NUMBER, HIDDEN_MARGIN, Bits, choose_bits, choose_push_bits, exchange_budget_s
from geotrain.plan.links import Exchange, best_owner, merge_exchange, push_exchange, shares_by_bandwidth, transfer_s
from geotrain.plan.power import Allocation, Offer, cheapest, compute, efficiency, everything, load_power, usd_per_hour
from geotrain.sync.messages import View
from geotrain.sync.pace import Pace, PaceChange, balanced, compass, pace_since, rounds_per_epoch
from geotrain.sync.strategy import Chosen, Merging, Pushing, Strategy, provisional, strategy_of
from geotrain.sync.topology import targets
from geotrain.wan.timing import first_patience_s

TRANSFER_MARGIN, LEAST_GIVE_UP_S = 10.0, 60.0
"""The others go on without a region that stays unreachable for so many times as long as an update takes, and at least so long."""

LEAST_HANG_S, HANG_FACTOR = 60.0, 20.0
"""A worker hangs when it takes so many times longer than planned for an inner step, and so many seconds more."""


@dataclass(frozen=True, slots=True)
class RegionPlan:
    region: str
    rows: int
    bytes: int
    workers: int
    allocation: dict[str, int]
    samples_per_s: float
    steps_per_epoch: int
    rounds_per_epoch: int
    """Rounds in which this region passes its data once: the same in all, but for `every: balanced`."""
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
    shares: dict[str, float]
    """Owner -> its part of the merging."""
    chosen: Chosen
    bits: dict[str, Bits]
    """With `codec: auto`, each region's choice."""
    rounds: int
    segment_rounds: int
    payload_bytes: int
    """Of one update."""
    full_bytes: int
    """Of the whole model, fp32."""
    work_s: float
    """Encoding, checksums and decoding of one update, both ends together."""
    round_s: float
    exchange_s: float
    hidden: bool
    """The exchange runs beside compute."""
    give_up_s: float
    """Derived: how long a region may stay unreachable before the others go on without it."""
    patience_s: dict[str, float]
    """Derived, per directed link (`tokyo>virginia`): how long a part may go unanswered, until the link is measured."""
    seconds: float
    usd: float
    wan_bytes: int
    alternatives: tuple[Alternative, ...] = ()
    changes: tuple[PaceChange, ...] = ()
    """Of H, with `every: auto`, since the run began; `rounds` and `chosen` are those of the last."""
    first_rounds: int = 0
    """`rounds`, and H, before the first change."""
    first_every: int = 0

    def change_at(self, round: int) -> PaceChange | None:
        """The last change of H before or at a round."""
        return next((change for change in reversed(self.changes) if change.round <= round), None)

    def as_of(self, round: int) -> "Plan":
        """Without the changes that came later: for a run that goes back to a checkpoint before them."""
        kept = tuple(change for change in self.changes if change.round <= round)
        if kept == self.changes:
            return self
        rounds, every = (kept[-1].rounds, kept[-1].every) if kept else (self.first_rounds, self.first_every)
        return replace(self, changes=kept, rounds=rounds, chosen=replace(self.chosen, every=every))

    def of(self, names: Collection[str]) -> "Plan":
        """Of these regions alone: the others are not part of the run."""
        return replace(self, regions=tuple(region for region in self.regions if region.region in names))

    def region(self, name: str) -> RegionPlan:
        return next(plan for plan in self.regions if plan.region == name)

    @property
    def owner(self) -> str:
        """The region with the largest part of the merging; it publishes."""
        return min(self.shares, key=lambda region: (-self.shares[region], region))

    def view(self, epoch: int, without: Collection[str] = ()) -> View:
        """All regions, or all but some, with their owners."""
        regions = sorted(plan.region for plan in self.regions if plan.region not in without)
        owners = [owner if owner in regions else regions[number % len(regions)] for number, owner in enumerate(self.shares)]
        return View(epoch, tuple(regions), tuple(owners))

    @property
    def segments(self) -> int:
        return ceil(self.rounds / self.segment_rounds)

    def segment_end(self, segment: int) -> int:
        """The round before which a segment ends; segments count from 1."""
        return min(self.rounds, segment * self.segment_rounds)

    def segment_of(self, round: int) -> int:
        """The segment that a round is in."""
        return round // self.segment_rounds + 1

    def step_s(self, name: str) -> float:
        """How long an inner step of a region is to take."""
        region = self.region(name)
        return region.rows / region.steps_per_epoch / region.samples_per_s

    def hangs_after_s(self, name: str) -> float:
        """How long a region's leader may give no sign of an inner step, or of what it waits for [ours]."""
        return LEAST_HANG_S + HANG_FACTOR * self.step_s(name)

    @property
    def stands_still_after_s(self) -> float:
        """How long all leaders may wait for each other with nothing under way: twice as long as any may give no sign [ours]."""
        return self.chosen.grace_s + 2 * max(self.hangs_after_s(plan.region) for plan in self.regions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "Plan":
        regions = tuple(RegionPlan(**region) for region in tree["regions"])
        bits = {region: Bits(tuple(choice["up"]), choice["down"]) for region, choice in tree["bits"].items()}
        alternatives = tuple(Alternative(**other) for other in tree["alternatives"])
        changes = tuple(PaceChange(**change) for change in tree["changes"])
        values = {"regions": regions, "alternatives": alternatives, "chosen": Chosen(**tree["chosen"]), "bits": bits, "changes": changes}
        return cls(**{**tree, **values})


@dataclass(frozen=True, slots=True)
class UpdateSize:
    """One update of the whole model, as the planner sees it."""

    payload_bytes: int
    """Encoded."""
    work_s: float = 0.0
    """What encoding, checksums and decoding take, both ends together."""
    full_bytes: int = 0
    """The whole model in fp32, for the merge that ends some runs."""

    def part(self, share: float) -> "UpdateSize":
        return UpdateSize(round(self.payload_bytes * share), self.work_s * share)


@dataclass(frozen=True, slots=True)
class _Draft:
    """An allocation for every region, costed."""

    regions: tuple[RegionPlan, ...]
    strategy: Strategy
    chosen: Chosen
    bits: dict[str, Bits]
    round_s: float
    rounds: int
    exchange: Exchange

    @property
    def seconds(self) -> float:
        return self.rounds * self.round_s

    @property
    def usd(self) -> float:
        return self.rounds * (sum(region.usd_per_round for region in self.regions) + self.exchange.usd)


def make_plan(job: JobSpec, inventory: Mapping[str, Inventory], offers: Mapping[str, Sequence[Offer]], update: UpdateSize) -> Plan:
    """Allocate workers, choose the owners and what the job leaves open, and predict time, money and bytes.

    The straggler, the region with the least load power when all is allocated, sets the target; every other region gets the
    cheapest allocation that reaches (1 - tolerance) of it. Links are the job's.
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
    shares = _shares(job, names, update.payload_bytes)
    allocations = {"matched": matched, "all": full}
    drafts = {kind: _draft(job, inventory, offers, allocations[kind], shares, update, straggler) for kind in allocations}
    draft, other = drafts[job.schedule.allocate], drafts["all" if job.schedule.allocate == "matched" else "matched"]
    slowest_s = max((transfer_s(link, max(update.payload_bytes, update.full_bytes)) for link in job.kinds_of_link()), default=0.0)
    final = merge_exchange(names, {min(shares): 1.0}, 0 if draft.strategy.ends_equal else update.full_bytes, job.link)
    final_s = 0.0 if draft.strategy.ends_equal else final.seconds
    segment_rounds = job.schedule.segment_rounds or max(1, round(job.schedule.segment_s / max(draft.round_s, 1e-6)))
    return Plan(
        regions=draft.regions,
        shares=shares,
        chosen=draft.chosen,
        bits=draft.bits,
        rounds=draft.rounds,
        segment_rounds=min(segment_rounds, draft.rounds),
        payload_bytes=update.payload_bytes,
        full_bytes=update.full_bytes,
        work_s=update.work_s,
        round_s=draft.round_s,
        exchange_s=draft.exchange.seconds,
        hidden=_hides(draft.strategy),
        patience_s={f"{a}>{b}": _patience_s(job.link(a, b)) for a in names for b in names if a != b} if len(names) < 50 else {},
        give_up_s=max(LEAST_GIVE_UP_S, TRANSFER_MARGIN * slowest_s),
        seconds=draft.seconds + final_s,
        usd=draft.usd + final.usd,
        wan_bytes=draft.rounds * sum(draft.exchange.bytes.values()) + sum(final.bytes.values()),
        alternatives=_rejected(job, draft, other),
    )


def _patience_s(link: LinkSpec) -> float:
    return first_patience_s(link.rtt_ms / 1000, link.mbit_per_s * 1e6 / 8)


REPLAN_RATIO = 1.25
"""H is changed in mid-run when the links call for so many times more, or less."""


def replan(plan: Plan, job: JobSpec, round: int) -> Plan:
    """With `every: auto`: H again, for the links as they are believed now, from `round` on. Who does how much stays."""
    names = [region.region for region in plan.regions]
    strategy = strategy_of(job.sync, len(names), plan.chosen)
    exchange = _exchange(job, strategy, plan.shares, UpdateSize(plan.payload_bytes, plan.work_s))
    step_s = {region.region: region.rows / region.steps_per_epoch / region.samples_per_s for region in plan.regions}
    most = max(region.steps_per_epoch for region in plan.regions)
    every = choose(job, step_s, most, exchange, strategy).every
    if isinstance(job.sync, Streaming):
        every = max(every, (plan.chosen.overlap_steps + 1) * job.sync.fragments)
    if 1 / REPLAN_RATIO < every / plan.chosen.every < REPLAN_RATIO:
        return plan
    chosen = replace(plan.chosen, every=every)
    new = rounds_per_epoch(most, strategy_of(job.sync, len(names), chosen).steps_per_round)
    change = _change(plan, round, new, every)
    compute_s = max(region.rows / new / region.samples_per_s for region in plan.regions)
    round_s = max(compute_s, exchange.seconds) if _hides(strategy) else compute_s + exchange.seconds
    return replace(
        plan,
        chosen=chosen,
        rounds=change.rounds,
        round_s=round_s,
        exchange_s=exchange.seconds,
        **_with_change(plan, change),
    )


def remake(
    plan: Plan, job: JobSpec, inventory: Mapping[str, Inventory], offers: Mapping[str, Sequence[Offer]], round: int, samples: int
) -> Plan:
    """Another placement from `round` on, before which `samples` rows were trained on: for other regions, or workers of another speed.

    Epochs go on where they are: what is left of one is spread over its share of the new rounds.
    """
    fresh = make_plan(job, inventory, offers, UpdateSize(plan.payload_bytes, plan.work_s, plan.full_bytes))
    if getattr(job.sync, "every", 1) == "balanced":  # every region has rounds of its own, which stay
        known = {region.region: region.rounds_per_epoch for region in plan.regions}
        regions = tuple(replace(new, rounds_per_epoch=known.get(new.region, new.rounds_per_epoch)) for new in fresh.regions)
        rounds, changed = plan.rounds, _with_change(plan, None)
    else:
        change = _change(plan, round, fresh.regions[0].rounds_per_epoch, fresh.chosen.every)
        if job.train.samples is not None:
            per_round = sum(region.rows for region in fresh.regions) / fresh.regions[0].rounds_per_epoch
            change = replace(change, rounds=round + max(1, ceil((job.train.samples - samples) / per_round - 1e-9)))
        regions = tuple(replace(new, rounds_per_epoch=plan.regions[0].rounds_per_epoch) for new in fresh.regions)
        rounds, changed = change.rounds, _with_change(plan, change)
    left = (rounds - round) / fresh.rounds
    same = {region.region for region in plan.regions} == {region.region for region in fresh.regions}
    return replace(
        fresh,
        regions=regions,
        shares=plan.shares if same else fresh.shares,
        rounds=rounds,
        segment_rounds=plan.segment_rounds,
        seconds=round * plan.round_s + left * fresh.seconds,
        usd=plan.usd * round / plan.rounds + left * fresh.usd,
        wan_bytes=int(plan.wan_bytes * round / plan.rounds + left * fresh.wan_bytes),
        **changed,
    )


def _change(plan: Plan, round: int, per_epoch: int, every: int) -> PaceChange:
    """Another number of rounds per epoch from `round` on; as many epochs are left as were."""
    last = plan.change_at(round)
    old = last.rounds_per_epoch if last else plan.regions[0].rounds_per_epoch
    epoch, left = _pace_of(plan, round).place(round)
    left_new, after = max(1, int(left * per_epoch / old + 0.5)), (plan.rounds - round - left) / old
    rounds = round + (left_new + ceil(after * per_epoch - 1e-9) if after >= 0 else max(1, ceil((plan.rounds - round) * per_epoch / old)))
    return PaceChange(round, epoch, left_new, per_epoch, every, rounds)


def _with_change(plan: Plan, change: PaceChange | None) -> dict[str, Any]:
    """What a plan remembers of how its H came to be."""
    first = (plan.first_rounds, plan.first_every) if plan.changes else (plan.rounds, plan.chosen.every)
    changes = plan.changes if change is None else (*plan.changes, change)
    return {"changes": changes, "first_rounds": first[0], "first_every": first[1]}


def offers_of(job: JobSpec, plan: Plan, measured: Mapping[str, float]) -> dict[str, list[Offer]]:
    """What the regions of a plan offer, at the speed that it believes, or of late was `measured` (samples per second of a region)."""
    offers = {}
    for region in plan.regions:
        speed = measured.get(region.region, region.samples_per_s)
        one = speed / (region.workers * efficiency(region.workers, job.schedule.scaling_loss))
        offers[region.region] = [Offer(d.kind, d.count, d.usd_per_hour, one) for d in job.region(region.region).devices]
    return offers


def _pace_of(plan: Plan, round: int) -> Pace:
    """Where rounds lie in epochs; how many inner steps they have is the regions' own affair."""
    if (change := plan.change_at(round)) is None:
        return Pace(plan.regions[0].rounds_per_epoch, lambda epoch: 0)
    return pace_since(change, lambda epoch: 0)


def _shares(job: JobSpec, names: Sequence[str], payload_bytes: int) -> dict[str, float]:
    if job.sync.topology == "owners":
        return shares_by_bandwidth(names, job.link)
    if len(job.kinds_of_link()) == 1:
        return {min(names): 1.0}
    return {best_owner(names, payload_bytes, job.link): 1.0}


def _hides(strategy: Strategy) -> bool:
    """Whether the exchange runs beside compute."""
    return not isinstance(strategy, Merging) or strategy.tau != 0


def _exchange(job: JobSpec, strategy: Strategy, shares: Mapping[str, float], update: UpdateSize) -> Exchange:
    """Of one round."""
    names = [region.name for region in job.regions]
    if isinstance(strategy, Merging):
        fragment = update.part(1 / strategy.turns)
        exchange = merge_exchange(names, shares, fragment.payload_bytes, job.link)
        return replace(exchange, seconds=exchange.seconds + 2 * fragment.work_s * (len(names) > 1))
    return push_exchange(_push_pairs(names, strategy, shares), update.payload_bytes, job.link)


def _work_s(strategy: Strategy, update: UpdateSize, regions: int) -> float:
    """What an exchange that hides behind compute takes from it in a round: encoding one's own, decoding what comes."""
    if isinstance(strategy, Merging):
        return update.work_s / strategy.turns if strategy.tau != 0 else 0.0
    return update.work_s * regions / 2 if regions > 1 else 0.0


def _usable(offers: Sequence[Offer], inventory: Inventory) -> list[Offer]:
    """A worker without a row group of its own would have nothing to do."""
    groups = len(inventory.row_groups())
    return [replace(offer, count=min(offer.count, groups)) for offer in offers]


def choose(job: JobSpec, seconds_per_step: Mapping[str, float], most_steps: int, exchange: Exchange, strategy: Strategy) -> Chosen:
    """What the job leaves open [ours]: H so that the exchange hides behind it, or takes a tenth of it where it cannot hide."""
    open_every = not isinstance(getattr(job.sync, "every", 1), int)
    settled, step_s = provisional(job.sync), min(seconds_per_step.values())
    every = settled.every
    if open_every:
        share = HIDDEN_MARGIN if _hides(strategy) else 1 / BLOCKING_SHARE
        every = min(most_steps, max(1, ceil(share * exchange.seconds / step_s)))
    tau = settled.overlap_steps
    if isinstance(job.sync, Streaming) and job.sync.overlap_steps is None:
        tau = min(every // job.sync.fragments - 1, ceil(HIDDEN_MARGIN * exchange.seconds / step_s))
    round_s = every * step_s / getattr(job.sync, "fragments", 1)
    grace_s = settled.grace_s if getattr(job.sync, "grace_s", None) is not None else 0.5 * round_s
    return Chosen(every, tau, grace_s)


def _draft(
    job: JobSpec,
    inventory: Mapping[str, Inventory],
    offers: Mapping[str, Sequence[Offer]],
    allocated: Mapping[str, Allocation],
    shares: Mapping[str, float],
    update: UpdateSize,
    straggler: str,
) -> _Draft:
    loss, batch, count = job.schedule.scaling_loss, job.train.batch_size, len(job.regions)
    speeds = {name: compute(offers[name], allocated[name], loss) for name in allocated}
    steps = {name: ceil(inventory[name].rows / (batch * sum(allocated[name]))) for name in allocated}
    step_s = {name: inventory[name].rows / steps[name] / speeds[name] for name in allocated}
    strategy = strategy_of(job.sync, count)
    exchange = _exchange(job, strategy, shares, update)
    chosen = choose(job, step_s, max(steps.values()), exchange, strategy)
    strategy = strategy_of(job.sync, count, chosen)
    per_epoch = _rounds_per_epoch(job, strategy, steps, step_s)
    compute_s = {name: inventory[name].rows / per_epoch[name] / speeds[name] for name in allocated}
    slowest = max(compute_s.values())
    bits = _bits(job, strategy, shares, update.payload_bytes, slowest)
    if bits:
        worst = max(max((*choice.up, choice.down)) for choice in bits.values())
        exchange = _exchange(job, strategy, shares, update.part(BYTES_PER_NUMBER[worst] / BYTES_PER_NUMBER[0]))
    slowest += _work_s(strategy, update, count)
    round_s = max(slowest, exchange.seconds) if _hides(strategy) else slowest + exchange.seconds
    rows = sum(inventory[name].rows for name in allocated)
    samples = job.train.samples if job.train.samples is not None else (job.train.epochs or 0) * rows
    per_round = sum(inventory[name].rows / per_epoch[name] for name in allocated)
    regions = tuple(
        RegionPlan(
            region=name,
            rows=inventory[name].rows,
            bytes=inventory[name].bytes,
            workers=sum(allocated[name]),
            allocation={offer.kind: n for offer, n in zip(offers[name], allocated[name], strict=True) if n},
            samples_per_s=speeds[name],
            steps_per_epoch=steps[name],
            rounds_per_epoch=per_epoch[name],
            compute_s=compute_s[name],
            usd_per_round=usd_per_hour(offers[name], allocated[name]) * round_s / 3600,
            load_power=load_power(speeds[name], inventory[name].rows),
            reason=_reason(name, straggler, allocated[name], offers[name]),
        )
        for name in allocated
    )
    return _Draft(regions, strategy, chosen, bits, round_s, max(1, ceil(samples / per_round - 1e-9)), exchange)


def _bits(job: JobSpec, strategy: Strategy, shares: Mapping[str, float], payload_bytes: int, compute_s: float) -> dict[str, Bits]:
    """With `codec: auto`."""
    if job.sync.codec != "auto":
        return {}
    budget_s = exchange_budget_s(compute_s, hides=_hides(strategy))
    names, elements = [region.name for region in job.regions], payload_bytes / BYTES_PER_NUMBER[0]
    if isinstance(strategy, Merging):
        return choose_bits(names, shares, elements / strategy.turns, budget_s, job.link)
    return choose_push_bits(_push_pairs(names, strategy, shares), elements, budget_s, job.link)


def _push_pairs(names: Sequence[str], strategy: Pushing, shares: Mapping[str, float]) -> list[tuple[str, str]]:
    view = View(0, tuple(names), tuple(shares))
    return [(a, b) for a in names for b in targets(strategy.topology, view, a)]


def _rounds_per_epoch(job: JobSpec, strategy: Strategy, steps: Mapping[str, int], step_s: Mapping[str, float]) -> dict[str, int]:
    """One number for all, so that they end an epoch together; with `every: balanced` each its own, so that they end a round together."""
    if getattr(job.sync, "every", 1) != "balanced":
        return dict.fromkeys(steps, rounds_per_epoch(max(steps.values()), strategy.steps_per_round))
    share = balanced if isinstance(strategy, Merging) else compass
    each = share(step_s, strategy.steps_per_round)
    return {name: rounds_per_epoch(steps[name], each[name]) for name in steps}


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
