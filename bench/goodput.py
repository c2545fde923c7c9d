"""Useful samples per second while workers, leaders, links and regions fail by a Poisson process, next to the same run undisturbed; and
the same faults on plain DDP that begins again from its last checkpoint.

Three regions, one of them with two workers. `digits` and `images` train a LeNet and a ResNet (45 MB), and say what the model has learned.
python -m bench.goodput digits 60 geotrain: that alone, into the newest result file.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.figures import newest
from bench.measure import ROOT, make_data, spread, write
from bench.plain import epochs_of
from geotrain.job import load_job, parse_job
from geotrain.report.ledger import ledger
from geotrain.run import Run
from geotrain.task import load_task
from tests.making import conduct
from tests.s3 import free_port
from tests.valve import Valve

WORKERS = {"north": 2, "south": 1, "west": 1}
TURNS = {60.0: 2, 30.0: 1, 15.0: 1}
"""Mean time between failures -> runs; of plain DDP the first alone."""
WINDOW_S = 105.0
"""How far further into the process of faults each turn begins."""
SEED = 1
"""The first that strikes as often in the first window as is to be expected: 2, 4 and 7 times."""
WORKLOADS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "digits": (
        None,
        {
            "task": "geotrain.examples.digits:Digits",
            "task_args": {"lr": 0.05},
            "train": {"batch_size": 16, "epochs": 750},
            "sync": {"strategy": "ma", "every": 8},
        },
    ),
    "images": (
        1600,
        {
            "task": "geotrain.examples.images:Images",
            "task_args": {"side": 16, "lr": 0.005},
            "train": {"batch_size": 32, "epochs": 16},
            "sync": {"strategy": "ma", "every": 8},
        },
    ),
}
"""Rows, and what the job says."""
CHECKPOINT_S = 10.0
CUT_S = 5.0
DDP_S = 120.0
"""Plain DDP is looked at for so long: a fault more often than its checkpoints, and it might never end."""


def faults(mean_s: float | None, turn: int) -> Iterator[tuple[float, str, str]]:
    """(seconds after the first inner step, what fails, the region); the same for both. Every kind strikes before one strikes again."""
    rng, at, kinds = random.Random(SEED), -turn * WINDOW_S, list[str]()
    while mean_s:
        at += rng.expovariate(1 / mean_s)
        kinds = kinds or rng.sample(["worker", "leader", "link", "region"], 4)
        kind = kinds.pop()
        region = "north" if kind == "worker" else rng.choice(list(WORKERS))
        if at > 0:
            yield at, kind, region


def job_of(workload: str, folder: Path) -> dict[str, Any]:
    """Without its regions' ways to each other."""
    rows, example = WORKLOADS[workload]
    data = make_data(workload, ",".join(WORKERS), rows=rows)
    return {
        "name": "goodput",
        "schedule": {"segment_s": CHECKPOINT_S, "allocate": "all"},
        "elastic": {"quorum": 1},
        "output": {"url": str(folder / "runs")},
        "regions": [
            {
                "name": name,
                "data": {split: str(data / name / split) for split in ("train", "eval")},
                "devices": [{"kind": "cpu", "count": count}],
            }
            for name, count in WORKERS.items()
        ],
        **example,
    }


def geotrain(workload: str, mean_s: float | None, turn: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ports = {name: free_port() for name in WORKERS}
        valves = {name: Valve(ports[name]) for name in WORKERS}
        tree = job_of(workload, Path(folder))
        for region in tree["regions"]:
            region["wan"] = {"listen": f"127.0.0.1:{ports[region['name']]}", "advertise": valves[region["name"]].address}
        run = Run.start(parse_job(tree), believe=False)
        ended, struck = threading.Event(), list[str]()

        def strike() -> None:
            while min(row.rounds for row in run.board.rows.values()) < 1:
                if ended.wait(0.02):
                    return
            began = time.monotonic()
            for at, kind, region in faults(mean_s, turn):
                if ended.wait(began + at - time.monotonic()):
                    return
                if kind == "link":
                    valves[region].open.clear()
                    threading.Timer(CUT_S, valves[region].open.set).start()
                else:
                    which = {"leader": slice(0, 1), "worker": slice(1, 2), "region": slice(None)}[kind]
                    while not kill(run, region, which):
                        if ended.wait(0.2):
                            return
                struck.append(f"{time.monotonic() - began:.0f} s: {kind} {region}")

        striking = threading.Thread(target=strike, daemon=True)
        striking.start()
        summary = conduct(run)
        ended.set()
        striking.join()
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
            "faults": struck,
            "balanced": found["balanced"],
        }


def kill(run: Run, region: str, which: slice) -> int:
    """Some of a region's workers, the first of which leads; returns how many. One that is not there at the moment cannot be killed."""
    try:
        partition = run.partitions[region]
        there = [worker for worker in partition.workers[which] if worker in partition.client.nthreads()]
        pids = partition.client.run(os.getpid, workers=there) if there else {}
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        return len(pids)
    except (OSError, RuntimeError, ValueError, KeyError):
        return 0


def ddp(workload: str, mean_s: float | None, turn: int) -> dict[str, Any]:
    """A process for every worker, with gloo; whenever one dies all begin again from the last checkpoint. A link
    that is cut makes them wait."""
    with tempfile.TemporaryDirectory() as folder:
        job = parse_job(job_of(workload, Path(folder)))
        (path := Path(folder, "job.json")).write_text(json.dumps(job.to_dict()))
        seats = [(name, worker) for name, count in WORKERS.items() for worker in range(count)]
        starts, first_step_at = 0, None
        until = faults(mean_s, turn)
        coming = next(until, None)
        done, saved, stepping = (Path(folder, name) for name in ("done", "saved", "stepping"))

        def over() -> bool:
            return done.exists() or (first_step_at is not None and time.monotonic() > first_step_at + DDP_S)

        while not over():
            starts += 1
            words = [sys.executable, "-m", "bench.goodput", "ddp", str(path), str(free_port())]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            ranks = [subprocess.Popen([*words, str(rank)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) for rank in range(len(seats))]
            while all(rank.poll() is None for rank in ranks) and not over():
                time.sleep(0.05)
                if first_step_at is None and stepping.exists():
                    first_step_at = time.monotonic()
                if first_step_at is not None and coming and time.monotonic() > first_step_at + coming[0]:
                    _, kind, region = coming
                    coming = next(until)
                    process = ranks[seats.index((region, 1 if kind == "worker" else 0))]
                    if kind == "link":
                        process.send_signal(signal.SIGSTOP)
                        time.sleep(CUT_S)
                        process.send_signal(signal.SIGCONT)
                    else:
                        process.kill()
            for process in ranks:
                if not done.exists():
                    process.kill()
                process.wait()
            if not over():
                stepping.write_text(saved.read_text() if saved.exists() else "0")
        assert first_step_at is not None
        seconds = time.monotonic() - first_step_at
        samples = int((done if done.exists() else stepping).read_text())
        return {
            "useful_samples_per_s": round(samples / seconds, 1),
            "seconds": round(seconds, 1),
            "restarts": starts - 1,
            "ended": done.exists(),
        }


def ddp_rank(path: Path, port: str, rank: int) -> None:
    """What anyone would write: an all-reduce per step, all rows spread evenly, a checkpoint by rank 0 every CHECKPOINT_S."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.join import Join
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=sum(WORKERS.values()))
    job = load_job(path)
    task = load_task("here", job.task, job.task_args)
    torch.manual_seed(job.train.seed)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    wrapped, first, checkpoint = DistributedDataParallel(model), 0, path.with_name("checkpoint.pt")
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    rows_of, epochs = epochs_of(job, task, job.regions, rank, dist.get_world_size()), int(job.train.epochs or 1)
    rows_each, steps = sum(rows.num_rows for rows in rows_of(0)), len(rows_of(0))
    saved_at, stepping = time.monotonic(), path.with_name("stepping")
    with Join([wrapped]):
        for epoch in range(first // steps, epochs):
            for step, rows in enumerate(rows_of(epoch), epoch * steps + 1):
                if step <= first:
                    continue
                optimizer.zero_grad(set_to_none=True)
                task.loss(wrapped, task.batch(rows)).backward()
                optimizer.step()
                samples = str(step * job.train.batch_size * dist.get_world_size())
                if rank == 0:
                    path.with_name("samples").write_text(samples)
                    path.with_name("samples").rename(stepping)
                if rank == 0 and time.monotonic() - saved_at > CHECKPOINT_S:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, f"{checkpoint}.tmp")
                    Path(f"{checkpoint}.tmp").rename(checkpoint)
                    path.with_name("saved").write_text(samples)
                    saved_at = time.monotonic()
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tensor([epochs * rows_each]))
    if rank == 0:
        (made := path.with_name("done.tmp")).write_text(str(sum(int(one) for one in gathered)))
        made.rename(path.with_name("done"))
    dist.barrier()  # nobody is gone before it is done
    dist.destroy_process_group()


WAYS: dict[str, Callable[[str, float | None, int], dict[str, Any]]] = {"geotrain": geotrain, "plain DDP": ddp}


def main() -> None:
    words = sys.argv[1:]
    workloads, ways = ([name for name in words if name in of] or [*of] for of in (WORKLOADS, WAYS))
    means = [float(word) for word in words if word.isdigit()]
    for workload in workloads:
        results: dict[str, Any] = newest(f"goodput-{workload}")["results"] if words else {}
        for mean_s in means or TURNS:
            for way in ways:
                results.setdefault(way, {})[f"{mean_s:.0f} s"] = measure(workload, mean_s, way)
                write(f"goodput-{workload}", results)  # hours may be lost otherwise


def measure(workload: str, mean_s: float, way: str) -> dict[str, Any]:
    """Each run beside one without faults: a shared machine's speed drifts."""
    runs = []
    for turn in range(TURNS[mean_s] if way == "geotrain" else 1):
        undisturbed, run = WAYS[way](workload, None, turn), WAYS[way](workload, mean_s, turn)
        of_it = run["useful_samples_per_s"] / undisturbed["useful_samples_per_s"]
        runs.append({**run, "undisturbed": undisturbed, "of undisturbed": round(of_it, 3)})
        print(workload, way, mean_s, json.dumps(runs[-1]), flush=True)
    return {"of undisturbed": spread([run["of undisturbed"] for run in runs]), "runs": runs}


if __name__ == "__main__":
    if sys.argv[1:2] == ["ddp"]:
        ddp_rank(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
