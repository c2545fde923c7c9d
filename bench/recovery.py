"""How long it takes until a region that lost something is back, and how long the others wait: digits, three regions, real processes.

python -m bench.recovery "leader hangs" "region drained": these alone, into the newest result file.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

from bench.figures import newest
from bench.measure import GEOTRAIN, ROOT, make_data, spread, write
from geotrain.charge import ask
from geotrain.job import load_job, parse_job
from geotrain.partition.orders import SegmentDone
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.chaos.test_processes import DaskProcesses, a_flow_elsewhere, ended_with_a_checkpoint, wait_for
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

TURNS = 3
VICTIM = "virginia"
CUT_S, LONG_CUT_S, DOWN_S = 10.0, 90.0, 3.0
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}


def data() -> dict[str, str]:
    """Overrides of the shipped job."""
    folder = make_data("digits", "3")
    return {
        f"regions.{path.name}.data.{split}": str(path / split) for path in folder.iterdir() if path.is_dir() for split in ("train", "eval")
    }


def kill_fork_server() -> None:
    """What all local workers are forked from."""
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]


@dataclass
class Scene:
    """A run that a fault is to happen to."""

    run: Run
    valve: Valve
    """Before VICTIM's endpoint."""
    entry: dict[str, Any]
    """VICTIM's, of the job."""
    elsewhere: DaskProcesses | None
    """VICTIM's cluster, where that is to be lost."""
    struck_at: float = math.inf

    def pid(self, worker: int = 0, region: str = VICTIM) -> int:
        partition = self.run.partitions[region]
        address = partition.workers[worker]
        return int(partition.client.run(os.getpid, workers=[address])[address])

    def kill(self, worker: int = 0, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(worker), number)

    def kill_all(self) -> None:
        for pid in [self.pid(0, region) for region in self.run.present]:
            os.kill(pid, signal.SIGKILL)

    def cut(self, seconds: float) -> None:
        self.valve.open.clear()
        threading.Timer(seconds, self.valve.open.set).start()

    def fail(self, how: str) -> None:
        """As `bench.failing` does, in VICTIM's process, until it is lost."""
        file = Path(self.run.job.task_args[how])
        file.write_text(str(self.pid()))
        while VICTIM in self.run.present:
            time.sleep(0.01)
        file.unlink()

    def lose_scheduler(self) -> None:
        assert self.elsewhere is not None
        self.elsewhere.end()
        threading.Timer(DOWN_S, self.elsewhere.start).start()

    def disagree(self) -> None:
        """VICTIM's next hash is another, once: as of a node that computes wrongly without a word."""
        partition = self.run.partitions[VICTIM]
        train = partition.train

        def differs(*args: Any) -> SegmentDone:
            done = train(*args)
            partition.train = train  # type: ignore[method-assign]
            self.struck_at = time.time()
            return replace(done, sha256="0" * 64)

        partition.train = differs  # type: ignore[method-assign]


@dataclass(frozen=True)
class Fault:
    """What happens to VICTIM in mid-run."""

    strike: Callable[[Scene], None]
    noticed: tuple[str, ...] = ("lost", "notice")
    over: tuple[str, ...] = ("back",)
    """Events; none: nobody notices."""
    workers: int = 1
    quorum: int = 1
    comes: bool = False
    """The run begins without it."""
    elsewhere: bool = False
    """Its cluster is one of its own."""
    epochs: int = 80
    turns: int = TURNS


FAULTS: dict[str, Fault] = {
    "leader killed": Fault(lambda scene: scene.kill()),
    "leader killed, below the quorum": Fault(lambda scene: scene.kill(), quorum=3),
    "one worker of two killed": Fault(lambda scene: scene.kill(1), workers=2),
    "leader gets SIGTERM": Fault(lambda scene: scene.kill(number=signal.SIGTERM)),
    "all leaders killed": Fault(lambda scene: scene.kill_all()),
    "fork server killed": Fault(lambda scene: kill_fork_server()),
    "leader hangs": Fault(lambda scene: scene.kill(number=signal.SIGSTOP), epochs=240, turns=1),
    "device fails": Fault(lambda scene: scene.fail("broken")),
    "NaN, three rounds in a row": Fault(lambda scene: scene.fail("sick"), noticed=("void_round",)),
    "hashes differ": Fault(lambda scene: scene.disagree(), noticed=("rolled_back",), over=("seated",)),
    "scheduler lost for 3 s": Fault(lambda scene: scene.lose_scheduler(), elsewhere=True),
    "links cut for 10 s": Fault(lambda scene: scene.cut(CUT_S), noticed=(), over=()),
    "links cut for 90 s": Fault(lambda scene: scene.cut(LONG_CUT_S), epochs=240, turns=1),
    "region drained": Fault(lambda scene: ask(scene.run.folder.url, "drain", region=VICTIM), noticed=("asked_to_leave",), over=("left",)),
    "region added": Fault(
        lambda scene: ask(scene.run.folder.url, "add", region=scene.entry),
        noticed=("asked_to_come",),
        over=("joined",),
        comes=True,
        epochs=160,
    ),
}
SEGMENT_ROUNDS = 60


def measure(fault: Fault) -> dict[str, float | bool]:
    """Seconds of one run with one fault in its second segment."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        port = free_port()
        valve = Valve(port)
        stack.callback(valve.close)
        overrides: dict[str, Any] = {
            **data(),
            "output.url": folder,
            "registry": None,
            "task": "bench.failing:FailingDigits",
            "task_args": {"lr": 0.05, "broken": f"{folder}/broken", "sick": f"{folder}/sick"},
            "train.epochs": fault.epochs,
            "schedule.segment_rounds": SEGMENT_ROUNDS,
            "schedule.allocate": "all",
            "elastic.quorum": fault.quorum,
            f"regions.{VICTIM}.devices": [{"kind": "cpu", "count": fault.workers}],
        }
        tree = load_job(str(ROOT / "deployments/jobs/digits-3-regions.yaml"), overrides).to_dict()
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
        scene = Scene(run, valve, entry, elsewhere)

        def strike() -> None:
            while min(row.rounds for row in run.board.rows.values()) < SEGMENT_ROUNDS + 20:
                time.sleep(0.02)
            scene.struck_at = time.time()
            fault.strike(scene)

        conduct(run, lambda run, segment: threading.Thread(target=strike, daemon=True).start() if segment == 1 else None)
        at = scene.struck_at
        events = [event for event in run.folder.lines("events.jsonl") if event["at"] > at]
        others = sorted(r["at"] for r in run.folder.lines("rounds.jsonl") if r["region"] != VICTIM)
        found: dict[str, float | bool] = {
            "others_wait_s": max(later - earlier for earlier, later in pairwise(others) if later > at),
            "balanced": ledger(run.folder)["balanced"],
        }
        if fault.over:
            found["noticed_s"] = min(event["at"] for event in events if event["event"] in fault.noticed) - at
            found["back_s"] = max(event["at"] for event in events if event["event"] in fault.over) - at
        return found


def begin(folder: str) -> subprocess.Popen[bytes]:
    """`geotrain run` of a long run, once it has a checkpoint."""
    changes = {**data(), "output.url": folder, "registry": None, "train.epochs": 1000, "schedule.segment_rounds": 60}
    pairs = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    running = subprocess.Popen([*GEOTRAIN, "run", "deployments/jobs/digits-3-regions.yaml", *pairs], **QUIET)
    while not list(Path(folder).glob("*/checkpoints/*/manifest.json")):
        assert running.poll() is None, "the run has ended"
        time.sleep(0.1)
    return running


def resuming() -> float:
    """Seconds from `geotrain resume` until the first round, after the process of `geotrain run` was killed, with its clusters."""
    with tempfile.TemporaryDirectory() as folder:
        killed = begin(folder)
        started = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        killed.wait()
        psutil.wait_procs(started, timeout=60)
        (run,) = (path for path in Path(folder).iterdir() if (path / "job.yaml").exists())
        size, began = (run / "rounds.jsonl").stat().st_size, time.monotonic()
        resumed = subprocess.Popen([*GEOTRAIN, "resume", run.name, "--runs", folder], **QUIET)
        while (run / "rounds.jsonl").stat().st_size == size:
            assert resumed.poll() is None, "it ended"
            time.sleep(0.05)
        seconds = time.monotonic() - began
        subprocess.run([*GEOTRAIN, "stop", run.name, "--runs", folder], check=False, **QUIET)
        resumed.wait()
        return seconds


def stopping(*how: str) -> float:
    """Seconds from `geotrain stop` until the run's process and all that it started are gone."""
    with tempfile.TemporaryDirectory() as folder:
        running = begin(folder)
        started = psutil.Process(running.pid).children(recursive=True)
        (run,) = (path.name for path in Path(folder).iterdir() if (path / "job.yaml").exists())
        time.sleep(2.0)
        began = time.monotonic()
        asking = subprocess.Popen([*GEOTRAIN, "stop", run, "--runs", folder, *how], **QUIET)
        running.wait()
        _, left = psutil.wait_procs(started, timeout=60)
        assert not left, left
        seconds = time.monotonic() - began
        asking.wait()
        return seconds


def abandoned() -> float:
    """Seconds from a SIGKILL of a flow, whose regions have clusters of their own, until these have written a checkpoint and ended."""
    with tempfile.TemporaryDirectory() as folder, a_flow_elsewhere(Path(folder), "ma", epochs=10_000) as (flow, run):
        time.sleep(2.0)
        flow.kill()
        began = time.monotonic()
        wait_for(lambda: ended_with_a_checkpoint(run))
        return time.monotonic() - began


WHAT = {"geotrain resume": "first_round_s", "flow killed": "checkpoint_s"}


def main() -> None:
    only = sys.argv[1:]
    results: dict[str, dict[str, Any]] = newest("recovery")["results"] if only else {}
    ends: dict[str, Callable[[], float]] = {
        "geotrain stop": stopping,
        "geotrain stop --force": lambda: stopping("--force"),
        "geotrain resume": resuming,
        "flow killed": abandoned,
    }
    for name in only or [*ends, *FAULTS]:
        if name in ends:
            results[name] = {WHAT.get(name, "gone_s"): spread([ends[name]() for _ in range(TURNS)])}
        else:
            found = [measure(FAULTS[name]) for _ in range(FAULTS[name].turns)]
            assert all(one.pop("balanced") for one in found), found
            results[name] = {key: spread([float(one[key]) for one in found]) for key in found[0]}
        print(f"{name:34} {results[name]}", flush=True)
        write("recovery", results)  # an hour may be lost otherwise


if __name__ == "__main__":
    main()
