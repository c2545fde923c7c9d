"""The board: what is known of a run at this moment, for the live table and `geotrain status`. Thread-safe."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SPEED_WINDOW_S = 5.0


@dataclass(slots=True)
class RegionRow:
    """One region's line."""

    region: str
    status: str = "pending"
    """pending, starting, running, finished, failed; or what it is doing just now."""
    rounds: int = 0
    samples: int = 0
    loss: float | None = None
    wire_bytes: int = 0
    held_s: float = 0.0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=4096))
    """(time, rows) of the last rounds."""

    def samples_per_s(self) -> float | None:
        """Over the last seconds of training; None before there are two rounds."""
        if len(self.recent) < 2:
            return None
        newest = self.recent[-1][0]
        window = [(at, rows) for at, rows in self.recent if newest - at <= SPEED_WINDOW_S]
        span = newest - window[0][0]
        return sum(rows for _, rows in window[1:]) / span if span > 0 else None


def link_rows(links: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What people are shown of every directed link; the busiest first."""
    rows = [
        {
            "link": f"{source} > {target}",
            "wire_bytes": link["wire_bytes"],
            "bytes_per_s": link["bytes_per_s"],
            "rtt_s": link["rtt_s"],
            "retries": link["retries"],
            "blocked_s": round(link["blocked_s"], 3),
            "hidden_s": round(max(0.0, link["busy_s"] - link["blocked_s"]), 3),
        }
        for (source, target), link in links.items()
    ]
    return sorted(rows, key=lambda row: (-row["wire_bytes"], row["link"]))


class Board:
    """Region rows, the stage that the run is in, and since when."""

    def __init__(self, regions: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.rows = {region: RegionRow(region) for region in regions}
        self.stage = "starting"
        self.began = clock()
        self.first_step_at: float | None = None
        """Seconds from `began` to the first reported round."""
        self.rounds: int | None = None
        """Planned."""
        self.metrics: dict[str, float] = {}
        self.links: dict[tuple[str, str], Mapping[str, Any]] = {}
        """(from, to) -> its counters, as its sender told last."""
        self.stages: list[tuple[str, float]] = [("starting", 0.0)]
        """(stage, seconds after `began`)."""
        self._lock = threading.RLock()

    def enter(self, stage: str) -> None:
        with self._lock:
            if stage != self.stage:
                self.stage = stage
                self.stages.append((stage, round(self.clock() - self.began, 3)))

    def add(self, region: str) -> None:
        """A region that came in."""
        with self._lock:
            self.rows[region] = RegionRow(region)

    def status(self, region: str, status: str) -> None:
        with self._lock:
            self.rows[region].status = status

    def heard(self, region: str, message: Mapping[str, Any]) -> None:
        """Take in what a leader reports."""
        with self._lock:
            row = self.rows[region]
            for record in message.get("rounds", ()):
                row.rounds = record["round"] + 1
                row.samples += record["samples"]
                row.held_s += record["held_s"]
                row.loss = record["loss"] if record["loss"] is not None else row.loss
                row.recent.append((record["at"], record["samples"]))
                if self.first_step_at is None:
                    self.first_step_at = self.clock() - self.began
            for to, link in message.get("links", {}).items():
                self.links[region, to] = link
            row.wire_bytes = sum(link["wire_bytes"] for (source, _), link in self.links.items() if source == region)

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            rows = [
                {
                    "region": row.region,
                    "status": row.status,
                    "rounds": row.rounds,
                    "samples": row.samples,
                    "samples_per_s": row.samples_per_s(),
                    "loss": row.loss,
                    "wire_bytes": row.wire_bytes,
                    "held_s": round(row.held_s, 3),
                }
                for row in self.rows.values()
            ]
            return {
                "stage": self.stage,
                "seconds": round(self.clock() - self.began, 1),
                "rounds": self.rounds,
                "metrics": dict(self.metrics),
                "regions": rows,
                "links": link_rows(self.links),
            }
