"""How a run goes, from the first look at its data to its report. Who carries out its stages is the caller's: threads, or Prefect tasks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from geotrain.errors import ClusterError, StateDamaged
from geotrain.plan.planner import Plan
from geotrain.run.run import Run


class Stages(Protocol):
    """Carries out the stages of one run: methods of Run, named as `Run.probe`."""

    def each(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        """For all regions at once, or for some; answers in the order of the job. When one fails the others are told to end, and what it
        raised is raised.
        """

    def one(self, stage: Callable[..., Any], *args: Any) -> Any:
        """What concerns no single region."""


class InThreads:
    """Stages in threads of this process."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def each(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        return self.run.in_every_region(partial(stage, self.run), *args, regions=regions)

    def one(self, stage: Callable[..., Any], *args: Any) -> Any:
        return stage(self.run, *args)


def locate_and_plan(run: Run, stages: Stages) -> Plan:
    """Look at the data where it is, measure the workers, then decide who does how much."""
    stages.each(Run.analyze)
    run.compare()
    stages.each(Run.probe)
    plan: Plan = stages.one(Run.schedule)
    return plan


def train_and_publish(run: Run, stages: Stages) -> dict[str, Any]:
    """Provision, train, conclude; again where a worker is lost by then. Returns the summary."""
    while True:
        _provision(run, stages)
        _train(run, stages)
        try:
            return _conclude(run, stages)
        except (ClusterError, StateDamaged) as error:
            run.end_again(error)


def _provision(run: Run, stages: Stages) -> None:
    run.introduce(run.seats(lambda: stages.each(Run.provision)))


def _train(run: Run, stages: Stages) -> None:
    """Segment by segment, as many as are left."""
    run.training = True
    for segment in run.segments_left():
        if stages.one(Run.synchronize, segment, stages.each(Run.train, segment)):
            break
        run.check_stop()
        if run.seats_change:
            _provision(run, stages)
    run.training = False


def _conclude(run: Run, stages: Stages) -> dict[str, Any]:
    """Evaluate, publish, report. Returns the summary."""
    there = run.present
    if run.needs_final_merge:
        run.merged(dict(zip(there, stages.each(Run.merge_fully, regions=there), strict=True)))
    run.conclude(dict(zip(there, stages.each(Run.evaluate, regions=there), strict=True)))
    stages.one(Run.publish)
    summary: dict[str, Any] = stages.one(Run.report)
    return summary
