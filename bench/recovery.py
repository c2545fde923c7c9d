"""How long it takes until a region that lost something is back, and how long the others wait: digits, three regions, real processes.

python -m bench.recovery "leader hangs" "region drained": these alone, into the newest result file.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.faults import FAULTS, SEGMENT_ROUNDS, VICTIM, Fault, Scene
from bench.figures import newest
from bench.measure import GEOTRAIN, ROOT, make_data, spread, write
from geotrain.charge import ask
from geotrain.errors import RunTaken, Stopped
from geotrain.job import load_job, parse_job
from geotrain.report.folder import RunFolder
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.chaos.test_processes import DaskProcesses, a_flow_elsewhere, ended_with_a_checkpoint, in_mid_run, wait_for
from tests.integration import test_prefect as prefect
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

TURNS = 3
JOB = "deployments/jobs/digits-3-regions.yaml"
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}


def data() -> dict[str, str]:
    """Overrides of the shipped job."""
    folder = make_data("digits", "3")
    return {
        f"regions.{path.name}.data.{split}": str(path / split) for path in folder.iterdir() if path.is_dir() for split in ("train", "eval")
    }


def measure(fault: Fault) -> dict[str, float]:
    """Seconds of one run with one fault in its second segment."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port = free_port()
        valve = Valve(port)
        stack.callback(valve.close)
        url, outage = stack.enter_context(fault.place(Path(folder)))
        overrides: dict[str, Any] = {
            **data(),
            "output.url": url,
            "registry": None,
            "task": "bench.failing:FailingDigits",
            "task_args": {"lr": 0.05, **{how: f"{folder}/{how}" for how in ("broken", "sick", "slow")}},
            "train.epochs": fault.epochs,
            "schedule.segment_rounds": SEGMENT_ROUNDS,
            "schedule.allocate": "all",
            "elastic.quorum": 1,
            f"regions.{VICTIM}.devices": [{"kind": "cpu", "count": fault.workers}],
            **(fault.job or {}),
        }
        tree = load_job(str(ROOT / JOB), overrides).to_dict()
        entry = next(region for region in tree["regions"] if region["name"] == VICTIM)
        entry["wan"] = {**entry.get("wan", {}), "listen": f"127.0.0.1:{port}", "advertise": valve.address}
        elsewhere = None
        if fault.elsewhere:
            elsewhere = DaskProcesses()
            stack.callback(elsewhere.end)
            entry["cluster"] = {"kind": "address", "address": elsewhere.address}
        if fault.comes:
            tree["regions"].remove(entry)
        run = Run.start(parse_job(tree), believe=False)
        scene = Scene(run, valve, entry, elsewhere, outage)

        def strike() -> None:
            while min(row.rounds for row in run.board.rows.values()) < SEGMENT_ROUNDS + 20:
                time.sleep(0.02)
            scene.struck_at = time.time()
            fault.strike(scene)

        with suppress(fault.ends) if fault.ends else nullcontext():
            conduct(run, lambda run, segment: threading.Thread(target=strike, daemon=True).start() if segment == 1 else None)
            assert not fault.ends, "it was to end"
        return figures_of(fault, scene)


def figures_of(fault: Fault, scene: Scene) -> dict[str, float]:
    """Of a run that has ended. Raises AssertionError where it did not end as it was to."""
    folder, at = scene.run.folder, scene.struck_at
    after: dict[str, list[float]] = {}
    for event in folder.lines("events.jsonl"):
        if event["at"] > at:
            after.setdefault(event["event"], []).append(event["at"])
    found = {}
    if fault.noticed:
        found["noticed_s"] = min(when for name in fault.noticed for when in after.get(name, ())) - at
    if fault.over:
        moments = [[when for when in after[name] if when > scene.mended_at] for name in fault.over]
        found["back_s"] = (min(moments[-1]) if fault.first else max(map(max, moments))) - at
    if not fault.ends:
        others = sorted(record["at"] for record in folder.lines("rounds.jsonl") if record["region"] != VICTIM)
        if waits := [later - earlier for earlier, later in pairwise(others) if later > at]:
            found["others_wait_s"] = max(waits)
        assert (account := ledger(folder))["balanced"], account
    return found


@contextmanager
def running() -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """`geotrain run` of a long run, once it has two checkpoints; it, and its folder."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {**data(), "output.url": folder, "registry": None, "train.epochs": 1000, "schedule.segment_rounds": SEGMENT_ROUNDS}
        pairs = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        process = subprocess.Popen([*GEOTRAIN, "run", JOB, *pairs], **QUIET)
        try:
            while len(list(Path(folder).glob("*/checkpoints/*/manifest.json"))) < 2:
                assert process.poll() is None, "the run has ended"
                time.sleep(0.1)
            (run,) = (path for path in Path(folder).iterdir() if (path / "job.yaml").exists())
            yield process, run
        finally:
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            psutil.wait_procs(started, timeout=60)


def geotrain(command: str, run: Path, *more: str) -> list[str]:
    return [*GEOTRAIN, command, run.name, "--runs", str(run.parent), *more]


def resuming(*how: str, before: Callable[[Path], None] = lambda run: None, event: str = "resumed") -> float:
    """Seconds from `geotrain resume` until the first round, after the process of `geotrain run` was killed, with its clusters."""
    with running() as (process, run):
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(started, timeout=60)
        before(run)
        size, began = (run / "rounds.jsonl").stat().st_size, time.monotonic()
        resumed = subprocess.Popen(geotrain("resume", run, *how), **QUIET)
        while (run / "rounds.jsonl").stat().st_size == size:
            assert resumed.poll() is None, "it ended"
            time.sleep(0.05)
        seconds = time.monotonic() - began
        subprocess.run(geotrain("stop", run), check=False, **QUIET)
        resumed.wait()
        assert f'"{event}"' in (run / "events.jsonl").read_text()
        return seconds


def flip_a_bit(run: Path) -> None:
    """Of the last checkpoint."""
    part = sorted(run.glob("checkpoints/*/manifest.json"))[-1].with_name(f"{VICTIM}.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)


def stopping(*how: str) -> float:
    """Seconds from `geotrain stop` until the run's process and all that it started are gone."""
    with running() as (process, run):
        started = psutil.Process(process.pid).children(recursive=True)
        time.sleep(2.0)
        began = time.monotonic()
        asking = subprocess.Popen(geotrain("stop", run, *how), **QUIET)
        process.wait()
        _, left = psutil.wait_procs(started, timeout=60)
        assert not left, left
        seconds = time.monotonic() - began
        asking.wait()
        return seconds


def refused() -> float:
    """Seconds until a second process for the same run is told that it is taken."""
    with running() as (_, run):
        began = time.monotonic()
        second = subprocess.run(geotrain("resume", run), check=False, **QUIET)
        assert second.returncode == RunTaken.exit_code, second.returncode
        return time.monotonic() - began


def abandoned() -> float:
    """Seconds from a SIGKILL of a flow, whose regions have clusters of their own, until these have written a checkpoint and ended."""
    with tempfile.TemporaryDirectory() as folder, a_flow_elsewhere(Path(folder), "ma", epochs=10_000) as (flow, run):
        time.sleep(2.0)
        flow.kill()
        began = time.monotonic()
        wait_for(lambda: ended_with_a_checkpoint(run))
        return time.monotonic() - began


def overtaken() -> float:
    """Seconds from when a flow wakes, which slept until another had taken its run, until it has ended."""
    with tempfile.TemporaryDirectory() as folder, a_flow_elsewhere(Path(folder), "ma", epochs=10_000) as (flow, run):
        flow.send_signal(signal.SIGSTOP)
        wait_for(lambda: ended_with_a_checkpoint(run))
        resumed, seconds = Run.resume(run), list[float]()

        def wake(_: Run) -> None:
            began = time.monotonic()
            flow.send_signal(signal.SIGCONT)
            flow.wait()
            seconds.append(time.monotonic() - began)
            ask(run.url, "stop")

        with suppress(Stopped):
            conduct(resumed, in_mid_run(wake, round=resumed.round + 20))
        return seconds[0]


def crashed() -> float:
    """Seconds from a SIGKILL of a flow under a Prefect worker until Prefect calls its run Crashed."""
    with tempfile.TemporaryDirectory() as folder, prefect.working(Path(folder)) as server:
        changes = {**data(), "output.url": f"{folder}/runs", "registry": None, "train.epochs": 1000}
        server.run("deployment", "run", "geotrain-train/digits", "-p", f"overrides={json.dumps(changes)}")
        prefect.until(lambda: list(Path(folder).glob("runs/*/checkpoints/*/manifest.json")))
        (run,) = Path(folder, "runs").iterdir()
        os.kill(json.loads(max(run.glob("lease/*.json")).read_text())["holder"]["pid"], signal.SIGKILL)
        began = time.monotonic()
        prefect.until(lambda: [flow["state"]["type"] for flow in prefect.ask(server.api, "flow_runs/filter", {})] == ["CRASHED"])
        return time.monotonic() - began


def without_prefect() -> dict[str, float]:
    """The longest time without a round of any region while the Prefect server is away for 10 s, and once it is back."""
    with tempfile.TemporaryDirectory() as folder, prefect.serving(Path(folder)) as server:
        changes = {**data(), "output.url": f"{folder}/runs", "registry": None, "train.epochs": 160}
        words = [sys.executable, "-c", prefect.TRAINS, JOB, json.dumps(changes)]
        flow = subprocess.Popen(words, env=server.env, stdout=server.log, stderr=server.log, cwd=ROOT)
        try:
            prefect.until(lambda: list(Path(folder).glob("runs/*/checkpoints/*/manifest.json")))
            killed_at = time.time()
            server.kill()
            time.sleep(10.0)
            server.begin_again()
            back_at = time.time()
            assert flow.wait(timeout=400) == 0
        finally:
            if flow.poll() is None:
                prefect.end(flow)
        (run,) = Path(folder, "runs").iterdir()
        rounds = sorted(record["at"] for record in RunFolder(str(run)).lines("rounds.jsonl"))
        assert rounds[-1] > back_at, "the run was over before the server was back"
        return {"others_wait_s": max(later - earlier for earlier, later in pairwise(rounds) if later > killed_at)}


@dataclass(frozen=True)
class End:
    """What happens to the process that conducts a run."""

    seconds: Callable[[], float]
    until: str


ENDS = {
    "geotrain stop": End(stopping, "nothing of the run is left"),
    "geotrain stop --force": End(lambda: stopping("--force"), "nothing of the run is left"),
    "geotrain resume": End(resuming, "a round, after a SIGKILL of `geotrain run` and so of the clusters that it had begun"),
    "geotrain resume, a bit flipped": End(
        lambda: resuming(before=flip_a_bit, event="bad_checkpoint"), "the same, with the last checkpoint damaged"
    ),
    "geotrain resume --without": End(lambda: resuming("--without", VICTIM, event="left"), "the same, with a region less"),
    "second flow": End(refused, "`geotrain resume` of a run that is going on is refused"),
    "flow killed": End(abandoned, "regions with clusters of their own have written a checkpoint and ended"),
    "flow overtaken": End(overtaken, "a flow that slept, and wakes when another has its run, has ended"),
    "flow killed under a Prefect worker": End(crashed, "Prefect calls its run Crashed"),
}
STRIKES: dict[str, Callable[[], dict[str, float]]] = {
    **{name: partial(measure, fault) for name, fault in FAULTS.items()},
    "Prefect server away for 10 s": without_prefect,
}


def main() -> None:
    only = sys.argv[1:]
    results: dict[str, dict[str, Any]] = newest("recovery")["results"] if only else {}
    for name in only or [*ENDS, *STRIKES]:
        if name in ENDS:
            results[name] = {"seconds": spread([ENDS[name].seconds() for _ in range(TURNS)]), "until": ENDS[name].until}
        else:
            found = [STRIKES[name]() for _ in range(TURNS)]
            results[name] = {key: spread([one[key] for one in found]) for key in found[0]}
        print(f"{name:34} {results[name]}", flush=True)
        write("recovery", results)  # an hour may be lost otherwise


if __name__ == "__main__":
    main()
