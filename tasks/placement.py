"""Where the data is, and what to do about it."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from geotrain.data.inventory import Inventory
from geotrain.partition.orders import Probed
from geotrain.plan.planner import Plan
from geotrain.run import Run
from tasks import artifacts


@task(task_run_name="analyze_locality[{region}]", cache_policy=NO_CACHE)
def analyze_locality(run: Run, region: str) -> Inventory:
    found = run.analyze(region)
    get_run_logger().info("%s: %d rows in %d files (%d bytes)", region, found.rows, len(found.shards), found.bytes)
    return found


@task(task_run_name="probe[{region}]", cache_policy=NO_CACHE)
def probe(run: Run, region: str) -> Probed | None:
    measured = run.probe(region)
    if measured is not None:
        get_run_logger().info("%s: %.0f samples/s on one %s", region, measured.samples_per_s, measured.device)
    return measured


@task(task_run_name="schedule", cache_policy=NO_CACHE)
def schedule(run: Run) -> Plan:
    plan = run.schedule()
    rows = [
        {
            "region": region.region,
            "rows": region.rows,
            "bytes": region.bytes,
            "workers": ", ".join(f"{n} {kind}" for kind, n in region.allocation.items()),
            "samples/s": round(region.samples_per_s),
            "s/round": round(region.compute_s, 4),
            "$/round": round(region.usd_per_round, 8),
            "why": region.reason,
        }
        for region in plan.regions
    ]
    words = f"{plan.rounds} rounds of {plan.round_s:.3f} s, {plan.usd:.5f} USD, {plan.wan_bytes} bytes over the WAN (predicted)"
    artifacts.plan(run.job.name, rows, words)
    get_run_logger().info(words)
    return plan
