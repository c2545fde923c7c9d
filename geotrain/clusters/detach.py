"""Preloaded in worker processes of this machine: they leave the flow's process group, draw random numbers of their own, and end without
taking themselves apart.

Ctrl-C in a terminal, and a Prefect worker that cancels a run, signal the whole group. The flow answers by draining, for which it
needs its workers; they end with it, since Dask watches their parent.
"""

import atexit
import os

import numpy as np


def dask_setup(_: object) -> None:
    """Called by Dask in a worker that starts."""
    os.setpgrp()
    np.random.seed()  # the one that was forked with this process is every worker's
    atexit.register(os._exit, 0)  # what Python does after this takes seconds with torch in it, and is for nothing
