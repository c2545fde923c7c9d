"""geotrain-plan: look and decide, but train nothing."""

from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.conduct import AsTasks, named_after_job, stops_in_order
from flows.train import MOST_REGIONS, ended
from geotrain.errors import Stopped
from geotrain.job import load_job
from geotrain.run import Run, locate_and_plan, taken_over


@flow(name="geotrain-plan", flow_run_name=named_after_job, task_runner=ThreadPoolTaskRunner(max_workers=MOST_REGIONS))
def geotrain_plan(job: str, overrides: dict[str, Any] | None = None, run: str = "") -> Any:
    """Analyse where the data is and how fast the workers are, and print the plan.

    Args:
        job: Path of the job file.
        overrides: Dotted keys laid over the job, as {"sync.every": 16}.
        run: Id of a run that the calling process has begun already; leave it empty.
    """
    with taken_over(run, lambda: Run.start(load_job(job, overrides))) as this, stops_in_order(this):
        try:
            locate_and_plan(this, AsTasks(this))
        except Stopped as stopped:
            return ended(this, stopped)
        assert this.plan is not None
        return this.plan.to_dict()
