"""What geotrain costs where it has nothing to do: one region, one worker, no WAN, against a plain loop on the same batches.

Alternating runs, one compute thread each. The ratio is geotrain's samples/s over the plain loop's: 1 is no overhead. There are two
plain loops: one makes its tensors from Arrow rows in memory as it goes, the other has them ready before its time begins.
"""

import json
import subprocess
import sys

from bench.measure import ROOT, make_data, run_job, spread, write

REPEATS = 3
TASKS = {
    "LeNet": ("digits", None, {"task": "geotrain.examples.digits:Digits", "train.batch_size": 64, "train.epochs": 100, "sync.every": 100}),
    "ResNet": (
        "images",
        1200,
        {
            "task": "geotrain.examples.images:Images",
            "task_args": {"side": 16},
            "train.batch_size": 32,
            "train.epochs": 2,
            "sync.every": 30,
        },
    ),
    "GPT": ("text", 1600, {"task": "geotrain.examples.text:Text", "train.batch_size": 16, "train.epochs": 2, "sync.every": 80}),
}


def main() -> None:
    results = {}
    for name, (example, rows, overrides) in TASKS.items():
        folder = make_data(example, "here", rows=rows)
        settings = {
            **overrides,
            "regions.here.data.train": str(folder / "here" / "train"),
            "regions.here.data.eval": str(folder / "here" / "eval"),
        }
        speeds: dict[str, list[float]] = {"geotrain": [], "plain": [], "plain, tensors ready": []}
        for _ in range(REPEATS):
            summary = run_job("overhead.yaml", settings)
            speeds["geotrain"].append(summary["samples"] / summary["measured"]["seconds"])
            for which, flag in (("plain", []), ("plain, tensors ready", ["--ready"])):
                command = [sys.executable, "-m", "bench.plain", str(ROOT / "bench/jobs/overhead.yaml"), json.dumps(settings), *flag]
                done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
                assert done["samples"] == summary["samples"], "not the same batches"
                speeds[which].append(done["samples"] / done["seconds"])
        results[name] = {f"ratio to {which}": spread(ratios(speeds, which)) for which in ("plain", "plain, tensors ready")}
        results[name] |= {f"{which}, samples/s": spread(values) for which, values in speeds.items()}
        print(f"{name:7} {results[name]}", flush=True)
    write("overhead", results)


def ratios(speeds: dict[str, list[float]], which: str) -> list[float]:
    return [ours / theirs for ours, theirs in zip(speeds["geotrain"], speeds[which], strict=True)]


if __name__ == "__main__":
    main()
