"""What all tests share: a quiet Prefect in a home of its own, one compute thread, and a check that nothing is left behind."""

import atexit
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver

os.environ |= {
    "PREFECT_HOME": tempfile.mkdtemp(prefix="geotrain-prefect-"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "OMP_NUM_THREADS": "1",
}

import psutil
import pytest
import torch
from hypothesis import settings

from tests.s3 import bucket, flaky, s3_server

__all__ = ["bucket", "flaky", "s3_server"]

atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)  # after Prefect, imported later, has ended its server
settings.register_profile("geotrain", deadline=None, derandomize=True)
settings.load_profile("geotrain")
torch.set_num_threads(1)


def ours(thread: threading.Thread) -> bool:
    return thread.name.startswith("geotrain-")


def lasts(child: psutil.Process) -> bool:
    """Python's own helpers, and the servers that a whole test session shares."""
    try:
        words = " ".join(child.cmdline())
    except psutil.Error:
        return True
    forked_from = forkserver._forkserver._forkserver_pid  # what is forked from it has its words
    return child.pid == forked_from or any(name in words for name in ("resource_tracker", "moto.server", "prefect.server"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No thread of ours and no child process outlives a test that started it."""
    before, threads = {child.pid for child in psutil.Process().children(recursive=True)}, set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if ours(thread) and thread not in threads]
    assert not left, left
    children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before and not lasts(child)]
    _, lasting = psutil.wait_procs(children, timeout=10)
    assert not lasting, [child.cmdline() for child in lasting]
