"""What comes out of a run."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from geotrain.checkpoint import join, read_bytes
from geotrain.run import Run
from tasks import artifacts


@task(task_run_name="publish", cache_policy=NO_CACHE)
def publish(run: Run) -> str:
    published = run.publish()
    verdict = f"version {published[0].number}, {published[1]}" if published else "no registry in the job: the model lies in the run folder"
    get_run_logger().info(verdict)
    return verdict


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(run: Run) -> dict[str, Any]:
    summary = run.report()
    artifacts.report(run.job.name, read_bytes(join(run.folder.url, "report.md")).decode())
    return summary
