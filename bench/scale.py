"""How large a WAN the simulator takes: 1,000 regions for 100 and for 1,000 rounds, without numbers, on one core."""

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from bench.measure import write
from geotrain.job import parse_job
from geotrain.simulate.simulate import many, simulate

REGIONS, TIMES = 1000, 3
STRATEGIES: dict[str, dict[str, Any]] = {
    "ma": {"strategy": "ma"},
    "delayed": {"strategy": "delayed"},
    "ma, async ring": {"strategy": "ma", "mode": "async", "topology": "ring"},
}
EVERY, BATCH = 10, 10


def once(name: str, rounds: int) -> dict[str, float]:
    """In this process: seconds, with reading and planning, and the most memory that it took."""
    tree = {
        "name": "scale",
        "task": "geotrain.examples.digits:Digits",
        "regions": [{"name": region, "data": {"train": f"/nowhere/{region}"}} for region in ("tokyo", "virginia")],
        "links": {"mbit_per_s": 100, "rtt_ms": 100, "jitter_ms": 5},
        "train": {"batch_size": BATCH, "epochs": 1},
        "simulate": {"rows": rounds * EVERY * BATCH, "model_mb": 45},
        "sync": {**STRATEGIES[name], "every": EVERY},
    }
    began = time.perf_counter()
    outcome = simulate(many(parse_job(tree), REGIONS), real=False)
    seconds = time.perf_counter() - began
    assert (outcome.rounds, outcome.stuck) == (rounds, False), outcome.rounds
    return {"seconds": round(seconds, 1), "megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def measure(name: str, rounds: int, times: int) -> dict[str, Any]:
    found = []
    for _ in range(times):
        done = subprocess.run([sys.executable, "-m", "bench.scale", name, str(rounds)], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    seconds = [one["seconds"] for one in found]
    return {
        "seconds": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "megabytes": max(one["megabytes"] for one in found),
    }


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(once(sys.argv[1], int(sys.argv[2]))))
        return
    results = {}
    for name in STRATEGIES:
        for rounds, times in ((100, 1), (1000, TIMES)):
            results[f"{name}, {REGIONS} regions, {rounds} rounds"] = found = measure(name, rounds, times)
            print(f"{name:16} {rounds:5} rounds {found}", flush=True)
    write("scale", results)


if __name__ == "__main__":
    main()
