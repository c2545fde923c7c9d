"""Patience with a store that fails for a while, and none with what will not pass."""

import errno
import threading
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, NoCredentialsError

from geotrain.stores import may_pass, patiently


def failing(*errors: BaseException) -> Callable[[], str]:
    left = list(errors)

    def do() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return do


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.stores.FIRST_PAUSE_S", 0.001)


def test_what_passes_is_waited_for() -> None:
    full, throttled = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EBUSY, "Please reduce your request rate.")
    assert patiently(failing(full, throttled, ConnectionResetError(), TimeoutError())) == "done"


def test_what_does_not_pass_is_raised_at_once() -> None:
    with pytest.raises(PermissionError):
        patiently(failing(PermissionError(errno.EACCES, "Access Denied")))
    with pytest.raises(FileNotFoundError):
        patiently(failing(FileNotFoundError(errno.ENOENT, "gone")))


def test_patience_ends_with_its_time_and_with_who_waits() -> None:
    always = [OSError(errno.EIO, "InternalError")] * 1000
    with pytest.raises(OSError, match="InternalError"):
        patiently(failing(*always), patience_s=0.0)
    over = threading.Event()
    over.set()
    with pytest.raises(OSError, match="InternalError"):
        patiently(failing(*always), over)


def test_botocores_own_errors() -> None:
    def answered(status: int) -> ClientError:
        return ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]

    assert may_pass(answered(500))
    assert may_pass(answered(503))
    assert not may_pass(answered(403))
    assert may_pass(ConnectTimeoutError(endpoint_url="http://nowhere"))
    assert not may_pass(NoCredentialsError())
