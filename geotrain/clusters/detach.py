"""Preloaded in worker processes of this machine: they leave the flow's process group, and end with the process that they are forked from.

Ctrl-C in a terminal, and a Prefect worker that cancels a run, signal the whole group. The flow answers by draining, for which it
needs its workers; they end with it, since Dask watches their parent. Without the process that they are forked from Dask takes them for
lost, and replaces them: one that went on would keep its GPU and its port.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # sys/prctl.h of Linux


def dask_setup(_: object) -> None:
    """Called by Dask in a worker that starts."""
    os.setpgrp()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None and "geotrain.clusters.forked" in sys.modules:  # else the parent is a thread of the flow
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
