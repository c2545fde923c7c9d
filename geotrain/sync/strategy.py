"""A strategy is a small value: what is sent, how it is merged, which outer optimizer follows."""

from dataclasses import dataclass
from typing import Literal, assert_never

from geotrain import job

Sent = Literal["delta", "parameters"]


def discount(staleness: int) -> float:
    """Weight of a replica computed `staleness` rounds ago: 1 / (1 + staleness) [ours]."""
    assert staleness >= 0, staleness
    return 1 / (1 + staleness)


@dataclass(frozen=True, slots=True)
class Pushing:
    """Send to the neighbours after each round and go on; apply what comes when it comes.

    `delta`: what the optimizer did to the parameters since the last send. For plain SGD that is -lr * (sum of the
    gradients), which is ASGD-GA as published (Cloudless-Training, arXiv 2303.05330); for an optimizer with state the
    delta, unlike the gradient, still adds up.
    `parameters`: the replica itself, mixed in as w = (1 - a) w + a w_i (asynchronous MA).
    """

    sends: Sent
    every: int
    max_staleness: int
    alpha: float | None = None

    def weight(self, staleness: int, regions: int) -> float:
        """The weight with which an update of that staleness is applied."""
        match self.sends:
            case "delta":
                return 1.0
            case "parameters":
                return (self.alpha or 1 / regions) * discount(staleness)
            case _:
                assert_never(self.sends)


@dataclass(frozen=True, slots=True)
class Merging:
    """Agree on a round's contributions; merge pseudo-gradients by samples; all take one outer Nesterov step.

    DiLoCo (arXiv 2311.08105): theta = SGD-Nesterov(theta, mean of theta - theta_i). With outer_lr 1 and momentum 0 it is
    model averaging (MA, arXiv 2303.05330): theta = mean of theta_i.
    """

    every: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0


Strategy = Pushing | Merging

FINAL_MERGE = Merging(every=1)
"""One full merge ends every push run, so that a single agreed model is published (late merging, arXiv 2507.06542)."""


def strategy_of(sync: job.Sync) -> Strategy:
    """The strategy that a job's `sync` section names."""
    match sync:
        case job.AsgdGa():
            return Pushing("delta", sync.every, sync.max_staleness)
        case job.Asgd():
            return Pushing("delta", 1, sync.max_staleness)
        case job.ModelAveraging():
            if sync.mode == "async":
                return Pushing("parameters", sync.every, sync.max_staleness, sync.alpha)
            return Merging(sync.every)
        case job.DiLoCo():
            return Merging(sync.every, sync.outer_lr, sync.outer_momentum)
        case _:
            assert_never(sync)
