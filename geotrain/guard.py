"""A guard beside the command line: when that is killed, the Prefect server that it embeds is ended too.

Dask's workers end by themselves; the embedded server does not. The guard waits for the end of a pipe, which comes with the end of
the process that holds the other side, however it ends.
"""

import contextlib
import os
import subprocess
import sys
import uuid

MARK = "GEOTRAIN_GUARDED"
"""An environment variable that this process's children inherit, by which the guard knows them."""

_guards: list["subprocess.Popen[bytes]"] = []


def start() -> None:
    """Set the guard up. Call it before anything that it has to end is started."""
    os.environ[MARK] = uuid.uuid4().hex
    command = [sys.executable, "-m", "geotrain.guard", os.environ[MARK]]
    _guards.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


def stop() -> None:
    """Let the guard end, and wait for it."""
    while _guards:
        guard = _guards.pop()
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()


def _end_servers(mark: str) -> None:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and any("prefect.server" in word for word in process.cmdline()):
                process.terminate()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _end_servers(sys.argv[1])
