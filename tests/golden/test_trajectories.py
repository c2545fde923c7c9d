"""Golden trajectories: a change of the core that changes the numbers must say so. WRITE_GOLDEN=1 rewrites them."""

import json
import os
from pathlib import Path

import pytest

from geotrain.job import parse_job
from geotrain.sync.strategy import strategy_of
from tests.world import Faults, World

FILE = Path(__file__).with_name("trajectories.json")
SYNC = {
    "asgd": {"strategy": "asgd"},
    "asgd_ga": {"strategy": "asgd_ga", "every": 4},
    "ma": {"strategy": "ma", "every": 4},
    "ma-async": {"strategy": "ma", "every": 4, "mode": "async"},
    "diloco": {"strategy": "diloco", "every": 4},
    "diloco-bf16": {"strategy": "diloco", "every": 4, "codec": "bf16"},
}


def trajectory(sync: dict[str, object]) -> dict[str, list[list[float]]]:
    """Region -> parameters after every third round."""
    job = parse_job({"name": "g", "task": "a:B", "regions": [{"name": "a", "data": {"train": "t"}}], "train": {"epochs": 1}, "sync": sync})
    built = World(
        strategy_of(job.sync), {"lima": 12, "oslo": 8, "cairo": 12}, 12 // getattr(job.sync, "every", 1), 7, Faults(), job.sync.codec
    )
    built.segment(3 * (12 // getattr(job.sync, "every", 1)))
    return {name: [[round(x, 5) for x in after.tolist()] for r, after in built.after[name].items() if r % 3 == 0] for name in built.names}


@pytest.mark.parametrize("name", SYNC)
def test_a_trajectory_is_as_it_was(name: str) -> None:
    now = trajectory(SYNC[name])
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("WRITE_GOLDEN"):
        FILE.write_text(json.dumps({**known, name: now}, indent=None, separators=(",", ":")) + "\n")
        known = {name: now}
    for region, points in known[name].items():
        assert now[region] == [pytest.approx(point, abs=2e-5) for point in points], region
