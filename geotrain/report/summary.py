"""summary.json: what was predicted, what was measured, who did what."""

from collections.abc import Mapping
from typing import Any

from geotrain.job import JobSpec
from geotrain.plan.planner import Plan
from geotrain.report.board import Board
from geotrain.report.folder import RunFolder

Totals = Mapping[str, Mapping[str, float]]
"""Region -> samples, seconds, held_s, wire_bytes, egress_usd."""
Traffic = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Region -> target -> link counters."""


def summarize(job: JobSpec, plan: Plan, folder: RunFolder, board: Board, totals: Totals, traffic: Traffic) -> dict[str, Any]:
    """The summary of a complete run. Seconds and dollars are of the training part; bytes include headers."""
    seconds = max(total["seconds"] for total in totals.values())
    egress = sum(total["egress_usd"] for total in totals.values())
    usd_per_s = sum(region.usd_per_round for region in plan.regions) / plan.round_s if plan.round_s else 0.0
    return {
        "run": folder.run,
        "folder": folder.url,
        "status": "completed",
        "job": job.name,
        "strategy": _words(job),
        "metrics": board.metrics,
        "rounds": max(row.rounds for row in board.rows.values()),
        "samples": int(sum(total["samples"] for total in totals.values())),
        "predicted": {"seconds": plan.seconds, "usd": plan.usd, "wan_bytes": plan.wan_bytes},
        "measured": {
            "seconds": seconds,
            "usd": usd_per_s * seconds + egress,
            "wan_bytes": int(sum(total["wire_bytes"] for total in totals.values())),
        },
        "regions": [{"region": region, **total} for region, total in sorted(totals.items())],
        "links": [
            {"source": source, "target": target, **link} for source, links in sorted(traffic.items()) for target, link in links.items()
        ],
        "first_step_s": board.first_step_at,
        "stages": [list(stage) for stage in board.stages],
        "seconds": board.snapshot()["seconds"],
    }


def _words(job: JobSpec) -> str:
    """The sync section in a line: `ma, every 8, fp32`."""
    facts = job.sync.model_dump()
    every = f"every {facts['every']}" if "every" in facts else "every step"
    mode = f" ({facts['mode']})" if "mode" in facts else ""
    return f"{facts['strategy']}{mode}, {every}, {facts['codec']}"
