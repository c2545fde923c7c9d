"""Artifacts in the Prefect UI. None of them is worth a run: while the server is away they are skipped.

Prefect's client tries for a minute to reach a server that is away. Training does not wait that long: what is shown in mid-run goes on in
a thread of its own after `PATIENCE_S`, and until it has ended the next is skipped.
"""

import re
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

PATIENCE_S = 1.0

_progress: dict[tuple[str, str], UUID] = {}
_late: list[threading.Thread] = []
_lock = threading.Lock()


def _key(*parts: str) -> str:
    """Lower case, digits and dashes: what an artifact key may hold. The same key over runs gives a history."""
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(parts).lower()).strip("-")


def _attempt(call: Callable[[], Any]) -> None:
    try:
        call()
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
        get_run_logger().warning("artifact skipped: %s", error)


def _in_passing(call: Callable[[], Any]) -> None:
    """Attempt the call in this task run's context without making it wait for long."""
    with _lock:
        _late[:] = [thread for thread in _late if thread.is_alive()]
        if _late:
            get_run_logger().warning("artifact skipped, training goes on: the Prefect server has not yet answered the last one")
            return
    thread = threading.Thread(target=copy_context().run, args=(_attempt, call), name="artifact", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        with _lock:
            _late.append(thread)


def plan(job: str, rows: list[dict[str, Any]], description: str) -> None:
    _attempt(lambda: create_table_artifact(rows, key=_key(job, "plan"), description=description))


def links(job: str, rows: list[dict[str, Any]], description: str) -> None:
    _in_passing(lambda: create_table_artifact(rows, key=_key(job, "links"), description=description))


def report(job: str, text: str) -> None:
    _attempt(lambda: create_markdown_artifact(text, key=_key(job, "report")))


def progress(run: str, job: str, region: str, percent: float) -> None:
    """One bar per region and run, moved from segment to segment."""

    def show() -> None:
        with _lock:
            artifact = _progress.get((run, region))
        if artifact is not None:
            update_progress_artifact(artifact, percent)
            return
        created = create_progress_artifact(percent, key=_key(job, region, "progress"), description=f"{run}: {region}")
        with _lock:
            _progress[run, region] = created

    _in_passing(show)
