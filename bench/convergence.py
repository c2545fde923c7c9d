"""Whether every strategy learns what single-site training learns, on the same number of samples; writes docs/convergence.md.

Real numerics on a virtual clock: 100 Mbit/s, 30 ms. `python -m bench.convergence digits` measures one task and writes nothing.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from bench.measure import ROOT, write
from bench.virtual import DIGITS, IMAGES, TEXT, Work, job_of, outcome_of

DOC = ROOT / "docs" / "convergence.md"


@dataclass(frozen=True)
class Trial:
    """A task, and what was chosen for it by a few tries."""

    work: Work
    regions: int
    margin: float
    every: int
    """H of the merges."""
    lr: float
    """Factor on the learning rate of pushes: the deltas of R regions add up."""
    accumulate: tuple[int, float]
    """Of `asgd_ga`: steps between two pushes, and its own factor."""
    keep: float
    """sparseloco's, of each chunk: a model this small in rounds this few gets little through 1/64."""


TASKS = {
    "digits": Trial(DIGITS, 3, 0.02, 16, 0.5, (4, 0.5), 1 / 64),
    "images": Trial(replace(IMAGES, samples=18_000), 2, 0.05, 16, 0.15, (4, 0.3), 1 / 64),
    "text": Trial(
        replace(TEXT, samples=40_000, rows=20_000, args={"layers": 2, "width": 64, "lr": 0.004}), 2, 0.2, 8, 0.5, (2, 0.25), 1 / 8
    ),
}
OUTER = {"outer_lr": 0.7, "outer_momentum": 0.3}
DELAYED = {"strategy": "delayed", "outer_lr": 1.0, "outer_momentum": 0.0}


def strategies(trial: Trial) -> dict[str, tuple[dict[str, Any], float]]:
    """Name -> (sync section, factor on the learning rate)."""
    h, lr = trial.every, trial.lr
    rows: dict[str, tuple[dict[str, Any], float]] = {
        "asgd": ({"strategy": "asgd"}, lr),
        "asgd_ga": ({"strategy": "asgd_ga", "every": trial.accumulate[0]}, trial.accumulate[1]),
        "asgd_ga, topk": ({"strategy": "asgd_ga", "every": 4, "codec": "topk", "keep": 0.1}, lr),
        "ma": ({"strategy": "ma", "every": h}, 1.0),
        "ma, async ring": ({"strategy": "ma", "every": h, "mode": "async", "topology": "ring"}, 1.0),
        "diloco": ({"strategy": "diloco", "every": h, **OUTER}, 1.0),
        "diloco, int8": ({"strategy": "diloco", "every": h, **OUTER, "codec": "int8"}, 1.0),
        "diloco, e3m0": ({"strategy": "diloco", "every": h, **OUTER, "codec": "e3m0"}, 1.0),
        "diloco, sparseloco": (
            {"strategy": "diloco", "every": h, "outer_lr": 1.0, "outer_momentum": 0.0, "codec": "sparseloco", "keep": trial.keep},
            1.0,
        ),
        "streaming": ({"strategy": "streaming", "every": h, "fragments": 2, "overlap_steps": 3, **OUTER}, 1.0),
        "delayed": ({**DELAYED, "every": h}, 1.0),
        "delayed, int8 owners": ({**DELAYED, "every": h, "codec": "int8", "topology": "owners"}, 1.0),
    }
    if trial.work is DIGITS:  # momentum correction is for an inner optimizer without momentum of its own
        rows["asgd_ga, topk dgc"] = ({"strategy": "asgd_ga", "every": 4, "codec": "topk", "keep": 0.02, "feedback": "dgc"}, 0.2 * lr)
    return rows


def measure(trial: Trial, pool: ProcessPoolExecutor) -> dict[str, Any]:
    job_of(trial.work, trial.regions, {"strategy": "asgd"})  # makes the data, once
    single = {"single site": (1, {"strategy": "ma", "every": trial.every}, 1.0)}
    several = {name: (trial.regions, sync, lr) for name, (sync, lr) in strategies(trial).items()}
    found = {name: pool.submit(run, trial.work, *facts) for name, facts in (single | several).items()}
    for name, future in found.items():
        print(f"{trial.work.example:7} {name:22} {future.result()}", flush=True)
    return {name: future.result() for name, future in found.items()}


def run(work: Work, regions: int, sync: dict[str, Any], lr: float) -> dict[str, Any]:
    return row(work, outcome_of(job_of(work, regions, sync, lr=lr)))


def row(work: Work, outcome: Any) -> dict[str, Any]:
    return {
        "metric": round(outcome.metrics[work.metric], 4),
        "samples": outcome.samples,
        "virtual_s": round(outcome.seconds, 1),
        "megabytes": round(outcome.wan_bytes / 1e6, 1),
    }


def better_by(work: Work, value: float, reference: float) -> float:
    """How much better than the reference; negative: worse."""
    return value - reference if work.metric == "accuracy" else reference - value


def document(results: dict[str, Any]) -> str:
    lines = [
        "# Convergence",
        "",
        "Made by `python -m bench.convergence`. Every strategy against single-site training on the same number of samples, half of the",
        "rows of each kind in one region only (skew 0.5), 100 Mbit/s and 30 ms on a virtual clock; the training is real. One run each,",
        "one seed. More regions make fewer steps of as many more rows: that, and what is lost between them, is what the margin is for.",
        "Chosen by a few tries, for each task as a whole: H, the learning rate of pushes, and what sparseloco keeps. Outer learning rate",
        "0.7 and momentum 0.3; for `delayed` and sparseloco 1 and 0. Deltas of `asgd_ga` add up, so a round that gets a good part of",
        "the way is overshot by R such rounds at once: on text, with AdamW, pushing every 4 steps ended at a loss of 2.02 with half the",
        "learning rate; sent by topk, whose feedback spreads them, they did not overshoot.",
        "",
    ]
    for name, rows in results.items():
        trial = TASKS[name]
        work, reference = trial.work, rows["single site"]["metric"]
        lines += [
            f"## {name}: {trial.regions} regions, {rows['single site']['samples']:,} samples, H = {trial.every}; margin {trial.margin}",
            "",
            f"Pushes take {trial.lr:g} of the learning rate; `asgd_ga` pushes every {trial.accumulate[0]} steps at {trial.accumulate[1]:g} "
            f"(with topk every 4 at {trial.lr:g}); sparseloco keeps {trial.keep:.3g} of the numbers.",
            "",
            f"| strategy | {work.metric} | against single site | virtual seconds | MB over the WAN |",
            "|---|---|---|---|---|",
        ]
        for strategy, found in rows.items():
            gain = better_by(work, found["metric"], reference)
            verdict = "" if strategy == "single site" else f"{gain:+.3f}" + ("" if gain >= -trial.margin else ", outside")
            lines.append(f"| {strategy} | {found['metric']:.3f} | {verdict} | {found['virtual_s']} | {found['megabytes']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = {name: measure(TASKS[name], pool) for name in sys.argv[1:] or TASKS}
    if not sys.argv[1:]:
        write("convergence", results)
        DOC.write_text(document(results))
    else:
        print(document(results))


if __name__ == "__main__":
    main()
