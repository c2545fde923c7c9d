"""Artifacts in the Prefect UI. None of them is worth a run: when the server is away they are skipped."""

import re
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

_progress: dict[tuple[str, str], UUID] = {}
_lock = threading.Lock()


def _key(*parts: str) -> str:
    """Lower case, digits and dashes: what an artifact key may hold. The same key over runs gives a history."""
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(parts).lower()).strip("-")


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
        get_run_logger().warning("artifact skipped, training goes on: %s", error)
        return None


def table(job: str, what: str, rows: list[dict[str, Any]], description: str) -> None:
    _attempt(lambda: create_table_artifact(rows, key=_key(job, what), description=description))


def markdown(job: str, what: str, text: str) -> None:
    _attempt(lambda: create_markdown_artifact(text, key=_key(job, what)))


def progress(run: str, job: str, region: str, percent: float) -> None:
    """One bar per region and run, moved from segment to segment."""
    with _lock:
        artifact = _progress.get((run, region))
    if artifact is not None:
        _attempt(lambda: update_progress_artifact(artifact, percent))
        return
    created = _attempt(lambda: create_progress_artifact(percent, key=_key(job, region, "progress"), description=f"{run}: {region}"))
    if created is not None:
        with _lock:
            _progress[run, region] = created
