"""A Prefect server, a worker and the shipped deployments, by the commands of the README."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from geotrain.examples import make_example, region_names
from tests.s3 import free_port

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def ask(api: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def end(process: subprocess.Popen[bytes]) -> None:
    """A Prefect worker does not always answer SIGTERM: seen once, with 3.8.8."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


class Server:
    """A Prefect server of the test's own, that can be ended and begun again."""

    def __init__(self, home: Path, log: IO[str]) -> None:
        self.log, port = log, free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self.env = {
            **os.environ,
            "PWD": str(ROOT),
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_API_URL": self.api,
        }
        self.process = self.start("server", "start")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*PREFECT, *words], env=self.env, stdout=self.log, stderr=self.log, cwd=ROOT)

    def run(self, *words: str) -> None:
        subprocess.run([*PREFECT, *words], env=self.env, check=True, stdout=self.log, stderr=self.log, cwd=ROOT, timeout=120)

    def wait(self) -> None:
        """Until it answers."""
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < until, "no Prefect server"
                time.sleep(0.5)

    def kill(self) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def begin_again(self) -> None:
        self.process = self.start("server", "start")
        self.wait()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with (folder / "log").open("w") as log:
        server = Server(folder / "prefect", log)
        try:
            server.wait()
            yield server
        finally:
            end(server.process)


@contextlib.contextmanager
def working(folder: Path) -> Iterator[Server]:
    """With a worker, and the deployments made."""
    with serving(folder) as server:
        server.run("work-pool", "create", "geotrain", "--type", "process")
        server.run("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
        worker = server.start("worker", "start", "--pool", "geotrain")
        try:
            yield server
        finally:
            end(worker)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with working(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def prefect(server: Server) -> dict[str, str]:
    """The environment of its user."""
    return server.env


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The shipped job, on data and with an output of this test's own, and shorter."""
    root = tmp_path_factory.mktemp("digits")
    make_example("digits", root / "data", region_names(3), skew=0.5, rows=600, seed=0)
    data = {
        f"regions.{name}.data.{split}": str(root / "data" / name / split)
        for name in ("tokyo", "frankfurt", "virginia")
        for split in ("train", "eval")
    }
    return {
        **data,
        "output.url": str(root / "runs"),
        "registry.url": str(root / "registry"),
        "train.epochs": 4,
        "schedule.segment_rounds": 5,
    }


def flow_run(env: dict[str, str], deployment: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a deployment to its end; (flow run, task runs)."""
    command = [*PREFECT, "deployment", "run", deployment, "-p", f"overrides={json.dumps(overrides)}", "--watch"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    api = env["PREFECT_API_URL"]
    flow = ask(api, "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
    return flow, ask(api, "task_runs/filter", {"flow_runs": {"id": {"any_": [flow["id"]]}}, "limit": 200})


@pytest.mark.timeout(600)
def test_the_deployments_train_and_retrain(prefect: dict[str, str], overrides: dict[str, Any]) -> None:
    flow, tasks = flow_run(prefect, "geotrain-train/digits", overrides)
    assert (flow["name"], flow["state"]["name"]) == ("digits-3-regions", "Completed")
    names = {task["name"] for task in tasks}
    for region in ("tokyo", "frankfurt", "virginia"):
        stages = ("analyze_locality[{}]", "probe[{}]", "provision[{}]", "train_partition[{}] 1/", "evaluate[{}]")
        for stage in stages:
            assert any(name.startswith(stage.format(region)) for name in names), (stage, region)
    assert {"schedule", "publish", "report"} <= names
    assert any(name.startswith("synchronize 1/") for name in names)
    assert {task["state"]["name"] for task in tasks} == {"Completed"}

    kinds = {(artifact["type"], artifact["key"]) for artifact in ask(prefect["PREFECT_API_URL"], "artifacts/filter", {})}
    assert {("table", "digits-plan"), ("markdown", "digits-report"), ("progress", "digits-tokyo-progress")} <= kinds

    flow, tasks = flow_run(prefect, "geotrain-retrain/digits-nightly", overrides)
    assert flow["state"]["message"] == "no new data since version 1: nothing to train"
    assert not any(task["name"].startswith("train_partition") for task in tasks)

    schedules = [s for d in ask(prefect["PREFECT_API_URL"], "deployments/filter", {}) for s in d["schedules"]]
    assert [schedule["active"] for schedule in schedules] == [False]


def until(what: Callable[[], Any], within_s: float = 180.0) -> Any:
    """Its answer, once it has one."""
    deadline = time.monotonic() + within_s
    while not (answer := what()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return answer


@pytest.mark.timeout(600)
def test_a_flow_run_cancelled_drains_and_the_next_that_resumes_continues_its_run(
    prefect: dict[str, str], overrides: dict[str, Any], tmp_path: Path
) -> None:
    api, runs = prefect["PREFECT_API_URL"], tmp_path / "runs"
    mine = json.dumps({**overrides, "output.url": str(runs), "registry": None, "train.epochs": 60})
    words = [*PREFECT, "deployment", "run", "geotrain-train/digits", "-p", f"overrides={mine}"]
    subprocess.run(words, env=prefect, check=True, capture_output=True, cwd=ROOT, timeout=120)
    until(lambda: list(runs.glob("*/checkpoints/*/manifest.json")))
    flow = ask(api, "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
    subprocess.run([*PREFECT, "flow-run", "cancel", flow["id"]], env=prefect, check=True, capture_output=True, cwd=ROOT, timeout=120)

    def state(kind: str, of: dict[str, Any]) -> list[str]:
        return [one["state"]["type"] for one in ask(api, f"{kind}/filter", {"flow_runs": of, "limit": 200})]

    me = {"id": {"any_": [flow["id"]]}}
    assert until(lambda: [kind for kind in state("flow_runs", me) if kind not in ("RUNNING", "CANCELLING")]) == ["CANCELLED"], "at once"
    assert not {"RUNNING", "PENDING"} & set(state("task_runs", me))
    (run,) = runs.iterdir()
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "stopped"
    segments = [line["round"] for line in lines if line["event"] == "checkpoint"]
    assert segments[-1] == lines[-1]["round"], "it was drained, and the checkpoint is that of the end"

    done = subprocess.run([*words, "-p", "resume=true", "--watch"], env=prefect, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [path.name for path in runs.iterdir()] == [run.name]
    assert (run / "summary.json").exists()


@pytest.mark.timeout(600)
def test_a_flow_run_whose_process_is_killed_crashes_with_its_tasks_and_the_next_that_resumes_continues(
    prefect: dict[str, str], overrides: dict[str, Any], tmp_path: Path
) -> None:
    api, runs = prefect["PREFECT_API_URL"], tmp_path / "runs"
    mine = json.dumps({**overrides, "output.url": str(runs), "registry": None, "train.epochs": 60})
    words = [*PREFECT, "deployment", "run", "geotrain-train/digits", "-p", f"overrides={mine}"]
    subprocess.run(words, env=prefect, check=True, capture_output=True, cwd=ROOT, timeout=120)
    until(lambda: list(runs.glob("*/checkpoints/*/manifest.json")))
    (run,) = runs.iterdir()
    os.kill(json.loads(max(run.glob("lease/*.json")).read_text())["holder"]["pid"], signal.SIGKILL)
    (flow,) = ask(api, "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})

    def states(kind: str) -> set[str]:
        of = {"flow_runs": {"id": {"any_": [flow["id"]]}}, "limit": 200}
        return {one["state"]["type"] for one in ask(api, f"{kind}/filter", of)}

    until(lambda: states("flow_runs") == {"CRASHED"})
    done = subprocess.run([*words, "-p", "resume=true", "--watch"], env=prefect, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [path.name for path in runs.iterdir()] == [run.name]
    assert (run / "summary.json").exists()
    assert states("task_runs") == {"COMPLETED", "CRASHED"}
    assert states("flow_runs") == {"CRASHED"}


RETRIED = """
import json, sys
from geotrain.run import Run
publish, failed = Run.publish, []
def fails_once(self):
    if not failed:
        failed.append(True)
        raise ConnectionError("the registry is away")
    return publish(self)
Run.publish = fails_once
from flows.train import geotrain_train
geotrain_train(sys.argv[1], json.loads(sys.argv[2]))
"""


@pytest.mark.timeout(600)
def test_a_retry_by_prefect_continues_the_run(prefect: dict[str, str], overrides: dict[str, Any], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = [sys.executable, "-c", RETRIED, "deployments/jobs/digits-3-regions.yaml", json.dumps({**overrides, "output.url": str(runs)})]
    env = {**prefect, "PREFECT_FLOWS_DEFAULT_RETRIES": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = runs.iterdir()
    kinds = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind in ("created", "failed", "resumed", "completed")] == [
        "created",
        "failed",
        "resumed",
        "completed",
    ]


TRAINS = """
import json, sys
from flows.train import geotrain_train
geotrain_train(sys.argv[1], json.loads(sys.argv[2]))
"""


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_and_comes_back_in_mid_run_is_not_missed(overrides: dict[str, Any], tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        trains_without(server, overrides, tmp_path)


def trains_without(server: Server, overrides: dict[str, Any], tmp_path: Path) -> None:
    """For a while."""
    runs = tmp_path / "runs"
    longer = {**overrides, "output.url": str(runs), "registry": None, "train.epochs": 150, "schedule.segment_rounds": 40}
    words = [sys.executable, "-c", TRAINS, "deployments/jobs/digits-3-regions.yaml", json.dumps(longer)]
    flow = subprocess.Popen(words, env=server.env, stdout=server.log, stderr=server.log, cwd=ROOT)
    try:
        until(lambda: list(runs.glob("*/checkpoints/*/manifest.json")))
        (run,) = runs.iterdir()

        def checkpoints() -> int:
            return (run / "events.jsonl").read_text().count('"checkpoint"')

        server.kill()
        done = checkpoints()
        until(lambda: checkpoints() > done + 1)  # they train without it
        server.begin_again()
        assert flow.wait(timeout=400) == 0
    finally:
        if flow.poll() is None:
            end(flow)
    assert (run / "summary.json").exists()
    (last,) = ask(server.api, "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    assert last["state"]["type"] == "COMPLETED"

    def tasks() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ask(server.api, "task_runs/filter", {"flow_runs": {"id": {"any_": [last["id"]]}}, "limit": 200})
        return found

    until(lambda: {task["state"]["type"] for task in tasks()} == {"COMPLETED"}, 60)  # they arrive after the flow's
    assert len({task["name"] for task in tasks()}) == len(tasks()), "none was executed twice"
