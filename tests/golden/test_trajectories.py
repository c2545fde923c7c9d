"""Golden trajectories: a change of the core that changes the numbers must say so. WRITE_GOLDEN=1 rewrites them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from geotrain.sync.feedback import coding_of
from geotrain.sync.strategy import strategy_of
from tests.chaos.invariants import CODECS, STRATEGIES
from tests.world import Schedule, World, parse_sync

SYNC = {**STRATEGIES, **{f"diloco-{codec}": {**STRATEGIES["diloco"], **wire} for codec, wire in CODECS.items()}}
FILE = Path(__file__).with_name("trajectories.json")


def trajectory(sync: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Region -> what all agree on (merge), or the parameters (push), after every third round."""
    spec = parse_sync(sync, 3)
    strategy = strategy_of(spec, 3)
    built = World(strategy, {"lima": 12, "oslo": 8, "cairo": 12}, 12 // strategy.steps_per_round, 7, Schedule(), coding_of(spec))
    built.segment(3 * built.rounds_per_epoch)
    return {
        name: [[round(x, 4) for x in after.tolist()[:8]] for r, after in built.after[name].items() if r % 3 == 0] for name in built.names
    }


@pytest.mark.parametrize("name", SYNC)
def test_a_trajectory_is_as_it_was(name: str) -> None:
    now = trajectory(SYNC[name])
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        FILE.write_text(json.dumps({**known, name: now}, indent=None, separators=(",", ":")) + "\n")
        known = {name: now}
    for region, points in known[name].items():
        assert now[region] == [pytest.approx(point, abs=2e-4) for point in points], region
