"""A guard beside the command line: when that is killed, the Prefect server that it embeds is ended too.

Dask's workers end by themselves; the embedded server does not. The guard waits for the end of a pipe, which comes with the end of
the process that holds the other side, however it ends.
"""

import atexit
import contextlib
import gc
import os
import subprocess
import sys
import uuid

MARK = "GEOTRAIN_GUARDED"
"""An environment variable that this process's children inherit, by which the guard knows them."""


def start() -> None:
    """Set the guard up, until this process ends. Call it before Prefect is imported.

    What is registered first for a process's end is called last: Prefect's threads still have logs to send to the server, and
    Prefect then ends the server itself. A guard that is let go before that would end the server under them, and they would
    try to reach it for a minute and more.
    """
    os.environ[MARK] = uuid.uuid4().hex
    command = [sys.executable, "-m", "geotrain.guard", os.environ[MARK]]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(gc.freeze)  # the last of all: Python would look through all that Prefect and Dask have made, for a second and more
    atexit.register(guard.communicate)


def _end_servers(mark: str) -> None:
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and any("prefect.server" in word for word in process.cmdline()):
                process.terminate()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _end_servers(sys.argv[1])
