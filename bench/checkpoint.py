"""What a checkpoint costs training: 45 MB and 1 GB, staged beside the steps, next to `torch.save` between them; and reading it back."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.measure import spread, write
from geotrain import checkpoint
from geotrain.checkpoint import StoredPart
from geotrain.partition.memory import keep_freed_memory
from geotrain.partition.staging import Stager

SIZES = {"45 MB": (45e6, 1024, 16), "1 GB": (1e9, 4096, 1)}
"""Bytes of parameters, width of a layer, rows of a batch."""
SEGMENT_S = 10.0
"""The default of `schedule.segment_s`."""
TURNS = 5


class Training:
    """A model of so many bytes in fp32 and its steps, in one thread."""

    def __init__(self, size: float, width: int, rows: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(round(size / 4 / width**2))))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.batch = torch.randn(rows, width)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def segment(self, begin: Callable[[], float]) -> tuple[float, float]:
        """(seconds until training goes on, steps per second of all the segment's time)."""
        began, steps = time.monotonic(), 0
        stall_s = begin()
        while time.monotonic() - began < SEGMENT_S:
            self.step()
            steps += 1
        return stall_s, steps / (time.monotonic() - began)


def measure(size: str) -> dict[str, Any]:
    training = Training(*SIZES[size])
    told: list[dict[str, Any]] = []
    stager = Stager("here", told.append)
    training.step()
    with tempfile.TemporaryDirectory() as folder:

        def staged() -> float:
            waited = stager.stage(folder, len(told), training.model.state_dict(), {"round": len(told)})
            stager.write({})
            return waited

        def saved() -> float:
            began = time.monotonic()
            torch.save(training.model.state_dict(), f"{folder}/plain.pt")
            return time.monotonic() - began

        ways: dict[str, Callable[[], float]] = {"nothing": lambda: 0.0, "staged": staged, "torch.save": saved}
        stager.prepare(sum(tensor.nbytes for tensor in training.model.state_dict().values()))  # as a seat does in its first round
        _, beside = training.segment(lambda: 0.0)
        first_stall_s, _ = training.segment(staged)
        training.segment(saved)
        stalls: dict[str, list[float]] = {name: [] for name in ways}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(TURNS):
            for name in list(ways)[turn % 3 :] + list(ways)[: turn % 3]:
                stall_s, speed = training.segment(ways[name])
                stalls[name].append(stall_s)
                speeds[name].append(speed)
        stager.close()
        part = StoredPart(**told[-1]["stored"])
        reads = {"verified": lambda: checkpoint.read_part(part), "torch.load": lambda: torch.load(f"{folder}/plain.pt")}
        return {
            "stall_s": {name: spread(stalls[name]) for name in ("staged", "torch.save")},
            "first stall_s": first_stall_s,
            "steps while memory is taken / steps without": beside / statistics.median(speeds["nothing"]),
            "stall of a segment": {name: spread([s / SEGMENT_S for s in stalls[name]]) for name in ("staged", "torch.save")},
            "steps / steps without a checkpoint": {
                name: spread([a / b for a, b in zip(speeds[name], speeds["nothing"], strict=True)]) for name in ("staged", "torch.save")
            },
            "written_s": spread([message["seconds"] for message in told[1:]]),
            "bytes": {"part": part.bytes, "torch.save": Path(folder, "plain.pt").stat().st_size},
            "read_s": {name: spread([timed(read) for _ in range(3)]) for name, read in reads.items()},
        }


def timed(read: Callable[[], Any]) -> float:
    began = time.monotonic()
    read()
    return time.monotonic() - began


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    results = {}
    for size in SIZES:
        results[size] = measure(size)
        print(size, json.dumps(results[size], indent=1), flush=True)
    write("checkpoint", {"segment_s": SEGMENT_S, **results})


if __name__ == "__main__":
    main()
