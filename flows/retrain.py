"""geotrain-retrain: new data since the champion? Then train from it and let the registry compare."""

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.conduct import AsTasks, begin, end_lost_flow_runs, named_after_job, stops_in_order
from flows.train import MOST_REGIONS, ended
from geotrain import registry
from geotrain.errors import JobError, Stopped
from geotrain.run import locate_and_plan, taken_over, train_and_publish


@flow(name="geotrain-retrain", flow_run_name=named_after_job, task_runner=ThreadPoolTaskRunner(max_workers=MOST_REGIONS))
def geotrain_retrain(job: str, overrides: dict[str, Any] | None = None, resume: bool = False, run: str = "") -> Any:
    """Train again from the champion when any region has new data; otherwise say so and stop.

    Args:
        job: Path of the job file; it must have a `registry`.
        overrides: Dotted keys laid over the job, as {"train.epochs": 5}.
        resume: Continue the job's last run, where that has not ended, instead of beginning a new one. A retry by Prefect always does.
        run: Id of a run that the calling process has begun already; leave it empty.
    """
    with taken_over(run, lambda: begin(job, overrides, resume=resume)) as this, stops_in_order(this):
        end_lost_flow_runs(this)
        if this.job.registry is None:
            raise JobError("retraining needs a registry: add `registry: {url: ..., model: ...}` to the job")
        champion = registry.champion(this.job.registry.url, this.job.registry.model)
        try:
            locate_and_plan(this, AsTasks(this))
            if this.resumed is None and not this.has_new_data(since=champion):
                assert champion is not None
                this.folder.event("nothing_new", champion=champion.number)
                this.board.enter(f"nothing new since version {champion.number}")
                return Completed(message=f"no new data since version {champion.number}: nothing to train")
            if this.resumed is None:
                this.warm_start = champion
                get_run_logger().info("new data; beginning from %s", f"version {champion.number}" if champion else "a new model")
            return train_and_publish(this, AsTasks(this))
        except Stopped as stopped:
            return ended(this, stopped)
