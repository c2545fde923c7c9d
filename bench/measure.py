"""What the measurements share: making data, running the command line as a user would, and writing dated results."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
GEOTRAIN = [sys.executable, "-m", "geotrain.cli"]


def make_data(example: str, regions: str, *, rows: int | None = None, skew: float = 0.5) -> Path:
    """Data under data/bench, made once."""
    folder = ROOT / "data" / "bench" / f"{example}-{regions.replace(',', '-')}-{rows or 'all'}"
    if not folder.exists():
        command = [*GEOTRAIN, "data", example, "--regions", regions, "--skew", str(skew), "--out", str(folder)]
        subprocess.run(command + (["--rows", str(rows)] if rows else []), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return folder


def run_job(job: str, overrides: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    """`geotrain run` in a process of its own; returns its summary, with `began` and `ended` in Unix time."""
    pairs = [word for key, value in overrides.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    began = time.time()
    command = [*GEOTRAIN, "run", str(ROOT / "bench" / "jobs" / job), "--format", "json", *pairs]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **(env or {})})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads(done.stdout)["data"]
    return {**summary, "began": began, "ended": time.time()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4), "of": len(values)}


def write(name: str, results: Any) -> Path:
    """bench/results/NAME-DATE.json, with what the machine is."""
    import torch

    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{facts['date'][:10]}.json"
    file.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    print(f"written to {file.relative_to(ROOT)}")
    return file
