"""What `geotrain doctor` measured of the links, kept beside the runs: what a plan believes before what the job says."""

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from geotrain.checkpoint import join, read_bytes, write_bytes
from geotrain.job import JobSpec
from geotrain.stores import STORE_ERRORS


def url_of(job: JobSpec) -> str:
    return join(job.output.url, f"{job.name}.links.json")


def write(job: JobSpec, links: Mapping[str, Mapping[str, float]]) -> str:
    """`links`: `tokyo>virginia` -> {mbit_per_s, rtt_ms}. Returns where. Raises OutputUnwritable."""
    write_bytes("the flow", url_of(job), json.dumps({"at": time.time(), "links": links}, indent=1).encode())
    return url_of(job)


def read(job: JobSpec) -> dict[str, Any] | None:
    """{at, links} for the regions that the job has; None where nothing was measured."""
    names = {region.name for region in job.regions}
    try:
        tree = json.loads(read_bytes(url_of(job)))
        links = {pair: link for pair, link in tree["links"].items() if set(pair.split(">")) <= names}
        return {"at": float(tree["at"]), "links": links} if links else None
    except (*STORE_ERRORS, KeyError, TypeError):
        return None


def believed(job: JobSpec, found: Mapping[str, Any] | None) -> JobSpec:
    """The job with its links as they were measured, if they were."""
    if found is None:
        return job
    return job.with_links({pair: (link["mbit_per_s"], link["rtt_ms"]) for pair, link in found["links"].items()})


def told(job: JobSpec) -> str | None:
    """For people: that the links are not the job's own words."""
    if (found := read(job)) is None:
        return None
    when = datetime.fromtimestamp(found["at"], UTC)
    return f"links as `geotrain doctor` measured them on {when:%F %H:%M} UTC: {url_of(job)} (remove it to believe the job)"
