"""A link that is not what the plan believed: noticed, and answered with another H and other bits."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geotrain.partition.adapt import BitsAdapter
from geotrain.plan.bits import Bits
from geotrain.plan.planner import Plan, replan
from geotrain.plan.watch import LinkWatch, SpeedWatch
from geotrain.sync.pace import Pace, pace_since
from geotrain.sync.strategy import strategy_of
from geotrain.wan.transport import LinkTraffic
from tests.unit.plan.test_planner import cpu, data, job, make_plan, offers

LINKS = {"mbit_per_s": 100, "rtt_ms": 0}


def planned(epochs: float = 3, **sync: Any) -> tuple[Any, Plan]:
    spec = job(
        sync={"strategy": "delayed", "every": "auto", **sync},
        links=LINKS,
        train={"batch_size": 1, "epochs": epochs},
        schedule={"tolerance": 0.0, "scaling_loss": 0.0, "segment_rounds": 10},
    )
    return spec, make_plan(spec, data(paris=1000, tokyo=600), offers(cpu(1), cpu(1)), 5_000_000)


def slow(spec: Any, mbit: float) -> Any:
    return spec.with_links({"paris>tokyo": (mbit, 0), "tokyo>paris": (mbit, 0)})


def test_h_follows_the_links_and_comes_back() -> None:
    spec, plan = planned()
    there = replan(plan, slow(spec, 20), 7)
    back = replan(there, slow(spec, 100), 11)
    assert there.chosen.every == pytest.approx(5 * plan.chosen.every, abs=5)
    assert back.chosen.every == plan.chosen.every
    assert there.rounds < plan.rounds
    assert there.exchange_s == pytest.approx(5 * plan.exchange_s, rel=0.01)
    assert replan(plan, slow(spec, 90), 7) is plan, "a little is not worth a segment"
    assert Plan.from_dict(json.loads(json.dumps(back.to_dict()))) == back


def test_a_run_that_goes_back_forgets_the_changes_that_came_later() -> None:
    spec, plan = planned()
    there = replan(plan, slow(spec, 20), 7)
    back = replan(there, slow(spec, 100), 11)
    assert back.as_of(11) is back
    assert (back.as_of(9).rounds, back.as_of(9).chosen) == (there.rounds, there.chosen)
    assert (back.as_of(3).rounds, back.as_of(3).chosen, back.as_of(3).changes) == (plan.rounds, plan.chosen, ())


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([5.0, 20.0, 100.0, 400.0])), max_size=5), st.sampled_from([1, 2, 3]))
def test_every_region_makes_the_steps_of_its_epochs_whenever_h_changes(changes: list[tuple[int, float]], epochs: int) -> None:
    spec, plan = planned(epochs)
    steps = {"paris": 1000, "tokyo": 600}
    made, done, round = dict.fromkeys(steps, 0), dict.fromkeys(steps, 0), 0
    coming = list(changes)
    until = coming[0][0] if coming else -1
    while round < plan.rounds:
        if round == until:
            plan = replan(plan, slow(spec, coming.pop(0)[1]), round)
            until = round + coming[0][0] if coming else -1
        change = plan.change_at(round)
        for name, total in steps.items():
            pace = (
                pace_since(change, lambda epoch, n=total: n)
                if change
                else Pace(plan.region(name).rounds_per_epoch, lambda epoch, n=total: n)
            )
            count = pace.steps(round, done[name])
            assert count >= 0
            made[name] += count
            done[name] = 0 if pace.epoch(round + 1) != pace.epoch(round) else done[name] + count
        round += 1
    assert made == {name: epochs * total for name, total in steps.items()}


def traffic(updates: int, mbit: float) -> dict[str, Any]:
    return {"updates": updates, "bytes_per_s": mbit * 1e6 / 8}


def test_a_link_has_changed_when_two_updates_say_so() -> None:
    spec, _ = planned()
    watch = LinkWatch(spec)
    assert watch.heard("paris", {"tokyo": traffic(1, 95)}) == []
    assert watch.heard("paris", {"tokyo": traffic(2, 20)}) == []
    assert watch.heard("paris", {"tokyo": traffic(2, 20)}) == [], "the same update"
    assert watch.heard("paris", {"tokyo": traffic(3, 90)}) == []
    assert watch.heard("paris", {"tokyo": traffic(4, 20)}) == []
    assert watch.heard("paris", {"tokyo": traffic(5, 21)}) == [{"to": "tokyo", "mbit_per_s": [100.0, 21.0]}]
    assert watch.heard("paris", {"tokyo": traffic(6, 19)}) == []
    assert watch.measured() == {"paris>tokyo": (21.0, 0.0)}
    assert watch.heard("paris", {"tokyo": {"updates": 7, "bytes_per_s": 0.0}}) == []


def test_bits_follow_the_links_after_two_rounds() -> None:
    spec, plan = planned(codec="auto")
    strategy = strategy_of(spec.sync, 2, plan.chosen)
    elements = 1_000_000
    links = {"paris": LinkTraffic(bytes_per_s=100e6 / 8, rtt_s=0.001)}
    adapter = BitsAdapter(spec, "tokyo", strategy, plan.view(0), tuple(plan.shares.values()), Bits((0,), 0), elements)
    compute_s = 0.5  # 208 ms for one way: 2.6 MB at 100 Mbit/s
    assert adapter.after_round(links, compute_s) is None
    assert adapter.after_round(links, compute_s) is None
    links["paris"].bytes_per_s = 45e6 / 8
    assert adapter.after_round(links, compute_s) is None
    assert adapter.after_round(links, compute_s) == Bits((1,), 0)
    links["paris"].bytes_per_s = 10e6 / 8
    assert adapter.after_round(links, compute_s) is None
    assert adapter.after_round(links, compute_s) == Bits((2,), 0)
    assert "10 Mbit/s" in adapter.why
    links["paris"].bytes_per_s = 100e6 / 8
    assert [adapter.after_round(links, compute_s) for _ in range(3)] == [None, Bits((0,), 0), None]


def test_without_codec_auto_nothing_is_chosen() -> None:
    spec, plan = planned()
    strategy = strategy_of(spec.sync, 2, plan.chosen)
    adapter = BitsAdapter(spec, "tokyo", strategy, plan.view(0), tuple(plan.shares.values()), None, 10)
    assert adapter.after_round({"paris": LinkTraffic(bytes_per_s=1.0)}, 1.0) is None


def rounds(*speeds: float, samples: int = 100) -> list[dict[str, Any]]:
    return [{"samples": samples, "compute_s": samples / speed} for speed in speeds]


def test_a_speed_counts_once_every_round_has_said_so_for_long_enough() -> None:
    watch = SpeedWatch(2.0, 10.0)
    assert watch.heard("tokyo", 100.0, rounds(*[40.0] * 3)) is None, "7.5 s"
    assert watch.heard("tokyo", 100.0, rounds(40.0)) == pytest.approx(40.0)
    assert watch.heard("tokyo", 40.0, rounds(*[40.0] * 100)) is None, "it is believed by now"


def test_a_round_that_is_as_planned_begins_the_count_anew() -> None:
    watch = SpeedWatch(2.0, 10.0)
    assert watch.heard("tokyo", 100.0, rounds(*[40.0] * 3, 90.0, *[40.0] * 3)) is None
    assert watch.heard("tokyo", 100.0, rounds(*[300.0] * 29)) is None, "faster is not slower"
    assert watch.heard("tokyo", 100.0, rounds(300.0, 300.0)) == pytest.approx(300.0)


def test_a_round_that_says_nothing_of_speed_counts_for_nothing() -> None:
    watch = SpeedWatch(2.0, 1.0)
    void, first = {"samples": 0, "compute_s": 50.0}, {"samples": 100, "compute_s": None}
    assert watch.heard("tokyo", 100.0, [void, first] * 10) is None
