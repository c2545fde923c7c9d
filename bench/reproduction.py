"""What the abstract of Cloudless-Training (arXiv 2303.05330) claims, with our implementation: writes docs/reproduction.md.

Part one: ASGD, ASGD-GA(f) and MA(f), and the best that we have, on three shapes of work over 100 Mbit/s and 30 ms. Time and bytes come from
the simulator with models of full size; the final metric from real training on the same virtual clock. Part two: elastic scheduling.
"""

import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from bench.measure import ROOT, write
from bench.virtual import CLICKS, DIGITS, IMAGES, Work, job_of, outcome_of
from geotrain.data.inventory import Inventory, Shard
from geotrain.job import parse_job
from geotrain.plan.planner import Plan, UpdateSize, make_plan
from geotrain.plan.power import Offer, allocations, compute
from geotrain.simulate.simulation import Outcome

DOC = ROOT / "docs" / "reproduction.md"
REGIONS = 2
FREQUENCIES = (1, 2, 4, 8, 16)
NO_WAN = {"mbit_per_s": 1e6, "rtt_ms": 0}
DELAYED = {"strategy": "delayed", "outer_lr": 1.0, "outer_momentum": 0.0}
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.3}
OURS: dict[str, tuple[dict[str, Any], float]] = {
    "diloco 16, int8": ({"strategy": "diloco", "every": 16, **OUTER, "codec": "int8"}, 1.0),
    "delayed 16": ({**DELAYED, "every": 16}, 1.0),
    "delayed 16, int8": ({**DELAYED, "every": 16, "codec": "int8"}, 1.0),
    "delayed 16, sparseloco": ({**DELAYED, "every": 16, "codec": "sparseloco"}, 1.0),
    "delayed 64, e3m0": ({**DELAYED, "every": 64, "codec": "e3m0"}, 1.0),
    "delayed auto, int8": ({**DELAYED, "every": "auto", "codec": "int8"}, 1.0),
    "streaming 64, e3m0": (
        {
            "strategy": "streaming",
            "every": 64,
            "fragments": 2,
            "overlap_steps": 30,
            **OUTER,
            "codec": "e3m0",
        },
        1.0,
    ),
}


@dataclass(frozen=True)
class Shape:
    """A work to train really, and one of full size, without data, to reckon time and bytes with."""

    work: Work
    lr: float
    """Factor on the learning rate of pushes."""
    timed: Work
    model_mb: float | None
    says: str


SHAPES = {
    "LeNet": Shape(DIGITS, 0.5, replace(DIGITS, rows=30_000, samples=240_000), None, "62 thousand parameters, 0.55 ms a step"),
    "ResNet-18": Shape(
        replace(IMAGES, samples=18_000),
        0.3,
        replace(IMAGES, batch_size=32, samples_per_s=110.0, rows=25_000, samples=50_000),
        44.8,
        "11.2 million parameters, 290 ms a step; the metric is that of a quarter of its width",
    ),
    "DeepFM": Shape(
        CLICKS,
        0.5,
        replace(CLICKS, rows=200_000, samples=400_000),
        None,
        "74 thousand parameters, nearly all embeddings, 1.6 ms a step; a lower log loss is better",
    ),
}


def rows_of(lr: float) -> dict[str, tuple[dict[str, Any], float]]:
    """Name -> (sync section, factor on the learning rate)."""
    rows: dict[str, tuple[dict[str, Any], float]] = {
        "ASGD, blocking": ({"strategy": "ma", "every": 1}, 1.0),
        "ASGD": ({"strategy": "asgd"}, lr),
    }
    rows |= {f"ASGD-GA({f})": ({"strategy": "asgd_ga", "every": f}, lr) for f in FREQUENCIES}
    rows |= {f"MA({f})": ({"strategy": "ma", "every": f}, 1.0) for f in FREQUENCIES}
    rows |= {f"MA({f}), async": ({"strategy": "ma", "mode": "async", "every": f}, 1.0) for f in FREQUENCIES}
    return rows | OURS


def measure(shape: Shape, pool: ProcessPoolExecutor) -> dict[str, Any]:
    job_of(shape.work, REGIONS, {"strategy": "asgd"})  # makes the data, once
    job_of(shape.work, 1, {"strategy": "ma", "every": 16})
    found = {name: pool.submit(row, shape, *facts) for name, facts in rows_of(shape.lr).items()}
    single = pool.submit(trained, shape.work, 1, {"strategy": "ma", "every": 16}, 1.0)
    no_wan = timed(shape, {"strategy": "ma", "every": 16}, links=NO_WAN)
    for name, future in found.items():
        print(f"{shape.work.example:8} {name:24} {future.result()}", flush=True)
    rows = {name: future.result() for name, future in found.items()}
    return {"rows": rows, "no_wan_s": round(no_wan.seconds, 2), "single_site": single.result()}


def row(shape: Shape, sync: dict[str, Any], lr: float) -> dict[str, float]:
    reckoned = timed(shape, sync)
    return {
        "seconds": round(reckoned.seconds, 2),
        "megabytes": round(reckoned.wan_bytes / 1e6, 1),
        "metric": trained(shape.work, REGIONS, sync, lr),
    }


def timed(shape: Shape, sync: dict[str, Any], **more: Any) -> Outcome:
    simulate = {"step_spread": 0.02, **({"model_mb": shape.model_mb} if shape.model_mb else {})}
    return outcome_of(job_of(shape.timed, REGIONS, sync, assumed=True, simulate=simulate, **more), real=False)


def trained(work: Work, regions: int, sync: dict[str, Any], lr: float) -> float:
    return round(outcome_of(job_of(work, regions, sync, lr=lr)).metrics[work.metric], 4)


def elastic() -> list[dict[str, Any]]:
    """Cost and waiting with everything allocated, and matched to the straggler."""
    found = []
    for regions, ratio, power in itertools.product((2, 3, 4, 8), (1.0, 1.25, 1.5, 2.0, 3.0), (1, 2, 4)):
        names = [f"r{i}" for i in range(regions)]
        rows = {name: round(24_000 * (ratio if name == "r0" else 1.0)) for name in names}
        speeds = {name: 10.0 * (1 if name == "r0" else power) for name in names}
        offers = {name: [Offer("gpu", 12, 1.0, speeds[name])] for name in names}
        plans = {kind: plan_of(kind, rows, offers) for kind in ("all", "matched")}
        case = {"regions": regions, "data": ratio, "power": power}
        for kind, plan in plans.items():
            case[f"{kind}_usd"] = round(plan.usd, 4)
            case[f"{kind}_waiting"] = round(sum(1 - region.compute_s / plan.round_s for region in plan.regions) / regions, 4)
        case["saved"] = round(1 - plans["matched"].usd / plans["all"].usd, 4)
        case["best"] = round(1 - cheapest_usd(rows, offers) / plans["all"].usd, 4)
        found.append(case)
    return found


def plan_of(allocate: str, rows: dict[str, int], offers: dict[str, list[Offer]]) -> Plan:
    tree = {
        "name": "elastic",
        "task": "a:B",
        "regions": [{"name": name, "data": {"train": name}} for name in rows],
        "links": {"mbit_per_s": 1e6, "rtt_ms": 0},
        "train": {"batch_size": 10, "epochs": 1},
        "sync": {"strategy": "ma", "every": 50},
        "schedule": {"allocate": allocate, "tolerance": 0.0, "scaling_loss": 0.0},
    }
    inventory = {name: Inventory(name, name, (Shard(name, "e", n, (n // 100,) * 100),), {}) for name, n in rows.items()}
    return make_plan(parse_job(tree), inventory, offers, UpdateSize(1))


def cheapest_usd(rows: dict[str, int], offers: dict[str, list[Offer]]) -> float:
    """The exact optimum: of all joint allocations that take no longer than everything allocated the cheapest, by exhaustion.

    Regions wait for each other, so a region's allocation matters to the others only through the longest time: for every candidate of
    that time the cheapest allocation of each region that keeps it.
    """
    times = {name: {a: rows[name] / compute(offers[name], a, 0.0) for a in allocations(offers[name])} for name in rows}
    longest = max(min(of.values()) for of in times.values())
    candidates = sorted({t for of in times.values() for t in of.values() if t <= longest * (1 + 1e-9)} | {longest})
    best = float("inf")
    for t in candidates:
        if all(min(of.values()) <= t * (1 + 1e-9) for of in times.values()):
            price = sum(min(sum(a) for a, took in of.items() if took <= t * (1 + 1e-9)) for of in times.values())
            best = min(best, t * price / 3600)
    return best


def document(results: dict[str, Any]) -> str:
    lines = [
        "# Reproduction of Cloudless-Training's abstract",
        "",
        "Made by `python -m bench.reproduction`. Theirs is what the abstract of arXiv 2303.05330 says: training cost lower by 9.2 to",
        "24.0 % through elastic scheduling, and up to 1.7 times the speed of the baseline through ASGD-GA and model averaging. Everything",
        "else on this page is ours: two regions, 100 Mbit/s, 30 ms; time and bytes on the simulator's virtual clock with models of full",
        "size, the final metric from real training on that clock; `bench/prediction` says how far the clock can be trusted. One run",
        "each, one seed. Pushes take half the learning rate (ResNet: 0.3 of it), since deltas of two regions add up. Speeds of devices are",
        "about those of one core of the machine that bench/overhead ran on. Without WAN: `ma` over links of 1 Tbit/s and 0 ms. The runs",
        "that end with a full merge count its time. Less is trained on than is timed: a round is an epoch at most, 45 steps for",
        "digits, so its rows with H = 64 train with 45; with `auto` the plan chooses H for each.",
        "",
        "## Speed",
        "",
    ]
    for name, found in results["shapes"].items():
        lines += _shape_table(name, found)
    lines += [
        "## Elastic scheduling",
        "",
        "Everything allocated against matched to the straggler; twelve devices a region at most, tolerance 0. The first region has `data`",
        "times the rows of each other region, whose devices have `power` times the speed of its own. *best* is the exact optimum that",
        "takes no longer. For two equal regions the saving is (1 - 1/r) / 2 where the counts divide.",
        "",
        "| regions | data | power | saved | best | (1 - 1/r) / 2 | waiting, all | waiting, matched |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["elastic"]:
        r = case["data"]
        formula = f"{100 * (1 - 1 / r) / 2:.1f} %" if case["regions"] == 2 and case["power"] == 1 else ""
        lines.append(
            f"| {case['regions']} | {r:g} : 1 | 1 : {case['power']} | {100 * case['saved']:.1f} % | {100 * case['best']:.1f} % | {formula} "
            f"| {100 * case['all_waiting']:.1f} % | {100 * case['matched_waiting']:.1f} % |"
        )
    return "\n".join([*lines, ""])


def _shape_table(name: str, found: dict[str, Any]) -> list[str]:
    shape, rows = SHAPES[name], found["rows"]
    base = rows["ASGD"]["seconds"]
    lines = [
        f"### {name}: {shape.says}",
        "",
        f"Timed: {shape.timed.samples:,} samples, {shape.timed.rows:,} rows in each region; trained on: {shape.work.samples:,} samples; "
        f"without WAN {found['no_wan_s']} s; "
        f"{shape.work.metric} of single-site training on as many samples {found['single_site']:.3f}.",
        "",
        f"| | seconds | times ASGD | of the speed without WAN | MB | final {shape.work.metric} |",
        "|---|---|---|---|---|---|",
    ]
    for row, values in rows.items():
        lines.append(
            f"| {row} | {values['seconds']:.1f} | {base / values['seconds']:.1f} | {found['no_wan_s'] / values['seconds']:.2f} "
            f"| {values['megabytes']:,.0f} | {values['metric']:.3f} |"
        )
    return [*lines, ""]


def main() -> None:
    wanted = sys.argv[1:] or [*SHAPES, "elastic"]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shapes = {name: measure(SHAPES[name], pool) for name in wanted if name in SHAPES}
    results = {"shapes": shapes, "elastic": elastic() if "elastic" in wanted else []}
    if sys.argv[1:]:
        print(document(results))
        return
    write("reproduction", results)
    DOC.write_text(document(results))


if __name__ == "__main__":
    main()
