"""geotrain's command line, and its composition root: here the flows, the library and the terminal meet."""

import os
from typing import Annotated

import typer

from geotrain import __version__
from geotrain.answers import answers
from geotrain.cli import beginnings, plans, runs
from geotrain.cli.arguments import app

__all__ = ["app", "beginnings", "main", "plans", "runs"]
"""The modules register their commands when they are imported."""


def main() -> None:
    """The `geotrain` command."""
    prefect_defaults()
    app()


def prefect_defaults() -> None:
    """What Prefect is to do in a process that geotrain started; whatever the user has set stands."""
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        answers.print(__version__)
        raise typer.Exit
