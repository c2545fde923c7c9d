"""How the command line answers: tables for people, one JSON envelope for programs, an exit code for both."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.live import Live

from geotrain.errors import GeotrainError, Stopped, StoreUnusable

SCHEMA_VERSION = 1
INTERRUPTED = 130

people = Console(stderr=True, highlight=False)
"""Progress and errors go to stderr, so that stdout holds answers alone."""
answers = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


class Format(StrEnum):
    text = "text"
    json = "json"


def envelope(status: str, exit_code: int, **content: Any) -> None:
    """Print {schema_version, status, exit_code, data | error}."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, "status": status, "exit_code": exit_code, **content}) + "\n")


@contextmanager
def answering(shape: Format) -> Iterator[None]:
    """Turn geotrain's errors into a message with a remedy, or an envelope, and its exit code."""
    try:
        with _stores_named():
            yield
    except GeotrainError as error:
        status = "stopped" if isinstance(error, Stopped) else "error"
        if shape is Format.json:
            content = {"type": type(error).__name__, "message": error.message, "remedy": error.advice, **_plain(error.named)}
            envelope(status, error.exit_code, error=content)
        else:
            people.print(f"[bold {'yellow' if status == 'stopped' else 'red'}]{status}[/]", end=" ")
            people.print(error.message, markup=False)
            if error.advice:
                people.print(f"  -> {error.advice}", markup=False, style="cyan")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if shape is Format.json:
            envelope("stopped", INTERRUPTED, error={"type": "Interrupted", "message": "interrupted before there was anything to keep"})
        else:
            people.print("[bold yellow]interrupted[/] before there was anything to keep")
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def _stores_named() -> Iterator[None]:
    """What an object store or a disk raises that cannot be read is an answer too. Raises StoreUnusable."""
    try:
        yield
    except Exception as error:
        from geotrain.stores import UNUSABLE  # it imports what speaks to S3: not for `--help`

        if not isinstance(error, UNUSABLE):
            raise
        raise StoreUnusable(error) from error


def _plain(named: dict[str, object]) -> dict[str, Any]:
    return {"about": {key: value if isinstance(value, str | int | float) else str(value) for key, value in named.items()}}


@contextmanager
def watching(this: Any) -> Iterator[None]:
    """The live table in a terminal; elsewhere a line whenever the stage changes, and every ten seconds."""
    if people.is_terminal:
        from geotrain.report.live import LiveView

        with Live(LiveView(this.board), console=people, refresh_per_second=4):
            yield
        return
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(this.board, over), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell(board: Any, over: threading.Event) -> None:
    told, told_at = "", -10.0
    while True:
        state = board.snapshot()
        if state["stage"] != told or state["seconds"] - told_at >= 10:
            told, told_at = state["stage"], state["seconds"]
            rounds = " ".join(f"{row['region']}:{row['rounds']}" for row in state["regions"] if row["rounds"])
            metrics = " ".join(f"{name} {value:.4f}" for name, value in state["metrics"].items())
            people.print(f"{state['seconds']:7.1f} s  {told}  {rounds}  {metrics}".rstrip(), markup=False, soft_wrap=True)
        if over.wait(0.2):
            return
