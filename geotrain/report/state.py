"""What a run folder says about its run: for `geotrain status`, whether or not the run is alive."""

import time
from typing import Any

from geotrain import checkpoint
from geotrain.job import JobSpec
from geotrain.report.folder import RunFolder, list_runs

ENDS = {"completed": "completed", "failed": "failed", "stopped": "stopped", "nothing_new": "completed"}
SILENT_S = 30.0
"""A run that said nothing for so long is called silent: it was killed, or waits for something."""


def state_of(folder: RunFolder, now: float | None = None) -> dict[str, Any]:
    """Status, round, metrics, last sign of life, and what can be done."""
    events = list(folder.lines("events.jsonl"))
    regions: dict[str, dict[str, Any]] = {}
    last_sign = events[-1]["at"] if events else 0.0
    newest = {(record["region"], record["round"]): record for record in folder.lines("rounds.jsonl")}  # a resumed run repeats rounds
    for record in newest.values():
        row = regions.setdefault(record["region"], {"region": record["region"], "rounds": 0, "samples": 0, "loss": None})
        row["rounds"] = record["round"] + 1
        row["samples"] += record["samples"]
        row["loss"] = record["loss"] if record["loss"] is not None else row["loss"]
        last_sign = max(last_sign, record["at"])
    silent_s = (now if now is not None else time.time()) - last_sign
    last = events[-1] if events else {"event": "created"}
    manifest = checkpoint.latest(folder.url)
    alive = _membership(events) if regions else "starting"
    status = ENDS.get(last["event"]) or ("silent" if silent_s > SILENT_S else alive)
    metrics: dict[str, float] = next((event["metrics"] for event in reversed(events) if "metrics" in event), {})
    return {
        "run": folder.run,
        "folder": folder.url,
        "status": status,
        "round": min((row["rounds"] for row in regions.values()), default=0),
        "rounds": folder.read_json("plan.json")["rounds"] if folder.has("plan.json") else None,
        "metrics": metrics,
        "silent_s": round(silent_s, 1),
        "message": last.get("message", ""),
        "checkpoint": f"before round {manifest.round}" if manifest else None,
        "resumable": manifest is not None and status in ("failed", "stopped", "silent"),
        "regions": [regions[name] for name in sorted(regions)],
    }


def _membership(events: list[dict[str, Any]]) -> str:
    """running; degraded: it goes on without a region; recovering: it waits for its quorum."""
    view = next((event for event in reversed(events) if event["event"] in ("view", "resumed")), None)
    if view is None or view["event"] == "resumed":
        return "running"
    away = {event["region"] for event in events if event["event"] == "seated"} - set(view["regions"])
    if len(view["regions"]) < view["quorum"]:
        return "recovering"
    return "degraded" if away else "running"


def last_unfinished(job: JobSpec) -> RunFolder | None:
    """The newest run of a job of this name, where it has a checkpoint and no end."""
    for folder in reversed(list_runs(job.output.url)):
        if folder.job().name == job.name:
            return None if folder.has("summary.json") or checkpoint.latest(folder.url) is None else folder
    return None
