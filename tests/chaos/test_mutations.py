"""Whether the tests can find bugs: the core, broken in one place at a time, must fail them. docs/decisions.md lists these."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from geotrain.sync.agree import FullMerge
from geotrain.sync.feedback import ErrorFeedback
from geotrain.sync.merging import MergeMachine
from geotrain.sync.progress import Progress
from geotrain.sync.pushing import PushMachine
from geotrain.sync.replica import DeltaReplica, MergeReplica
from tests.chaos.invariants import STRATEGIES, combinations, play
from tests.chaos.test_schedules import test_killed_and_resumed_equals_uninterrupted as resumed
from tests.chaos.test_schedules import thetas
from tests.golden.test_trajectories import test_a_trajectory_is_as_it_was as golden
from tests.unit.sync.test_arithmetic import delayed_run
from tests.world import Schedule, make_world

COMBINATIONS = dict(combinations())
SEEDS = 60


@dataclass(frozen=True)
class Mutation:
    """`what` is done wrong, by writing `wrong` for `right` in a method."""

    what: str
    of: type
    method: str
    right: str
    wrong: str
    found_by: Callable[[], Any]


def schedules(*names: str) -> Callable[[], None]:
    """Chaos on these combinations."""

    def run() -> None:
        for seed in range(SEEDS):
            for name in names:
                play(COMBINATIONS[name], seed)

    return run


def weather() -> None:
    one, other = (thetas(STRATEGIES["diloco"], seed) for seed in (0, 3))
    assert all(map(torch.equal, one, other))


def stops() -> None:
    for seed in range(SEEDS):
        world = make_world(STRATEGIES["ma-async-ring"], seed, Schedule(late_s=4.0, stop_at=3.0), regions=5)
        world.segment(40 * world.rounds_per_epoch)
        assert len({node.server.machine.at.round for node in world.there()}) == 1


def delays() -> None:
    delayed_run(1, [2, 5, 3], 5)


MUTATIONS = [
    Mutation(
        "a residual is lost",
        ErrorFeedback,
        "encode",
        "None if self.codec.lossless else vector.sub_(self.codec.decode(payload, vector.numel()))",
        "None",
        schedules("asgd_ga-int4"),
    ),
    Mutation("the sum is not sorted", MergeMachine, "_merge", "tuple(sorted(there))", "tuple(there)", weather),
    Mutation(
        "staleness is off by one",
        PushMachine,
        "_go_on",
        "> self.strategy.max_staleness",
        "> self.strategy.max_staleness + 1",
        schedules("asgd_ga-fp32"),
    ),
    Mutation(
        "a region that joins gets no outer momentum",
        MergeReplica,
        "share",
        "[self.momentum]",
        "[torch.zeros_like(self.momentum)]",
        schedules("diloco-fp32"),
    ),
    Mutation(
        "a copy is applied again", PushMachine, "_applied", "update.round in self.apart[update.origin]", "False", schedules("asgd_ga-fp32")
    ),
    Mutation(
        "contributions are not sent again to a new owner",
        MergeMachine,
        "_catch_up",
        "out += self._deliver(new)",
        "pass",
        schedules("diloco-fp32"),
    ),
    Mutation(
        "a contribution that came too late is taken for merged",
        MergeMachine,
        "_apply",
        "Return(mine, discount(1))",
        "Settle(mine)",
        schedules("diloco-quorum-fp32"),
    ),
    Mutation(
        "nobody is told that a round is in a later contribution",
        MergeMachine,
        "_contribute",
        "(*self.returned.pop(place[1], ()), at.made())",
        "(self.returned.pop(place[1], ()), at.made())[1:]",
        schedules("diloco-quorum-fp32"),
    ),
    Mutation(
        "nobody is told which rounds a full merge has",
        FullMerge,
        "begin",
        "(*at.lately, *([at.made()] if at.steps else []), *absent)",
        "()",
        schedules("asgd_ga-fp32"),
    ),
    Mutation(
        "a state is adopted and the round is not", MergeMachine, "_adopt", "self.applied = state.round", "pass", schedules("diloco-fp32")
    ),
    Mutation("steps of a round are not counted for the epoch", Progress, "jump", "self.done += self.steps", "pass", schedules("ma-fp32")),
    Mutation(
        "what others pushed is pushed back",
        DeltaReplica,
        "apply",
        "self.anchor.add_(delta, alpha=weight)",
        "pass",
        schedules("asgd_ga-fp32"),
    ),
    Mutation(
        "a full merge leaves what is pushed next as it was",
        DeltaReplica,
        "apply",
        "self.anchor.copy_(self.local[:n])",
        "pass",
        schedules("asgd-fp32"),
    ),
    Mutation(
        "the sender of a momentum-corrected update moves by what its own optimizer did",
        DeltaReplica,
        "produce",
        "if own is not None:",
        "if False:",
        schedules("asgd_ga-dgc"),
    ),
    Mutation("an old view's updates count", MergeMachine, "_received", "update.epoch != at.view.epoch", "False", schedules("diloco-fp32")),
    Mutation(
        "a wish to stop forgets how far it must travel",
        PushMachine,
        "_push",
        "diameter(strategy.topology, at.view) * ",
        "",
        stops,
    ),
    Mutation(
        "what was merged in the old view is kept in the new",
        MergeMachine,
        "_change_view",
        "self.merged.clear()",
        "pass",
        schedules("diloco-owners-fp32"),
    ),
    Mutation(
        "a merge is used a step late",
        MergeMachine,
        "_is_due",
        "at.steps >= min(tau, at.quota)",
        "at.steps > min(tau, at.quota - 1)",
        lambda: golden("streaming"),
    ),
    Mutation(
        "a round goes on without its quorum",
        MergeMachine,
        "_merge_if_complete",
        "len(there) < quorum",
        "False",
        schedules("diloco-quorum-fp32"),
    ),
    Mutation(
        "a checkpoint leaves out the owner's residual",
        MergeReplica,
        "state",
        'kept |= {f"down.{number}.{name}": tensor for name, tensor in self.down[number].state().items()}',
        "pass",
        lambda: resumed("diloco-int4"),
    ),
    Mutation(
        "the sum that EControl applies is carried into a new view",
        MergeReplica,
        "new_view",
        "self.integral.clear()",
        "pass",
        schedules("diloco-econtrol"),
    ),
    Mutation("what is under way is contributed again", MergeReplica, "produce", "delta.sub_(moved)", "pass", delays),
    Mutation("a delayed round begins from theta alone", MergeReplica, "_begin", "self._ahead(number)", "[]", delays),
]


def broken(mutation: Mutation) -> Any:
    """The method, compiled again with the change."""
    method = inspect.getattr_static(mutation.of, mutation.method)
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(mutation.right) == 1, f"{mutation.method} no longer says: {mutation.right}"
    space = dict(inspect.getmodule(mutation.of).__dict__)
    exec(source.replace(mutation.right, mutation.wrong), space)
    return space[mutation.method]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_broken_core_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.found_by()
    monkeypatch.setattr(mutation.of, mutation.method, broken(mutation))
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        mutation.found_by()


def test_the_decisions_list_them() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs/decisions.md").read_text().split())
    assert [mutation.what for mutation in MUTATIONS if mutation.what not in text] == []
