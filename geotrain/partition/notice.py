"""SIGTERM to a worker's process is a notice: its machine is about to be taken away, as spot instances and pods are."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

GOES_AFTER_S = 60.0
"""Seats that nobody has taken back by then are not waited for."""

_HEEDING = threading.Event()


def heed(noticed: Callable[[], None], free: Callable[[], bool]) -> bool:
    """At the next SIGTERM call `noticed`; once the process is `free`, it ends as it would have ended at once. A second SIGTERM ends it.

    False where that cannot be: Python hears signals in the main thread alone, where Dask runs what is sent by `Client.run`.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if _HEEDING.is_set():
        return True
    before: Any = signal.getsignal(signal.SIGTERM)

    def go() -> None:
        until = time.monotonic() + GOES_AFTER_S
        while not free() and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        _HEEDING.clear()
        noticed()
        threading.Thread(target=go, name="geotrain-notice", daemon=True).start()

    _HEEDING.set()
    signal.signal(signal.SIGTERM, handle)
    return True
