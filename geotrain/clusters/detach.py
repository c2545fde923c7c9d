"""Preloaded in worker processes of this machine: they leave the flow's process group.

Ctrl-C in a terminal, and a Prefect worker that cancels a run, signal the whole group. The flow answers by draining, for which it
needs its workers; they end with it, since Dask watches their parent.
"""

import os


def dask_setup(_: object) -> None:
    """Called by Dask in a worker that starts."""
    os.setpgrp()
