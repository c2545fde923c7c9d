"""What an object store raises when it cannot be used, whichever library speaks to it; and patience with one that fails for a while."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NotConnected

UNUSABLE = (OSError, BotoCoreError, ClientError)
STORE_ERRORS = (*UNUSABLE, ValueError)
"""fsspec turns most failures into OSError; S3 without credentials or without a reachable endpoint raises botocore's own."""

T = TypeVar("T")

PATIENCE_S = 180.0
"""How long a store may fail in mid-run."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 4.0
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EREMOTEIO, errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


def may_pass(error: BaseException) -> bool:
    """Whether a store's error may be over in a while: it throttles, fails by its own fault, cannot be reached, or is full."""
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    if isinstance(error, HTTPClientError | NotConnected | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING


def patiently(do: Callable[[], T], over: threading.Event | None = None, patience_s: float = PATIENCE_S) -> T:
    """Try again, with pauses that grow, while what the store raises may pass, and `over` is not set. Raises the last of STORE_ERRORS."""
    began, pause, over = time.monotonic(), FIRST_PAUSE_S, over or threading.Event()
    while True:
        try:
            return do()
        except STORE_ERRORS as error:
            if not may_pass(error) or time.monotonic() - began > patience_s or over.is_set():
                raise
            over.wait(pause)  # once it is set there is one more try
            pause = min(2 * pause, LONGEST_PAUSE_S)


def is_local(fs: Any) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def write_whole(fs: Any, path: str, content: bytes | bytearray) -> None:
    """Write an object so that it is there whole or not at all: on a local disk by rename. Raises one of STORE_ERRORS."""
    if not is_local(fs):  # elsewhere folders are no things, and a bucket that is not there must not be made by accident
        fs.pipe_file(path, content if "s3" in fs.protocol else bytes(content))  # some take nothing else for one object
        return
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(f"{path}.tmp", "wb") as file:
        file.write(content)
    fs.mv(f"{path}.tmp", path)


def create_whole(fs: Any, path: str, content: bytes) -> bool:
    """Write an object that must not be there yet; False when it is. Of two that try at once one succeeds. Raises one of STORE_ERRORS."""
    try:
        if is_local(fs):
            fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            draft = Path(f"{path}.{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                draft.write_bytes(content)
                Path(path).hardlink_to(draft)
            finally:
                draft.unlink(missing_ok=True)
        else:
            fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        raise
    except OSError as error:
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
            return False
        raise
    return True


S3_ATTEMPTS = 8
"""Of one request, with pauses that double up to 20 s: a bucket that throttles (503 SlowDown) or fails (500) for seconds is waited for."""


def open_url(url: str, **options: Any) -> tuple[Any, str]:
    """(filesystem, path) of any fsspec URL. Raises one of STORE_ERRORS, or ImportError."""
    if url.startswith("s3://"):
        options = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": S3_ATTEMPTS}}, **options}
    fs, path = fsspec.core.url_to_fs(url, **options)
    return fs, path
