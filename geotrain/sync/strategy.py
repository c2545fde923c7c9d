"""A strategy is a small value: what is sent, when it is applied, how it is merged, which outer optimizer follows."""

from dataclasses import dataclass, replace
from typing import Literal, assert_never

from geotrain import job
from geotrain.sync.topology import PushTopology

Sent = Literal["delta", "parameters"]
Rule = Literal["mean", "radial", "norm_clipped", "median", "trimmed", "flag"]


def discount(staleness: int) -> float:
    """Weight of an update computed `staleness` rounds ago: (1 + staleness) ** -0.5 (FedCompass, arXiv 2309.14675)."""
    assert staleness >= 0, staleness
    return float((1 + staleness) ** -0.5)


@dataclass(frozen=True, slots=True)
class Pushing:
    """Send to the neighbours after each round and go on; apply what comes when it comes.

    `delta`: what the optimizer did to the parameters since the last send. For plain SGD that is -lr * (sum of the
    gradients), which is ASGD-GA as published (Cloudless-Training, arXiv 2303.05330); for an optimizer with state the
    delta, unlike the gradient, still adds up.
    `parameters`: the replica itself, mixed in as w = (1 - a) w + a w_i (asynchronous MA), a divided by 1 + staleness.
    """

    sends: Sent
    every: int
    max_staleness: int
    alpha: float | None = None
    topology: PushTopology = "mesh"

    def weight(self, staleness: int, regions: int) -> float:
        """The weight with which an update of that staleness is applied."""
        match self.sends:
            case "delta":
                return 1.0
            case "parameters":
                return (self.alpha or 1 / regions) / (1 + staleness)
            case _:
                assert_never(self.sends)

    @property
    def steps_per_round(self) -> int:
        return self.every

    @property
    def ends_equal(self) -> bool:
        """Whether all regions hold the same parameters when a segment ends."""
        return False


@dataclass(frozen=True, slots=True)
class Outer:
    """What applies a merged pseudo-gradient g to the agreed parameters: b = m b + g; theta -= lr (g + m b), or lr b.

    DiLoCo's is Nesterov SGD (arXiv 2311.08105). With lr 1 and momentum 0 it is model averaging. CO2's (arXiv 2401.16265) is heavy
    ball with b clipped to [-clip, clip].
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = True
    clip: float | None = None


AVERAGE = Outer()


@dataclass(frozen=True, slots=True)
class Merging:
    """Agree on a round's contributions; merge pseudo-gradients by samples; all take one outer step.

    Blocking: MA (arXiv 2303.05330), DiLoCo (arXiv 2311.08105). Streaming (arXiv 2501.18512): `turns` fragments, each at its own turn,
    applied `tau` inner steps later and mixed as alpha * local + (1 - alpha) * agreed. One round delayed (after CO2, arXiv 2401.16265):
    `tau` None, the merge of a round is applied after the contribution to the next.
    """

    every: int
    """H: inner steps between two turns of a fragment."""
    outer: Outer = AVERAGE
    turns: int = 1
    shards: int = 1
    """Parts of each turn's parameters, with owners of their own."""
    tau: int | None = 0
    alpha: float = 0.0
    penalty: float = 0.0
    """The merge is divided by 1 + penalty * (1 - cos) / 2, cos being its cosine with the merge before [ours]."""
    rule: Rule = "mean"
    quorum: int | None = None
    """Contributions that a merge needs; None: all."""
    grace_s: float = 0.0
    """How much longer a merge waits for the rest once it has its quorum."""

    @property
    def steps_per_round(self) -> int:
        return max(1, self.every // self.turns)

    @property
    def fragments(self) -> int:
        return self.turns * self.shards

    @property
    def ends_equal(self) -> bool:
        """Whether all regions hold the same parameters when a segment ends: not where fragments are between two turns."""
        return self.turns == 1 and self.alpha == 0


Strategy = Pushing | Merging


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a job leaves to the plan, decided."""

    every: int
    """H; with `every: balanced` that of the region that makes the most."""
    overlap_steps: int = 0
    grace_s: float = 0.0


def provisional(sync: job.Sync) -> Chosen:
    """Before there is a plan: the job's own figures, and small ones where it leaves them open."""
    every = getattr(sync, "every", 1)
    return Chosen(every if isinstance(every, int) else 8, getattr(sync, "overlap_steps", None) or 0, getattr(sync, "grace_s", None) or 0.0)


def strategy_of(sync: job.Sync, regions: int, chosen: Chosen | None = None) -> Strategy:
    """The strategy that a job's `sync` section names, for so many regions. `chosen`: by the plan; None: provisionally."""
    chosen = chosen or provisional(sync)
    match sync:
        case job.Asgd():
            return Pushing("delta", 1, sync.max_staleness)
        case job.AsgdGa():
            return Pushing("delta", chosen.every, sync.max_staleness)
        case job.ModelAveraging(topology="star" | "mesh" | "ring" as topology) if sync.mode == "async":
            return Pushing("parameters", chosen.every, sync.max_staleness or 2, sync.alpha, topology)
        case job.ModelAveraging():
            return _merging(sync, regions, chosen)
        case job.DiLoCo():
            return _merging(sync, regions, chosen, Outer(sync.outer_lr, sync.outer_momentum))
        case job.Streaming():
            merging = _merging(sync, regions, chosen, Outer(sync.outer_lr, sync.outer_momentum))
            return replace(merging, turns=sync.fragments, tau=chosen.overlap_steps, alpha=sync.mix)
        case job.Delayed():
            outer = Outer(sync.outer_lr, sync.outer_momentum, nesterov=False, clip=sync.momentum_clip)
            return replace(_merging(sync, regions, chosen, outer), tau=None, penalty=sync.staleness_penalty)
        case _:
            assert_never(sync)


def _merging(sync: job.Merged, regions: int, chosen: Chosen, outer: Outer = AVERAGE) -> Merging:
    shards = regions if sync.topology == "owners" else 1
    return Merging(chosen.every, outer, shards=shards, rule=sync.merge, quorum=sync.quorum, grace_s=chosen.grace_s)
