"""How long it takes until a region that lost something is back, and how long the others wait: digits, three regions, real processes."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from bench.measure import GEOTRAIN, ROOT, make_data, spread, write
from geotrain.job import load_job
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.making import conduct

TURNS = 3
VICTIM = "virginia"


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


FAULTS: dict[str, Callable[[Run], None]] = {
    "leader killed": lambda run: os.kill(pid_of(run, 0), signal.SIGKILL),
    "one worker of two killed": lambda run: os.kill(pid_of(run, 1), signal.SIGKILL),
    "leader gets SIGTERM": lambda run: os.kill(pid_of(run, 0), signal.SIGTERM),
    "all leaders killed": kill_all,
}


def measure(fault: str) -> dict[str, float | bool]:
    """Seconds of one run with one fault in its second segment."""
    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[str, Any] = {
            **data(),
            "output.url": folder,
            "registry": None,
            "train.epochs": 80,
            "schedule.segment_rounds": 60,
            "schedule.allocate": "all",
            f"regions.{VICTIM}.devices": [{"kind": "cpu", "count": 2 if "two" in fault else 1}],
        }
        run = Run.start(load_job(str(ROOT / "deployments/jobs/digits-3-regions.yaml"), overrides), believe=False)
        struck: list[float] = []

        def strike() -> None:
            while min(row.rounds for row in run.board.rows.values()) < 80:
                time.sleep(0.02)
            FAULTS[fault](run)
            struck.append(time.time())

        conduct(run, lambda run, segment: threading.Thread(target=strike, daemon=True).start() if segment == 1 else None)
        events = [json.loads(line) for line in (Path(run.folder.url) / "events.jsonl").read_text().splitlines()]
        noticed = min(event["at"] for event in events if event["event"] in ("lost", "notice"))
        back = max(event["at"] for event in events if event["event"] == "back")
        others = sorted(r["at"] for r in run.folder.lines("rounds.jsonl") if r["region"] != VICTIM and abs(r["at"] - struck[0]) < 60)
        pause = max(later - earlier for earlier, later in pairwise(others) if later > struck[0])
        return {
            "noticed_s": noticed - struck[0],
            "others_wait_s": pause,
            "back_s": back - struck[0],
            "balanced": ledger(run.folder)["balanced"],
        }


def stopping(*how: str) -> float:
    """Seconds from `geotrain stop` until the run's process and all that it started are gone."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {**data(), "output.url": folder, "registry": None, "train.epochs": 1000, "schedule.segment_rounds": 60}
        pairs = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
        running = subprocess.Popen([*GEOTRAIN, "run", "deployments/jobs/digits-3-regions.yaml", *pairs], **quiet)
        while not list(Path(folder).glob("*/checkpoints/*/manifest.json")):
            assert running.poll() is None, "the run has ended"
            time.sleep(0.1)
        started = psutil.Process(running.pid).children(recursive=True)
        (run,) = (path.name for path in Path(folder).iterdir() if (path / "job.yaml").exists())
        time.sleep(2.0)
        began = time.monotonic()
        asking = subprocess.Popen([*GEOTRAIN, "stop", run, "--runs", folder, *how], **quiet)
        running.wait()
        _, left = psutil.wait_procs(started, timeout=60)
        assert not left, left
        seconds = time.monotonic() - began
        asking.wait()
        return seconds


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    for name, how in (("geotrain stop", ()), ("geotrain stop --force", ("--force",))):
        results[name] = {"gone_s": spread([stopping(*how) for _ in range(TURNS)])}
        print(f"{name:26} {results[name]}", flush=True)
    for fault in FAULTS:
        found = [measure(fault) for _ in range(TURNS)]
        names = ("noticed_s", "others_wait_s", "back_s")
        results[fault] = {name: spread([float(one[name]) for one in found]) for name in names}
        assert all(one["balanced"] for one in found), found
        print(f"{fault:26} {results[fault]}", flush=True)
    write("recovery", results)


if __name__ == "__main__":
    main()
