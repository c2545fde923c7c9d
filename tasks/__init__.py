"""Prefect tasks: names, logs and artifacts around the stages of geotrain.run.Run. No logic.

Not DaskTaskRunner: one plain task per region drives that region's own Dask client from a thread. No tags and no cache: both cost
server calls that a run must not depend on.
"""

from tasks.partition import evaluate, merge_fully, provision, synchronize, train_partition
from tasks.placement import analyze_locality, probe, schedule
from tasks.publication import publish, report

__all__ = [
    "analyze_locality",
    "evaluate",
    "merge_fully",
    "probe",
    "provision",
    "publish",
    "report",
    "schedule",
    "synchronize",
    "train_partition",
]
