"""geotrain-train: one model from the data of all regions."""

from typing import Any

from prefect import flow
from prefect.states import Cancelled, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.conduct import AsTasks, begin, end_lost_flow_runs, named_after_job, stops_in_order
from geotrain.errors import Stopped
from geotrain.report.folder import RunFolder
from geotrain.run import Run, locate_and_plan, taken_over, train_and_publish

MOST_REGIONS = 64


@flow(name="geotrain-train", flow_run_name=named_after_job, task_runner=ThreadPoolTaskRunner(max_workers=MOST_REGIONS))
def geotrain_train(job: str, overrides: dict[str, Any] | None = None, resume: bool = False, run: str = "") -> Any:
    """Train one model on data that lives in several regions, without moving the data.

    Args:
        job: Path of the job file.
        overrides: Dotted keys laid over the job, as {"sync.every": 16}.
        resume: Continue the job's last run, where that has not ended, instead of beginning a new one. A retry by Prefect always does.
        run: Id of a run that the calling process has begun already; leave it empty.
    """
    with taken_over(run, lambda: begin(job, overrides, resume=resume)) as this, stops_in_order(this):
        end_lost_flow_runs(this)
        try:
            locate_and_plan(this, AsTasks(this))
            return train_and_publish(this, AsTasks(this))
        except Stopped as stopped:
            return ended(this, stopped)


@flow(name="geotrain-resume", flow_run_name=named_after_job, task_runner=ThreadPoolTaskRunner(max_workers=MOST_REGIONS))
def geotrain_resume(run: str, without: list[str] | None = None) -> Any:
    """Continue a run from its newest checkpoint.

    Args:
        run: The run folder.
        without: Regions that leave the run for good, because their clusters are gone.
    """
    begun = run.rsplit("/", 1)[-1]
    with taken_over(begun, lambda: Run.resume(RunFolder(run), without=without or ())) as this, stops_in_order(this):
        end_lost_flow_runs(this)
        try:
            locate_and_plan(this, AsTasks(this))
            return train_and_publish(this, AsTasks(this))
        except Stopped as stopped:
            return ended(this, stopped)


def ended(run: Run, stopped: Stopped) -> State[Any]:
    """A stopped run is Cancelled, and says how to go on. Raises RunTaken where it was stopped because another process has taken it."""
    run.charge.check()
    run.stopped()
    return Cancelled(message=str(stopped))
