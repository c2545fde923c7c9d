"""A region's part of a run, and the barrier between segments."""

from collections.abc import Mapping

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from geotrain.partition.orders import SeatTaken, SegmentDone
from geotrain.run import Run
from tasks import artifacts


@task(task_run_name="provision[{region}]", cache_policy=NO_CACHE)
def provision(run: Run, region: str) -> SeatTaken | None:
    if (taken := run.provision(region)) is None:
        get_run_logger().warning("%s: no seat", region)
        return None
    get_run_logger().info("%s: leader %s on %s, dashboard %s", region, taken.worker, taken.device, run.partitions[region].cluster.dashboard)
    return taken


@task(task_run_name="train_partition[{region}] {segment}/{run.segments}", cache_policy=NO_CACHE)
def train_partition(run: Run, region: str, segment: int) -> SegmentDone | None:
    done = run.train(region, segment)
    if done is None:
        get_run_logger().warning("%s: away; the others ended the segment without it", region)
        return None
    loss = f"{done.loss:.4f}" if done.loss is not None else "-"
    get_run_logger().info(
        "%s: to round %d, %d samples, loss %s, waited %.1f of %.1f s", region, done.round, done.samples, loss, done.held_s, done.seconds
    )
    artifacts.progress(run.id, run.job.name, region, 100 * segment / run.segments)
    return done


@task(task_run_name="synchronize {segment}/{run.segments}", cache_policy=NO_CACHE)
def synchronize(run: Run, segment: int, parts: list[SegmentDone | None]) -> bool:
    over = run.synchronize(segment, parts)
    get_run_logger().info("round %d committed; held out: %s", run.round, run.metrics)
    if links := run.board.snapshot()["links"]:
        artifacts.links(run.job.name, links, f"{run.id}: what every directed link carried until round {run.round}")
    return over


@task(task_run_name="merge_fully[{region}]", cache_policy=NO_CACHE)
def merge_fully(run: Run, region: str) -> str:
    return run.merge_fully(region)


@task(task_run_name="evaluate[{region}]", cache_policy=NO_CACHE)
def evaluate(run: Run, region: str) -> Mapping[str, tuple[float, float]]:
    sums = run.evaluate(region)
    get_run_logger().info("%s: %s", region, sums)
    return sums
