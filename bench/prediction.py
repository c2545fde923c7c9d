"""Predicted against measured wall time: `geotrain simulate` against `geotrain run` on a shaped network, the same job for both.

Needs root and a WAN emulator (bench/emulator.py). Regions are network namespaces with a Dask cluster each. Speeds, and what an update
takes beside the wire, are those that the run's own probe measured; the links are given to the simulation as iperf3 would measure them,
0.955 of their rate.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.emulator import emulator, settled
from bench.measure import ROOT, run_job, write
from bench.paced import write_rows
from geotrain.job import load_job
from geotrain.simulate.simulate import simulate

GOODPUT = 0.955
NAMES = ("tokyo", "virginia", "paris")
TRACE = [(0.0, 100.0), (12.0, 20.0), (30.0, 100.0)]
"""Seconds from the first inner step, Mbit/s."""

MA, STREAMING = {"strategy": "ma", "every": 20}, {"strategy": "streaming", "every": 40, "fragments": 4, "overlap_steps": 9}
CASES: dict[str, dict[str, Any]] = {
    "2 regions, 20 Mbit/s, blocking, 5 MB": {"regions": 2, "mbit": 20, "mb": 5, "rounds": 8, "sync": MA},
    "2 regions, 100 Mbit/s, blocking, 45 MB": {"regions": 2, "mbit": 100, "mb": 45, "rounds": 4, "sync": MA},
    "2 regions, 500 Mbit/s, blocking, 45 MB": {"regions": 2, "mbit": 500, "mb": 45, "rounds": 10, "sync": MA},
    "2 regions, 100 Mbit/s, one round delayed, 45 MB": {
        "regions": 2,
        "mbit": 100,
        "mb": 45,
        "rounds": 5,
        "sync": {**MA, "strategy": "delayed"},
    },
    "2 regions, 100 Mbit/s, streaming, 45 MB": {"regions": 2, "mbit": 100, "mb": 45, "rounds": 16, "sync": STREAMING},
    "2 regions, 100 Mbit/s, asynchronous, 45 MB": {"regions": 2, "mbit": 100, "mb": 45, "rounds": 6, "sync": {**MA, "strategy": "asgd_ga"}},
    "2 regions, 100 to 20 to 100 Mbit/s, blocking, 10 MB": {"regions": 2, "mbit": 100, "mb": 10, "rounds": 12, "sync": MA, "trace": True},
    "3 regions, 20 Mbit/s, asynchronous, 5 MB": {"regions": 3, "mbit": 20, "mb": 5, "rounds": 8, "sync": {**MA, "strategy": "asgd_ga"}},
    "3 regions, 100 Mbit/s, blocking, 20 MB": {"regions": 3, "mbit": 100, "mb": 20, "rounds": 6, "sync": MA},
    "3 regions, 100 Mbit/s, blocking by owners, 20 MB": {
        "regions": 3,
        "mbit": 100,
        "mb": 20,
        "rounds": 6,
        "sync": {**MA, "topology": "owners"},
    },
    "3 regions, 500 Mbit/s, one round delayed, 8 MB": {
        "regions": 3,
        "mbit": 500,
        "mb": 8,
        "rounds": 16,
        "sync": {**MA, "strategy": "delayed"},
    },
}
SLEEP_MS, RTT_MS = 40, 30


@contextmanager
def clusters(wan: Any, names: tuple[str, ...]) -> Iterator[None]:
    """A scheduler and a worker in every region."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env, "cwd": ROOT}
    started = []
    try:
        for name in names:
            address = wan.ip(name)
            started.append(
                wan.popen(name, [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"], **quiet)
            )
            worker = ["-m", "distributed.cli.dask_worker", f"tcp://{address}:8786", "--nthreads", "2", "--no-dashboard", "--host", address]
            started.append(wan.popen(name, [sys.executable, *worker], **quiet))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def job_of(case: dict[str, Any], folder: Path, wan: Any) -> Path:
    names = NAMES[: case["regions"]]
    for name in names:
        write_rows(folder / name, 4 * 20 * case["rounds"])
    tree = {
        "name": "prediction",
        "task": "bench.paced:Paced",
        "task_args": {"model_mb": case["mb"], "sleep_ms": SLEEP_MS, "made": str(folder / "made")},
        "regions": [
            {
                "name": name,
                "data": {"train": str(folder / name)},
                "cluster": {"kind": "address", "address": f"tcp://{wan.ip(name)}:8786"},
                "wan": {"listen": f"{wan.ip(name)}:0", "plaintext": True},
            }
            for name in names
        ],
        "links": {"mbit_per_s": GOODPUT * case["mbit"], "rtt_ms": RTT_MS},
        "train": {"batch_size": 4, "epochs": 1},
        "sync": case["sync"],
        "schedule": {"segment_rounds": 1000},
        "output": {"url": str(folder / "runs")},
    }
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def measure(case: dict[str, Any]) -> dict[str, Any]:
    names = NAMES[: case["regions"]]
    settled()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wan = stack.enter_context(
            emulator()(list(names), name="gt-bench", rate=f"{case['mbit']}mbit", rtt=f"{RTT_MS}ms", host=True, replace=True)
        )
        stack.enter_context(clusters(wan, names))
        file = job_of(case, folder, wan)
        over = threading.Event()
        stack.callback(over.set)
        if case.get("trace"):
            threading.Thread(target=play, args=(wan, folder, len(names), over)).start()
        summary = run_job(str(file), {})
        plan = json.loads(Path(summary["folder"], "plan.json").read_text())
        speeds = {f"regions.{region['region']}.devices": [{"samples_per_s": region["samples_per_s"]}] for region in plan["regions"]}
        extra: dict[str, Any] = {**speeds, "simulate.exchange_ms_per_mb": 1e9 * plan["work_s"] / plan["payload_bytes"]}
        if case.get("trace"):
            trace = folder / "trace.csv"
            trace.write_text("seconds,link,mbit_per_s\n" + "".join(f"{s},all,{GOODPUT * rate}\n" for s, rate in TRACE))
            extra["links.trace"] = str(trace)
        outcome = simulate(load_job(str(file), {**extra, "simulate.step_spread": 0.0}), real=False)
    measured = summary["measured"]["seconds"]
    return {
        "measured_s": round(measured, 2),
        "predicted_s": round(outcome.seconds, 2),
        "error": round(outcome.seconds / measured - 1, 4),
        "plan_s": round(summary["predicted"]["seconds"], 2),
        "wan_megabytes": round(summary["measured"]["wan_bytes"] / 1e6, 1),
        "work_ms_per_mb": round(1e9 * plan["work_s"] / plan["payload_bytes"], 2),
        "step_ms": round(1000 * 4 / plan["regions"][0]["samples_per_s"], 1),
    }


def play(wan: Any, folder: Path, regions: int, over: threading.Event, trace: Sequence[tuple[float, float]] = TRACE) -> None:
    """Change the rate as the trace says, from about the first inner step: each region has made a model to be probed and one to train."""
    made = folder / "made"
    while not over.wait(0.02):
        if made.exists() and len(made.read_text().splitlines()) >= 2 * regions:
            break
    start = time.monotonic()
    for seconds, rate in trace:
        if over.wait(max(0.0, start + seconds - time.monotonic())):
            return
        wan.set("all", rate=f"{rate:.0f}mbit")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the network is taken down
    results = {}
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        results[name] = measure(case)
        print(f"{name:55} {results[name]}", flush=True)
    if len(sys.argv) == 1:
        write("prediction", results)


if __name__ == "__main__":
    main()
