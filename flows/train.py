"""geotrain-train: one model from the data of all regions."""

from typing import Any

from prefect import flow
from prefect.states import Cancelled, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.conduct import begin, each_region, end_lost_flow_runs, named_after_job, stops_in_order
from geotrain.errors import ClusterError, StateDamaged, Stopped
from geotrain.report.folder import RunFolder
from geotrain.run import Run, taken_over
from tasks import analyze_locality, evaluate, merge_fully, probe, provision, publish, report, schedule, synchronize, train_partition

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
            locate_and_plan(this)
            return train_and_publish(this)
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
            locate_and_plan(this)
            return train_and_publish(this)
        except Stopped as stopped:
            return ended(this, stopped)


def locate_and_plan(run: Run) -> None:
    """Look at the data where it is, measure the workers, then decide who does how much."""
    each_region(run, analyze_locality)
    run.compare()
    each_region(run, probe)
    schedule(run)


def train_and_publish(run: Run) -> dict[str, Any]:
    """Provision, train, conclude; again where a worker is lost by then. Returns the summary."""
    while True:
        run.introduce(run.seats(lambda: each_region(run, provision)))
        train(run)
        try:
            return conclude(run)
        except (ClusterError, StateDamaged) as error:
            run.end_again(error)


def train(run: Run) -> None:
    """Segment by segment, as many as are left."""
    run.training = True
    for segment in run.segments_left():
        if synchronize(run, segment, each_region(run, train_partition, segment)):
            break
        run.check_stop()
        if run.seats_change:
            run.introduce(run.seats(lambda: each_region(run, provision)))
    run.training = False


def conclude(run: Run) -> dict[str, Any]:
    """Evaluate, publish, report. Returns the summary."""
    if run.needs_final_merge:
        each_region(run, merge_fully, regions=run.present)
    sums = each_region(run, evaluate, regions=run.present)
    run.conclude(dict(zip(run.present, sums, strict=True)))
    publish(run)
    return report(run)


def ended(run: Run, stopped: Stopped) -> State[Any]:
    """A stopped run is Cancelled, and says how to go on. Raises RunTaken where it was stopped because another process has taken it."""
    run.charge.check()
    run.stopped()
    return Cancelled(message=str(stopped))
