"""What all flows need: the stages of a run as tasks, and an orderly end."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
from prefect import Task, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterState, TaskRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.logging import get_run_logger
from prefect.states import Crashed

from geotrain.charge import me
from geotrain.errors import Stopped
from geotrain.job import load_job
from geotrain.report.state import last_unfinished
from geotrain.run import Run
from tasks import analyze_locality, evaluate, merge_fully, probe, provision, publish, report, schedule, synchronize, train_partition

WAIT_S = 0.25
TASKS: dict[Callable[..., Any], Task[..., Any]] = {
    Run.analyze: analyze_locality,
    Run.probe: probe,
    Run.schedule: schedule,
    Run.provision: provision,
    Run.train: train_partition,
    Run.synchronize: synchronize,
    Run.merge_fully: merge_fully,
    Run.evaluate: evaluate,
    Run.publish: publish,
    Run.report: report,
}
ALIVE = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)


def begin_server() -> None:
    """Make sure that there is a Prefect server: the user's, or one embedded in this process, which must outlive a Ctrl-C.

    A terminal signals the whole process group. The embedded server is begun with SIGINT blocked, a mask that it inherits: so the
    flow can drain, and still tell the server how it ended. Prefect ends the server with the process, by SIGTERM.
    """
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupt)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except Exception as error:
        if interrupted.is_set():  # some libraries turn an interrupt into an error of their own
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin(job: str, overrides: dict[str, Any] | None, *, resume: bool) -> Run:
    """A new run of the job; or its last, where that has not ended and the caller wants it, or this is a retry of its flow run.

    Raises RunTaken while another process is in charge of that.
    """
    spec = load_job(job, overrides)
    again = resume or (runtime.flow_run.run_count or 0) > 1
    if again and (folder := last_unfinished(spec)) is not None:
        get_run_logger().info("continuing %s", folder.run)
        return Run.resume(folder, get_run_logger().info)
    return Run.start(spec)


def end_lost_flow_runs(run: Run) -> None:
    """Note this flow run in the run's folder, and tell Prefect that those before have crashed, where it still takes them for running.

    Nobody else does: a worker that sees its flow's process killed says so of the flow run alone, not of its task runs.
    """
    this, process = runtime.flow_run.id, me()
    told = [event for event in run.folder.lines("events.jsonl") if event["event"] == "flow_run"]
    run.folder.event("flow_run", id=this, process=process)
    lost = {event["id"] for event in told if event["process"] != process}  # a retry may come in the same process
    try:
        with get_client(sync_client=True) as client:
            for one in lost:
                _end_lost(client, UUID(one), f"its process was lost; flow run {this} continues {run.id}")
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError, ValueError) as error:
        get_run_logger().warning("flow runs of %s whose process was lost may go on as Running: %s", run.id, error)


def _end_lost(client: SyncPrefectClient, lost: UUID, why: str) -> None:
    try:
        flow_run = client.read_flow_run(lost)
    except ObjectNotFound:  # of another server
        return
    mine = str(lost) == runtime.flow_run.id
    if not mine and flow_run.state_type not in (*ALIVE, StateType.CRASHED):
        return  # it ended in order, and said so
    if not mine and flow_run.state_type in ALIVE:
        client.set_flow_run_state(lost, Crashed(message=why), force=True)
    task_runs = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[lost])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=list(ALIVE)))),
    )
    for task_run in task_runs:
        if not mine or task_run.flow_run_run_count < flow_run.run_count:
            client.set_task_run_state(task_run.id, Crashed(message=why), force=True)


def named_after_job() -> str:
    """A flow run's name: the job file's, or the run folder's."""
    parameters = runtime.flow_run.parameters
    return Path(parameters.get("job") or parameters["run"]).stem


class AsTasks:
    """The stages of a run as Prefect tasks: one per region at a time. The Prefect server is not asked for anything: it may be away."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def each(self, stage: Callable[..., Any], *args: Any, regions: Sequence[str] | None = None) -> list[Any]:
        run, task = self.run, TASKS[stage]
        futures = [task.submit(run, name, *args) for name in (run.regions if regions is None else regions)]
        waiting = list(futures)
        while waiting:
            waiting[0].wait(timeout=WAIT_S)
            done = [future.wrapped_future for future in waiting if future.wrapped_future.done()]  # each gives a state
            if any(future.exception() is not None or not future.result().is_completed() for future in done):
                run.control.abort.set()
            waiting = [future for future in waiting if future.wrapped_future not in done]
        results = [future.result(raise_on_failure=False) for future in futures]
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return results

    def one(self, stage: Callable[..., Any], *args: Any) -> Any:
        return TASKS[stage](self.run, *args)


@contextmanager
def stops_in_order(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets training drain and checkpoint; a second one, or one at any other time, ends at once.

    After a drain the flow ends as Cancelled by its own answer. A SIGTERM that found nothing to drain is passed on to Prefect, unless the
    command line began the run.
    """
    came: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        came.append(number)
        if run.training and len(came) == 1:
            run.board.enter("stopping: draining the round and writing a checkpoint")
            run.control.stop.set()
            return
        run.control.abort.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if signal.SIGTERM in came and run.control.abort.is_set() and not run.handed_over:
            signal.raise_signal(signal.SIGTERM)
