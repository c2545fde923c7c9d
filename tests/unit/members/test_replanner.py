"""A plan is made again for the regions that belong to the run, and only where workers change."""

from pathlib import Path

import pytest

from geotrain.members.replanner import Replanner, workers_of
from geotrain.partition.partition import Control
from geotrain.report.folder import RunFolder
from tests.making import points_job
from tests.unit.plan.test_planner import cpu, data, job, make_plan


@pytest.fixture
def replanner(tmp_path: Path) -> Replanner:
    folder = RunFolder.create(points_job(tmp_path), "r")
    return Replanner(job(elastic={"speed_margin": 2.0, "speed_for_s": 1.0}), Control("r"), folder)


def slow(region: str, speed: float) -> dict[str, object]:
    return {"rounds": [{"samples": 100, "compute_s": 100 / speed}] * 100}


SPEC = job(
    regions=[
        {"name": name, "data": {"train": name}, "devices": [{"count": count}]} for name, count in (("paris", 1), ("tokyo", 4), ("lima", 1))
    ]
)
INVENTORY = data(paris=400, tokyo=400, lima=400)
PLAN = make_plan(SPEC, INVENTORY, {"paris": [cpu(1)], "tokyo": [cpu(4)], "lima": [cpu(1)]}, 1000)


def test_a_region_that_has_become_slow_gets_more_workers(replanner: Replanner) -> None:
    assert workers_of(PLAN) == {"paris": 1, "tokyo": 1, "lima": 1}
    replanner.heard("tokyo", slow("tokyo", 3.0), SPEC, PLAN)
    assert replanner.control.turn.is_set()
    assert replanner.waits
    made = replanner.plan_again(PLAN, SPEC, INVENTORY, 10, 1000, None)
    assert workers_of(made) == {"paris": 1, "tokyo": 4, "lima": 1}
    assert not replanner.waits


def test_a_region_that_has_left_stays_in_the_plan_as_it_was(replanner: Replanner) -> None:
    replanner.heard("tokyo", slow("tokyo", 3.0), SPEC, PLAN)
    there = {name: found for name, found in INVENTORY.items() if name != "lima"}
    made = replanner.plan_again(PLAN, SPEC, there, 10, 1000, None)
    assert made.region("lima") == PLAN.region("lima")
    assert "lima" not in made.view(1, without={"lima"}).regions


def test_where_no_worker_would_help_only_the_speed_is_believed(replanner: Replanner) -> None:
    replanner.heard("paris", slow("paris", 3.0), SPEC, PLAN)
    made = replanner.plan_again(PLAN, SPEC, INVENTORY, 10, 1000, None)
    assert workers_of(made) == workers_of(PLAN)
    assert made.region("paris").samples_per_s == pytest.approx(3.0)
    assert (made.rounds, made.changes) == (PLAN.rounds, ())


def test_a_job_of_one_region_has_nothing_to_plan_again(replanner: Replanner) -> None:
    alone = job(regions=[{"name": "paris", "data": {"train": "paris"}}])
    plan = make_plan(alone, data(paris=400), {"paris": [cpu(1)]}, 1000)
    assert replanner.plan_again(plan, alone, data(paris=400), 10, 1000, None) is plan
