import math
from typing import Any

import pytest
import torch
from torch import Tensor

from geotrain.errors import StateDamaged
from geotrain.sync.messages import Adopt, Apply, Kind, Merge, Produce, SegmentBegins, Send, Update, View
from geotrain.sync.strategy import Merging, Pushing
from tests.world import World


def begun(strategy: Merging | Pushing) -> World:
    world = World(strategy, {"lima": 2, "oslo": 2}, 1, seed=1)
    world.nodes["lima"].server.handle(SegmentBegins(1, 0.0))
    return world


@pytest.mark.parametrize("strategy", [Merging(every=2), Pushing("delta", 2, 1)], ids=["merge", "push"])
@pytest.mark.parametrize("sick", ["loss", "parameters"])
def test_nothing_of_a_round_that_went_wrong_leaves_the_region(strategy: Merging | Pushing, sick: str) -> None:
    world = begun(strategy)
    server = world.nodes["lima"].server
    server.step_done(3, torch.tensor(0.5))
    if sick == "parameters":
        server.replica.local[0] = math.inf
    with pytest.raises(FloatingPointError):
        server.step_done(3, torch.tensor(math.nan if sick == "loss" else 0.5))
    assert not world._calendar


STRATEGIES = [Merging(every=2), Merging(every=2, tau=None), Pushing("delta", 2, 1), Pushing("parameters", 2, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["merge", "delayed", "push", "mix"])
def test_a_round_that_went_wrong_is_void_and_the_next_begins_where_it_began(strategy: Merging | Pushing) -> None:
    world = begun(strategy)
    server = world.nodes["lima"].server
    server.bad_rounds = 2
    told: list[tuple[str, dict[str, Any]]] = []
    closed = []
    server.event, server.report = lambda name, facts: told.append((name, facts)), closed.append
    before = server.replica.local.clone()
    server.stepped(3, torch.tensor(0.5))
    server.replica.local[0] = math.nan
    server.stepped(3, torch.tensor(0.5))
    assert told == [("void_round", {"round": 0, "in_a_row": 1})]
    assert torch.equal(server.replica.local, before)
    assert [(record.samples, record.steps) for record in closed] == [(0, 2)], "counts for nothing"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("kind", [Kind.STATE, Kind.AGREED])
def test_what_a_region_is_brought_up_to_date_with_is_verified_by_its_hash(kind: Kind, damaged: bool) -> None:
    world = begun(Merging(every=2) if kind is Kind.STATE else Pushing("delta", 2, 1))
    giver, taker = (world.nodes[name].server for name in ("lima", "oslo"))
    sent: list[Tensor] = []
    giver.transport.send = lambda to, update, payload: sent.append(payload)  # type: ignore[method-assign]
    update, own = Update(kind, 1, "lima", 0), Update(Kind.REPLICA, 1, "lima", 0, samples=1)
    if kind is Kind.AGREED:
        giver._carry_out(Produce(own), [], None)
        giver._carry_out(Merge(update, (own,)), [], None)
    giver._carry_out(Send(update, "oslo"), [], None)
    (payload,) = sent
    if damaged:
        payload[5] ^= 1
    taker._payloads[update.key] = payload
    use = Adopt(update) if kind is Kind.STATE else Apply(update, 1.0, 0)
    if damaged:
        with pytest.raises(StateDamaged, match="region lima gave"):
            taker._carry_out(use, [], None)
    else:
        taker._carry_out(use, [], None)
        assert torch.equal(taker.replica.local, giver.replica.local)


@pytest.mark.parametrize("view_changes", [False, True])
def test_a_rounds_loss_is_its_mean_by_rows(view_changes: bool) -> None:
    """Of all its rows, also where a view began in mid-round."""
    seen = []
    world = begun(Pushing("delta", 2, 1))
    server = world.nodes["lima"].server
    server.report = seen.append
    server.machine.at.until = 5
    server.step_done(1, torch.tensor(4.0))
    if view_changes:
        server.change_view(View(world.view.epoch + 1, ("lima",), ("lima",)))
    server.step_done(3, torch.tensor(2.0))
    assert [(record.samples, record.loss) for record in seen] == [(4, 2.5)]


def test_what_is_wrong_as_a_view_changes_is_void_and_the_rest_a_round_of_its_own() -> None:
    """The mean that the view begins with has none of it; what is made of the round afterwards would be called void with it, or it good."""
    world = begun(Pushing("delta", 2, 1))
    server, closed = world.nodes["lima"].server, []
    server.report, server.bad_rounds, before = closed.append, 2, server.replica.local.clone()
    server.machine.at.until = 5
    server.replica.local[0] = math.nan
    server.stepped(3, torch.tensor(0.5))
    server.change_view(View(world.view.epoch + 1, ("lima",), ("lima",)))
    assert torch.equal(server.replica.local, before)
    assert [(record.round, record.samples, record.steps) for record in closed] == [(0, 0, 1)]
    assert (server.machine.at.round, server.machine.at.steps) == (1, 0)
