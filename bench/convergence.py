"""Whether every strategy learns what single-site training learns, on the same number of samples; writes docs/convergence.md.

Real numerics on a virtual clock: 100 Mbit/s, 30 ms. `python -m bench.convergence digits` measures one task and writes nothing.
"""

import sys
from typing import Any

from bench.measure import ROOT, write
from bench.virtual import DIGITS, IMAGES, TEXT, Work, job_of, outcome_of

DOC = ROOT / "docs" / "convergence.md"
H = 16
STRATEGIES: dict[str, tuple[dict[str, Any], float]] = {
    "asgd": ({"strategy": "asgd"}, 0.5),
    "asgd_ga 4": ({"strategy": "asgd_ga", "every": 4}, 0.5),
    "asgd_ga": ({"strategy": "asgd_ga", "every": H}, 0.5),
    "asgd_ga 4, topk dgc": ({"strategy": "asgd_ga", "every": 4, "codec": "topk", "keep": 0.02, "feedback": "dgc"}, 0.1),
    "ma": ({"strategy": "ma", "every": H}, 1.0),
    "ma, async ring": ({"strategy": "ma", "every": H, "mode": "async", "topology": "ring"}, 1.0),
    "diloco": ({"strategy": "diloco", "every": H, "outer_lr": 0.7, "outer_momentum": 0.7}, 1.0),
    "diloco, int8": ({"strategy": "diloco", "every": H, "outer_lr": 0.7, "outer_momentum": 0.7, "codec": "int8"}, 1.0),
    "diloco, e3m0": ({"strategy": "diloco", "every": H, "outer_lr": 0.7, "outer_momentum": 0.7, "codec": "e3m0"}, 1.0),
    "diloco, sparseloco": ({"strategy": "diloco", "every": H, "outer_lr": 1.0, "outer_momentum": 0.0, "codec": "sparseloco"}, 1.0),
    "streaming": ({"strategy": "streaming", "every": H, "fragments": 2, "overlap_steps": 3, "outer_lr": 0.7, "outer_momentum": 0.7}, 1.0),
    "delayed": ({"strategy": "delayed", "every": H, "outer_lr": 0.7, "outer_momentum": 0.3}, 1.0),
    "delayed, int8 owners": (
        {"strategy": "delayed", "every": H, "outer_lr": 0.7, "outer_momentum": 0.3, "codec": "int8", "topology": "owners"},
        1.0,
    ),
}
"""Name -> (sync section, factor on the learning rate: deltas of R regions add up)"""
TASKS: dict[str, tuple[Work, int, float]] = {"digits": (DIGITS, 3, 0.02), "images": (IMAGES, 2, 0.05), "text": (TEXT, 2, 0.15)}
"""Name -> (work, regions, margin)"""


def measure(work: Work, regions: int) -> dict[str, Any]:
    single = outcome_of(job_of(work, 1, {"strategy": "ma", "every": H}))
    results = {"single site": row(work, single)}
    print(results, flush=True)
    for name, (sync, lr) in STRATEGIES.items():
        results[name] = row(work, outcome_of(job_of(work, regions, sync, lr=lr)))
        print(f"{work.example:7} {name:22} {results[name]}", flush=True)
    return results


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
        "rows of each kind in one region only (skew 0.5), H = 16, 100 Mbit/s and 30 ms on a virtual clock; the training is real. One run",
        "each, one seed. Pushes take half the learning rate, since the deltas of all regions add up, and a tenth with momentum correction,",
        "whose momentum of 0.9 makes steps ten times as long. Nothing else was tuned.",
        "",
    ]
    for name, rows in results.items():
        work, regions, margin = TASKS[name]
        reference = rows["single site"]["metric"]
        lines += [
            f"## {name}: {regions} regions, {rows['single site']['samples']:,} samples; margin {margin}",
            "",
            f"| strategy | {work.metric} | against single site | virtual seconds | MB over the WAN |",
            "|---|---|---|---|---|",
        ]
        for strategy, found in rows.items():
            gain = better_by(work, found["metric"], reference)
            verdict = "" if strategy == "single site" else f"{gain:+.3f}" + ("" if gain >= -margin else ", outside")
            lines.append(f"| {strategy} | {found['metric']:.3f} | {verdict} | {found['virtual_s']} | {found['megabytes']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    wanted = sys.argv[1:] or list(TASKS)
    results = {name: measure(*TASKS[name][:2]) for name in wanted}
    if not sys.argv[1:]:
        write("convergence", results)
        DOC.write_text(document(results))
    else:
        print(document(results))


if __name__ == "__main__":
    main()
