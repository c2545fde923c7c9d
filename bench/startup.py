"""From the command to the first inner steps, and where the seconds go: on the very first run of Prefect, and on later ones."""

import json
import tempfile
from pathlib import Path

from bench.measure import make_data, run_job, spread, write

REPEATS = 3


def main() -> None:
    folder = make_data("digits", "tokyo,frankfurt,virginia")
    data = {
        f"regions.{name}.data.{split}": str(folder / name / split)
        for name in ("tokyo", "frankfurt", "virginia")
        for split in ("train", "eval")
    }
    results = {}
    for name, runs in (("first", 1), ("later", 2)):
        seconds, stages = [], []
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as home:
                for _ in range(runs):
                    summary = run_job("startup.yaml", data, env={"PREFECT_HOME": home})
            seconds.append(first_round_at(summary) - summary["began"])
            stages.append(summary["stages"])
        results[name] = {"command_to_first_round_s": spread(seconds), "stages": stages[-1]}
        print(f"{name:6} {results[name]['command_to_first_round_s']}")
    write("startup", results)


def first_round_at(summary: dict[str, str]) -> float:
    lines = Path(summary["folder"], "rounds.jsonl").read_text().splitlines()
    return min(json.loads(line)["at"] for line in lines)


if __name__ == "__main__":
    main()
