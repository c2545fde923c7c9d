"""The application, and the arguments that its commands share."""

from typing import Annotated, Any

import typer
import yaml

from geotrain.answers import Format
from geotrain.errors import JobError

EXIT_CODES = """
Exit codes: 0 done; 2 the job or the command line is wrong; 3 your task; 4 data; 5 a cluster; 6 between regions;
7 run folder, checkpoint or registry; 75 stopped on request, `geotrain resume` continues; 130 interrupted before there was
anything to keep.
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train one PyTorch model on data that lives in several regions, without moving the data.\n\n"
    "A first look: [bold]geotrain data digits --regions 3 --skew 0.5[/], then "
    "[bold]geotrain run deployments/jobs/digits-3-regions.yaml[/].",
    epilog=EXIT_CODES.replace("\n", " "),
)


JobFile = Annotated[str, typer.Argument(metavar="JOB", help="The job file (YAML).")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the path or URL of its folder.")]
Runs = Annotated[str, typer.Option("--runs", help="Where run folders lie.")]
Without = Annotated[
    list[str] | None, typer.Option("--without", metavar="REGION", help="A region that leaves the run for good; may be given again.")
]
Shape = Annotated[Format, typer.Option("--format", help="text for people; json prints one envelope on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the job: --set sync.every=16 --set train.epochs=5.")
]


def parse_overrides(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE, the value as YAML. Raises JobError."""
    parsed = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise JobError(f"--set {pair}: write KEY=VALUE")
        parsed[key] = yaml.safe_load(value)
    return parsed
