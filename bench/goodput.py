"""Useful samples per second while regions, leaders and links fail by a Poisson process, next to the same run undisturbed; and the same
kills on plain DDP that begins again from its last checkpoint.

Three regions. `paced`: an inner step sleeps, so that three processes on a small machine do not take each other's cores; DDP does the same.
`digits` and `images` train a LeNet and a ResNet (45 MB), and say what the model has learned. python -m bench.goodput digits: that alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import ROOT, make_data, write
from bench.paced import write_rows
from geotrain.job import parse_job
from geotrain.report.ledger import ledger
from geotrain.run import Run
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

REGIONS = ("north", "south", "west")
MEAN_S = (60.0, 30.0, 15.0)
STEP_MS, BATCH, ROWS, EPOCHS = 20.0, 32, 6400, 25
"""Of `paced`: each region makes EPOCHS * ROWS / BATCH inner steps, a hundred seconds of sleep."""
EXAMPLES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "digits": (
        None,
        {
            "task": "geotrain.examples.digits:Digits",
            "task_args": {"lr": 0.05},
            "train": {"batch_size": 16, "epochs": 560},
            "sync": {"strategy": "ma", "every": 8},
        },
    ),
    "images": (
        1600,
        {
            "task": "geotrain.examples.images:Images",
            "task_args": {"side": 16, "lr": 0.02},
            "train": {"batch_size": 32, "epochs": 12},
            "sync": {"strategy": "ma", "every": 8},
        },
    ),
}
"""Rows, and what the job says."""
CHECKPOINT_S = 10.0
CUT_S = 5.0


def moments(mean_s: float, seed: int) -> list[float]:
    """Seconds after the first inner step at which something fails; the same for both."""
    rng, at, found = random.Random(seed), 0.0, []
    while at < 3600:
        at += rng.expovariate(1 / mean_s)
        found.append(at)
    return found


def job_of(workload: str, folder: Path) -> dict[str, Any]:
    """Without its regions' ways to each other."""
    common = {"name": "goodput", "schedule": {"segment_s": CHECKPOINT_S}, "elastic": {"quorum": 1}, "output": {"url": str(folder / "runs")}}
    if workload == "paced":
        for name in REGIONS:
            write_rows(folder / name, ROWS)
        regions = [{"name": name, "data": {"train": str(folder / name)}} for name in REGIONS]
        task = {"task": "bench.paced:Paced", "task_args": {"sleep_ms": STEP_MS}}
        return {
            **common,
            **task,
            "regions": regions,
            "train": {"batch_size": BATCH, "epochs": EPOCHS},
            "sync": {"strategy": "ma", "every": 16},
        }
    rows, example = EXAMPLES[workload]
    data = make_data(workload, ",".join(REGIONS), rows=rows)
    regions = [{"name": name, "data": {split: str(data / name / split) for split in ("train", "eval")}} for name in REGIONS]
    return {**common, **example, "regions": regions}


def geotrain(workload: str, mean_s: float | None, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ports = {name: free_port() for name in REGIONS}
        valves = {name: Valve(ports[name]) for name in REGIONS}
        tree = job_of(workload, Path(folder))
        for region in tree["regions"]:
            region["wan"] = {"listen": f"127.0.0.1:{ports[region['name']]}", "advertise": valves[region["name"]].address}
        run = Run.start(parse_job(tree), believe=False)
        ended, faults = threading.Event(), list[str]()

        def fail() -> None:
            rng = random.Random(seed + 1)
            while min(row.rounds for row in run.board.rows.values()) < 1:
                time.sleep(0.02)
            began = time.monotonic()
            for at in moments(mean_s or 1e9, seed):
                if ended.wait(began + at - time.monotonic()):
                    return
                victims = {"leader": 1, "link": 1, "two regions": 2}
                what = rng.choice(list(victims))
                names = rng.sample(REGIONS, victims[what])
                faults.append(f"{at:.0f} s: {what} {' '.join(names)}")
                for name in names:
                    if what == "link":
                        valves[name].open.clear()
                        threading.Timer(CUT_S, valves[name].open.set).start()
                    else:
                        kill(run, name)

        failing = threading.Thread(target=fail, daemon=True)
        failing.start()
        summary = conduct(run)
        ended.set()
        failing.join()
        for valve in valves.values():
            valve.close()
        rounds = list(run.folder.lines("rounds.jsonl"))
        seconds = max(record["at"] for record in rounds) - min(record["at"] for record in rounds)
        found = ledger(run.folder)
        return {
            "useful_samples_per_s": round(summary["samples"] / seconds, 1),
            "seconds": round(seconds, 1),
            "share_of_rows": round(summary["samples"] / sum(row["rows"] for row in found["regions"]), 4),
            "metrics": {name: round(value, 4) for name, value in summary["metrics"].items()},
            "faults": faults,
            "balanced": found["balanced"],
        }


def kill(run: Run, region: str) -> None:
    """A region's only worker; one that is not there at the moment cannot be killed."""
    try:
        partition = run.partitions[region]
        pids = partition.client.run(os.getpid, workers=partition.workers[:1])
        os.kill(next(iter(pids.values())), signal.SIGKILL)
    except Exception as error:
        print(f"nothing to kill in {region}: {error!r}"[:100], file=sys.stderr)


def ddp(mean_s: float | None, seed: int) -> dict[str, Any]:
    """Three processes with gloo; whenever one dies all begin again from the last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        restarts = 0
        until = iter(moments(mean_s or 1e9, seed))
        rng, first_step_at, next_at = random.Random(seed + 1), None, next(until)
        while True:
            port = free_port()
            words = [sys.executable, "-m", "bench.goodput", "ddp", folder, str(port)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            ranks = [subprocess.Popen([*words, str(rank)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) for rank in range(len(REGIONS))]
            while all(rank.poll() is None for rank in ranks):
                time.sleep(0.05)
                if first_step_at is None and Path(folder, "stepping").exists():
                    first_step_at = time.monotonic()
                if first_step_at is not None and time.monotonic() > first_step_at + next_at:
                    next_at = next(until)
                    ranks[rng.randrange(len(ranks))].kill()
            ended = all(rank.wait() == 0 for rank in ranks) if Path(folder, "done").exists() else False
            for rank in ranks:
                rank.kill()
                rank.wait()
            if ended:
                break
            restarts += 1
        assert first_step_at is not None
        seconds, samples = time.monotonic() - first_step_at, len(REGIONS) * EPOCHS * ROWS
        return {"useful_samples_per_s": round(samples / seconds, 1), "seconds": round(seconds, 1), "restarts": restarts}


def ddp_rank(folder: str, port: str, rank: int) -> None:
    """What anyone would write: an all-reduce per step, a checkpoint by rank 0 every CHECKPOINT_S."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(REGIONS))
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wrapped, first, path = DistributedDataParallel(model), 0, Path(folder, "checkpoint.pt")
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        first = state["step"]
    saved_at = time.monotonic()
    for step in range(first, EPOCHS * ROWS // BATCH):
        time.sleep(STEP_MS / 1000)
        wrapped(torch.randn(BATCH, 500)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step == 0:
            Path(folder, "stepping").touch()
        if rank == 0 and time.monotonic() - saved_at > CHECKPOINT_S:
            torch.save({"model": model.state_dict(), "step": step + 1}, f"{path}.tmp")
            Path(f"{path}.tmp").rename(path)
            saved_at = time.monotonic()
    Path(folder, "done").touch()
    dist.destroy_process_group()


def main() -> None:
    for workload in sys.argv[1:] or ("paced", *EXAMPLES):
        measure(workload)


def measure(workload: str) -> None:
    results: dict[str, Any] = {}
    ways: dict[str, Callable[[float | None, int], dict[str, Any]]] = {"geotrain": partial(geotrain, workload)}
    if workload == "paced":
        ways["plain DDP"] = ddp
    for mean_s in MEAN_S:
        for name, way in ways.items():
            undisturbed, found = way(None, seed=17), way(mean_s, seed=17)  # one after the other: a shared machine's speed drifts
            results.setdefault(name, {})[f"{mean_s:.0f} s"] = found
            found["undisturbed"] = undisturbed
            found["of undisturbed"] = round(found["useful_samples_per_s"] / undisturbed["useful_samples_per_s"], 3)
            print(workload, name, mean_s, json.dumps(found), flush=True)
    write(f"goodput-{workload}", results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ddp"]:
        ddp_rank(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
