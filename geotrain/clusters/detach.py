"""Preloaded in worker processes of this machine: they leave the flow's process group, and end without taking themselves apart.

Ctrl-C in a terminal, and a Prefect worker that cancels a run, signal the whole group. The flow answers by draining, for which it
needs its workers; they end with it, since Dask watches their parent.
"""

import atexit
import os


def dask_setup(_: object) -> None:
    """Called by Dask in a worker that starts."""
    os.setpgrp()
    atexit.register(os._exit, 0)  # what Python does after this takes seconds with torch in it, and is for nothing
