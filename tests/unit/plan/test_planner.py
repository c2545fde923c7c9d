import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geotrain.data.inventory import Inventory, Shard
from geotrain.job import parse_job
from geotrain.plan import planner
from geotrain.plan.planner import Plan, UpdateSize
from geotrain.plan.power import Offer


def job(**changes: Any) -> Any:
    tree: dict[str, Any] = {
        "name": "x",
        "task": "a:B",
        "regions": [{"name": name, "data": {"train": name}} for name in ("paris", "tokyo")],
        "train": {"batch_size": 1, "epochs": 2},
        "sync": {"strategy": "ma", "every": 10},
        "schedule": {"tolerance": 0.0, "scaling_loss": 0.0},
    }
    return parse_job({**tree, **changes})


def data(**rows: int) -> dict[str, Inventory]:
    return {name: Inventory(name, name, (Shard(name, "e", n, (1,) * n),), {"x": "int64"}) for name, n in rows.items()}


def offers(paris: Offer, tokyo: Offer) -> dict[str, list[Offer]]:
    return {"paris": [paris], "tokyo": [tokyo]}


def make_plan(spec: Any, inventory: Any, offered: Any, payload_bytes: int) -> Plan:
    return planner.make_plan(spec, inventory, offered, UpdateSize(payload_bytes))


def cpu(count: int, usd: float = 1.0, speed: float = 10.0) -> Offer:
    return Offer("cpu", count, usd, speed)


@pytest.mark.parametrize(("ratio", "saving"), [(1.0, 0.0), (1.25, 0.1), (1.5, 1 / 6), (2.0, 0.25), (3.0, 1 / 3)])
def test_two_equal_regions_save_half_of_one_minus_one_over_r(ratio: float, saving: float) -> None:
    """All allocated against matched to the straggler: (1 - 1/r) / 2, exact where the counts divide."""
    inventory = data(paris=int(6000 * ratio), tokyo=6000)
    links = {"mbit_per_s": 1e9, "rtt_ms": 0}
    costs = {
        kind: make_plan(
            job(links=links, schedule={"tolerance": 0.0, "scaling_loss": 0.0, "allocate": kind}), inventory, offers(cpu(60), cpu(60)), 1
        ).usd
        for kind in ("matched", "all")
    }
    assert 1 - costs["matched"] / costs["all"] == pytest.approx(saving, abs=0.01)


def test_the_straggler_keeps_all_it_has_and_the_others_no_more_than_needed() -> None:
    plan = make_plan(job(), data(paris=4000, tokyo=1000), offers(cpu(4), cpu(4)), 1000)
    assert {region.region: region.workers for region in plan.regions} == {"paris": 4, "tokyo": 1}
    assert "straggler" in plan.region("paris").reason
    assert plan.alternatives[0].what == "everything allocated"
    assert plan.alternatives[0].usd > plan.usd


def test_a_region_gets_no_more_workers_than_it_has_row_groups() -> None:
    few = {name: Inventory(name, name, (Shard(name, "e", 90, (30, 30, 30)),), {"x": "int64"}) for name in ("paris", "tokyo")}
    plan = make_plan(job(schedule={"allocate": "all"}), few, offers(cpu(8), cpu(2)), 1000)
    assert {region.region: region.workers for region in plan.regions} == {"paris": 3, "tokyo": 2}


def test_a_merge_rounds_exchange_is_added_and_a_pushs_is_hidden() -> None:
    links = {"mbit_per_s": 8, "rtt_ms": 100}
    inventory, offered = data(paris=1000, tokyo=1000), offers(cpu(1), cpu(1))
    merge = make_plan(job(links=links), inventory, offered, 100_000)
    assert merge.exchange_s == pytest.approx(2 * (0.1 + 0.05))
    assert merge.round_s == pytest.approx(1.0 + 0.3)
    push = make_plan(job(links=links, sync={"strategy": "asgd_ga", "every": 10}), inventory, offered, 100_000)
    assert push.hidden
    assert push.round_s == pytest.approx(1.0)
    assert make_plan(job(links=links, sync={"strategy": "asgd"}), inventory, offered, 1_000_000).round_s == pytest.approx(1.0)


def test_the_owner_is_where_rounds_are_quickest() -> None:
    names = ("paris", "tokyo", "sydney")
    regions = [{"name": name, "data": {"train": name}} for name in names]
    links = {"mbit_per_s": 100, "pairs": {"paris-sydney": {"mbit_per_s": 5}}}
    three = {name: [cpu(1)] for name in names}
    assert make_plan(job(regions=regions, links=links), data(paris=9, tokyo=9, sydney=9), three, 10**6).owner == "tokyo"


def test_egress_is_money() -> None:
    plan = make_plan(job(links={"usd_per_gb": 1.0}), data(paris=100, tokyo=100), offers(cpu(1, usd=0), cpu(1, usd=0)), 5 * 10**8)
    assert plan.usd == pytest.approx(plan.rounds * 1.0)
    assert plan.wan_bytes == plan.rounds * 10**9


def test_timeouts_follow_from_payload_and_link() -> None:
    slow = make_plan(job(links={"mbit_per_s": 5}), data(paris=9, tokyo=9), offers(cpu(1), cpu(1)), 10**8)
    assert slow.give_up_s == pytest.approx(10 * 160, rel=0.01)


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64), st.integers(1, 40), st.floats(0.1, 9))
def test_a_plan_covers_the_epochs_and_survives_json(paris: int, tokyo: int, batch: int, every: int, epochs: float) -> None:
    train = {"batch_size": batch, "epochs": epochs}
    plan = make_plan(job(train=train, sync={"strategy": "ma", "every": every}), data(paris=paris, tokyo=tokyo), offers(cpu(3), cpu(2)), 10)
    assert plan.rounds >= epochs * plan.region("paris").rounds_per_epoch - 1e-6
    assert plan.segment_end(plan.segments) == plan.rounds
    assert plan.segment_end(plan.segments - 1) < plan.rounds or plan.segments == 1
    assert Plan.from_dict(plan.to_dict()) == plan


def test_auto_takes_the_most_bits_that_each_link_carries_in_time() -> None:
    """40 MB in bf16; a round computes 100 s, so one way of a blocking exchange may take 5 s; delayed, 41.7 s."""
    regions = [{"name": name, "data": {"train": name}} for name in ("oslo", "paris", "tokyo")]
    links = {"mbit_per_s": 1000, "rtt_ms": 0, "pairs": {"oslo-paris": {"mbit_per_s": 40, "rtt_ms": 0}, "tokyo>oslo": {"mbit_per_s": 10}}}
    inventory, offer = data(oslo=1000, paris=1000, tokyo=1000), {name: [cpu(1)] for name in ("oslo", "paris", "tokyo")}
    blocking, delayed = (
        make_plan(
            job(regions=regions, links=links, sync={"strategy": strategy, "every": 1000, "codec": "auto"}), inventory, offer, 40_000_000
        )
        for strategy in ("ma", "delayed")
    )
    assert blocking.owner == "paris"
    assert blocking.bits["oslo"].up == (1,)
    assert blocking.bits["tokyo"].up == (0,)
    assert blocking.bits["paris"].down == 1
    assert delayed.bits["oslo"].up == (0,)
    assert Plan.from_dict(json.loads(json.dumps(blocking.to_dict()))) == blocking


def test_what_a_job_leaves_open_is_chosen_by_the_exchange() -> None:
    """10 MB at 80 Mbit/s: 1 s each way. A step of one row takes 0.1 s."""
    links = {"mbit_per_s": 80, "rtt_ms": 0}
    inventory, offer = data(paris=5000, tokyo=5000), offers(cpu(1), cpu(1))

    def chosen(**sync: Any) -> Any:
        return make_plan(job(links=links, sync=sync), inventory, offer, 10_000_000).chosen

    assert chosen(strategy="diloco", every="auto").every == 200, "2 s are a tenth of 20 s"
    assert chosen(strategy="delayed", every="auto").every == 24, "2 s, and a fifth more"
    assert chosen(strategy="asgd_ga", every="auto").every == 12, "a link is busy for 1 s"
    assert chosen(strategy="streaming", every=40, fragments=4).overlap_steps == 6, "a fragment's 0.5 s, and a fifth more"
    assert chosen(strategy="diloco", every=10, quorum=2).grace_s == 0.5


def test_balanced_regions_make_steps_by_their_speed() -> None:
    spec = job(sync={"strategy": "ma", "every": "balanced"}, schedule={"allocate": "all"})
    plan = make_plan(spec, data(paris=900, tokyo=900), offers(cpu(1, speed=30), cpu(1)), 1000)
    per_round = {region.region: region.steps_per_epoch / region.rounds_per_epoch for region in plan.regions}
    assert per_round["paris"] == pytest.approx(3 * per_round["tokyo"], rel=0.1)
    assert plan.region("paris").compute_s == pytest.approx(plan.region("tokyo").compute_s, rel=0.1)


def test_the_bits_that_a_plan_chooses_are_those_that_the_core_has() -> None:
    from geotrain.plan.bits import BYTES_PER_NUMBER
    from geotrain.report.live import CODECS
    from geotrain.sync.codec import BITS, codec_of

    assert CODECS == BITS
    assert [codec_of(name).wire_bytes(10**6) / 10**6 for name in BITS] == pytest.approx(BYTES_PER_NUMBER, rel=0.01)


def regions_of(plan: Plan) -> dict[str, int]:
    return {region.region: region.workers for region in plan.regions}


def test_a_plan_is_made_again_for_a_region_that_comes() -> None:
    inventory, offered = data(paris=400, tokyo=200), offers(cpu(2), cpu(2))
    plan = make_plan(job(train={"batch_size": 1, "epochs": 10}), inventory, offered, 1000)
    wider = job(train={"batch_size": 1, "epochs": 10}).with_region({"name": "lima", "data": {"train": "lima"}})
    per_epoch = plan.regions[0].rounds_per_epoch
    round = 3 * per_epoch + per_epoch // 2
    made = planner.remake(plan, wider, inventory | data(lima=100), {**offered, "lima": [cpu(1)]}, round, 3 * 600 + 300)
    assert regions_of(made) == {**regions_of(plan), "lima": 1}
    (change,) = made.changes
    assert (change.round, change.epoch) == (round, 3)
    assert made.rounds == plan.rounds, "ten epochs end where they did: paris still makes the most steps"
    assert made.usd > plan.usd
    assert made.as_of(round - 1).rounds == plan.rounds


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 30), st.floats(0.05, 20.0), st.floats(0.0, 1.0))
def test_a_plan_made_again_ends_the_epochs_that_were_asked_for(paris: int, tokyo: int, every: int, factor: float, share: float) -> None:
    spec = job(train={"batch_size": 1, "epochs": 3}, sync={"strategy": "ma", "every": every})
    inventory, offered = data(paris=paris, tokyo=tokyo), offers(cpu(4), cpu(4))
    plan = make_plan(spec, inventory, offered, 1000)
    round = int(share * (plan.rounds - 1))
    speeds = planner.offers_of(spec, plan, {"tokyo": plan.region("tokyo").samples_per_s * factor})
    made = planner.remake(plan, spec, inventory, speeds, round, 0)
    assert made.rounds > round
    last = planner._pace_of(made, made.rounds - 1)
    assert last.place(made.rounds - 1) == (2, 1)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_run_by_samples_ends_with_them() -> None:
    spec = job(train={"batch_size": 1, "samples": 6000})
    inventory, offered = data(paris=400, tokyo=200), offers(cpu(2), cpu(2))
    plan = make_plan(spec, inventory, offered, 1000)
    wider = spec.with_region({"name": "lima", "data": {"train": "lima"}})
    made = planner.remake(plan, wider, inventory | data(lima=600), {**offered, "lima": [cpu(4)]}, 10, 3000)
    per_round = 1200 / made.changes[-1].rounds_per_epoch
    assert (made.rounds - 10) * per_round == pytest.approx(3000, abs=per_round)


def test_balanced_regions_keep_their_rounds() -> None:
    spec = job(sync={"strategy": "ma", "every": "balanced"})
    inventory, offered = data(paris=400, tokyo=200), offers(cpu(2), cpu(2, speed=20.0))
    plan = make_plan(spec, inventory, offered, 1000)
    wider = spec.with_region({"name": "lima", "data": {"train": "lima"}})
    made = planner.remake(plan, wider, inventory | data(lima=100), {**offered, "lima": [cpu(1)]}, 1, 0)
    assert [made.region(name).rounds_per_epoch for name in ("paris", "tokyo")] == [r.rounds_per_epoch for r in plan.regions]
    assert (made.rounds, made.changes) == (plan.rounds, ())
