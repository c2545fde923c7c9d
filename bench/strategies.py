"""Strategies side by side: two regions, 100 Mbit/s, 30 ms; digits (62 k parameters) and ResNet (11.2 M); the same samples for all."""

import json
from pathlib import Path
from typing import Any

from bench.measure import make_data, run_job, write

STRATEGIES: dict[str, dict[str, Any]] = {
    "asgd": {"strategy": "asgd", "max_staleness": 8},
    "asgd_ga 4": {"strategy": "asgd_ga", "every": 4, "max_staleness": 8},
    "asgd_ga 8": {"strategy": "asgd_ga", "every": 8, "max_staleness": 8},
    "asgd_ga 16": {"strategy": "asgd_ga", "every": 16, "max_staleness": 8},
    "ma 8": {"strategy": "ma", "every": 8},
    "ma 8, async": {"strategy": "ma", "every": 8, "mode": "async", "max_staleness": 8},
    "diloco 16": {"strategy": "diloco", "every": 16},
    "diloco 16, bf16": {"strategy": "diloco", "every": 16, "codec": "bf16"},
}
TASKS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "digits": (
        "digits",
        None,
        {"task": "geotrain.examples.digits:Digits", "task_args": {"lr": 0.1}, "train.batch_size": 16, "train.epochs": 20},
    ),
    "ResNet": (
        "images",
        1600,
        {"task": "geotrain.examples.images:Images", "task_args": {"side": 16, "lr": 0.02}, "train.batch_size": 32, "train.epochs": 3},
    ),
}


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    for name, (example, rows, overrides) in TASKS.items():
        folder = make_data(example, "tokyo,virginia", rows=rows)
        data = {
            f"regions.{region}.data.{split}": str(folder / region / split)
            for region in ("tokyo", "virginia")
            for split in ("train", "eval")
        }
        results[name] = {}
        for strategy, sync in STRATEGIES.items():
            summary = run_job("strategies.yaml", {**overrides, **data, "sync": sync})
            results[name][strategy] = {
                "seconds": round(summary["measured"]["seconds"], 2),
                "predicted_seconds": round(summary["predicted"]["seconds"], 2),
                "waited_s": round(max(region["held_s"] for region in summary["regions"]), 2),
                "wan_megabytes": round(summary["measured"]["wan_bytes"] / 1e6, 1),
                "samples": summary["samples"],
                "accuracy": round(summary["metrics"]["accuracy"], 4),
                "loss": round(summary["metrics"]["loss"], 4),
                "last_training_loss": round(last_training_loss(summary["folder"]), 4),
            }
            print(f"{name:7} {strategy:16} {results[name][strategy]}", flush=True)
    write("strategies", results)


def last_training_loss(folder: str) -> float:
    """Mean over the samples of every region's last tenth of rounds."""
    records = [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]
    first = 0.9 * max(record["round"] for record in records)
    late = [record for record in records if record["round"] >= first and record["loss"] is not None]
    return sum(record["loss"] * record["samples"] for record in late) / sum(record["samples"] for record in late)


if __name__ == "__main__":
    main()
