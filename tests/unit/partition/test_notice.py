"""A worker's process that gets SIGTERM leaves in peace, and is gone after a while whatever becomes of its seats."""

import signal
import subprocess
import sys

import pytest

PROCESS = """
import sys, time
from geotrain.partition import notice
notice.GOES_AFTER_S = float(sys.argv[1])
assert notice.heed(lambda: print("noticed", flush=True), free=lambda: sys.argv[2] == "free")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("after_s", "seats", "signals"),
    [("600", "free", 1), ("0.2", "kept", 1), ("600", "kept", 2)],
    ids=["its seats are given up", "nobody takes its seats back", "a second SIGTERM"],
)
def test_it_ends_as_it_would_have_at_once(after_s: str, seats: str, signals: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROCESS, after_s, seats], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "noticed\n"
        if signals == 2:
            process.terminate()
        assert process.wait(timeout=60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
