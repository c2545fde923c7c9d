"""Jobs on a virtual clock with real numbers, for convergence and reproduction: the training is real, the clock and the WAN are not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import make_data
from geotrain.job import JobSpec, parse_job
from geotrain.simulate.simulate import simulate
from geotrain.simulate.simulation import Outcome

NAMES = ("tokyo", "virginia", "paris")


@dataclass(frozen=True)
class Work:
    """One learning problem, sized for a machine without a GPU."""

    task: str
    example: str
    metric: str
    samples: int
    batch_size: int
    samples_per_s: float
    """Of one device, as assumed on the virtual clock."""
    rows: int | None = None
    args: dict[str, Any] = field(default_factory=dict)
    skew: float = 0.5


DIGITS = Work("geotrain.examples.digits:Digits", "digits", "accuracy", 60_000, 16, 29_000, args={"lr": 0.1})
IMAGES = Work("geotrain.examples.images:Images", "images", "accuracy", 6_000, 16, 200, 2000, {"side": 16, "width": 16, "lr": 0.02})
TEXT = Work("geotrain.examples.text:Text", "text", "loss", 8_000, 16, 100, 4000, {"layers": 2, "width": 96, "lr": 0.002})
CLICKS = Work("geotrain.examples.clicks:Clicks", "clicks", "log_loss", 160_000, 64, 40_000, 40_000)


def job_of(
    work: Work,
    regions: int,
    sync: dict[str, Any],
    *,
    lr: float = 1.0,
    assumed: bool = False,
    simulate: dict[str, Any] | None = None,
    **more: Any,
) -> JobSpec:
    """The work spread over regions. `lr`: a factor on the task's learning rate. `assumed`: without data, `rows` in each region."""
    names = NAMES[:regions]
    if assumed:
        folder, simulate = Path("/nowhere"), {**(simulate or {}), "rows": work.rows}
    else:
        folder = make_data(work.example, ",".join(names), rows=work.rows, skew=work.skew)
    args = {**work.args, **({"lr": work.args["lr"] * lr} if "lr" in work.args and lr != 1 else {})}
    tree = {
        "name": work.example,
        "task": work.task,
        "task_args": args,
        "regions": [
            {
                "name": name,
                "data": {"train": str(folder / name / "train"), "eval": str(folder / name / "eval")},
                "devices": [{"samples_per_s": work.samples_per_s, "usd_per_hour": 1.0}],
            }
            for name in names
        ],
        "links": {"mbit_per_s": 100, "rtt_ms": 30},
        "train": {"batch_size": work.batch_size, "samples": work.samples, "seed": 1},
        "sync": sync,
        "schedule": {"segment_rounds": 1_000_000},
        **({"simulate": simulate} if simulate else {}),
        **more,
    }
    return parse_job(tree)


def outcome_of(job: JobSpec, *, real: bool = True) -> Outcome:
    return simulate(job, real=real)
