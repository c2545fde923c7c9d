import math

import pytest
import torch

from geotrain.sync.messages import SegmentBegins
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


def test_a_rounds_loss_is_its_mean_by_rows() -> None:
    seen = []
    world = begun(Pushing("delta", 2, 1))
    server = world.nodes["lima"].server
    server.report = seen.append
    server.machine.at.until = 5
    server.step_done(1, torch.tensor(4.0))
    server.step_done(3, torch.tensor(2.0))
    assert [(record.samples, record.loss) for record in seen] == [(4, 2.5)]
