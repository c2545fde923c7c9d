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
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.figures import newest
from bench.measure import GEOTRAIN, ROOT, make_data, spread, write
from geotrain.charge import ask
from geotrain.job import load_job, parse_job
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

TURNS = 3
VICTIM = "virginia"
CUT_S = 10.0
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}


def data() -> dict[str, str]:
    """Overrides of the shipped job."""
    folder = make_data("digits", "3")
    return {
        f"regions.{path.name}.data.{split}": str(path / split) for path in folder.iterdir() if path.is_dir() for split in ("train", "eval")
    }


def pid_of(run: Run, worker: int, region: str = VICTIM) -> int:
    partition = run.partitions[region]
    address = partition.workers[worker]
    return int(partition.client.run(os.getpid, workers=[address])[address])


def kill_all(run: Run) -> None:
    for pid in [pid_of(run, 0, region) for region in run.present]:
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What happens to VICTIM in mid-run."""

    strike: Callable[[Run, Valve, dict[str, Any]], None]
    """Given the run, the valve of its link and its entry of the job."""
    noticed: tuple[str, ...] = ("lost", "notice")
    over: tuple[str, ...] = ("back",)
    """Events; none: nobody notices."""
    workers: int = 1
    comes: bool = False
    """The run begins without it."""
    epochs: int = 80


def cut(valve: Valve) -> None:
    valve.open.clear()
    threading.Timer(CUT_S, valve.open.set).start()


FAULTS: dict[str, Fault] = {
    "leader killed": Fault(lambda run, valve, entry: os.kill(pid_of(run, 0), signal.SIGKILL)),
    "one worker of two killed": Fault(lambda run, valve, entry: os.kill(pid_of(run, 1), signal.SIGKILL), workers=2),
    "leader gets SIGTERM": Fault(lambda run, valve, entry: os.kill(pid_of(run, 0), signal.SIGTERM)),
    "all leaders killed": Fault(lambda run, valve, entry: kill_all(run)),
    "leader hangs": Fault(lambda run, valve, entry: os.kill(pid_of(run, 0), signal.SIGSTOP)),
    "links cut for 10 s": Fault(lambda run, valve, entry: cut(valve), noticed=(), over=()),
    "region drained": Fault(
        lambda run, valve, entry: ask(run.folder.url, "drain", region=VICTIM), noticed=("asked_to_leave",), over=("left",)
    ),
    "region added": Fault(
        lambda run, valve, entry: ask(run.folder.url, "add", region=entry),
        noticed=("asked_to_come",),
        over=("joined",),
        comes=True,
        epochs=160,
    ),
}


def measure(fault: Fault) -> dict[str, float | bool]:
    """Seconds of one run with one fault in its second segment."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        valve = Valve(port)
        overrides: dict[str, Any] = {
            **data(),
            "output.url": folder,
            "registry": None,
            "train.epochs": fault.epochs,
            "schedule.segment_rounds": 60,
            "schedule.allocate": "all",
            f"regions.{VICTIM}.devices": [{"kind": "cpu", "count": fault.workers}],
        }
        tree = load_job(str(ROOT / "deployments/jobs/digits-3-regions.yaml"), overrides).to_dict()
        entry = next(region for region in tree["regions"] if region["name"] == VICTIM)
        entry["wan"] = {**entry.get("wan", {}), "listen": f"127.0.0.1:{port}", "advertise": valve.address}
        if fault.comes:
            tree["regions"].remove(entry)
        run = Run.start(parse_job(tree), believe=False)
        struck: list[float] = []

        def strike() -> None:
            while min(row.rounds for row in run.board.rows.values()) < 80:
                time.sleep(0.02)
            fault.strike(run, valve, entry)
            struck.append(time.time())

        conduct(run, lambda run, segment: threading.Thread(target=strike, daemon=True).start() if segment == 1 else None)
        valve.close()
        events = [json.loads(line) for line in (Path(run.folder.url) / "events.jsonl").read_text().splitlines()]
        others = sorted(r["at"] for r in run.folder.lines("rounds.jsonl") if r["region"] != VICTIM and abs(r["at"] - struck[0]) < 120)
        found: dict[str, float | bool] = {
            "others_wait_s": max(later - earlier for earlier, later in pairwise(others) if later > struck[0]),
            "balanced": ledger(run.folder)["balanced"],
        }
        if fault.over:
            found["noticed_s"] = min(event["at"] for event in events if event["event"] in fault.noticed) - struck[0]
            found["back_s"] = max(event["at"] for event in events if event["event"] in fault.over) - struck[0]
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


def main() -> None:
    only = sys.argv[1:]
    results: dict[str, dict[str, Any]] = newest("recovery")["results"] if only else {}
    ends: dict[str, Callable[[], float]] = {
        "geotrain stop": stopping,
        "geotrain stop --force": lambda: stopping("--force"),
        "geotrain resume": resuming,
    }
    for name in only or [*ends, *FAULTS]:
        if name in ends:
            what = "first_round_s" if name == "geotrain resume" else "gone_s"
            results[name] = {what: spread([ends[name]() for _ in range(TURNS)])}
        else:
            found = [measure(FAULTS[name]) for _ in range(TURNS)]
            assert all(one.pop("balanced") for one in found), found
            results[name] = {key: spread([float(one[key]) for one in found]) for key in found[0]}
        print(f"{name:26} {results[name]}", flush=True)
    write("recovery", results)


if __name__ == "__main__":
    main()
