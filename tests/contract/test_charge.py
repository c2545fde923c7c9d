"""Who is in charge of a run: the same on a disk, in memory and on S3."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from geotrain import charge
from geotrain.charge import Charge, ask, wait_for_end
from geotrain.errors import NotRunning, RunTaken


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('bucket')}/{tmp_path.name}"
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield str(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.05), ("RENEW_S", 0.1), ("LEASE_S", 1.0)):
        monkeypatch.setattr(charge, name, seconds)


@pytest.fixture
def holders(url: str) -> Iterator[Callable[[], tuple[Charge, list[str]]]]:
    made: list[Charge] = []

    def make() -> tuple[Charge, list[str]]:
        heard: list[str] = []
        made.append(Charge("run", url, lambda what, more: heard.append(what)))
        return made[-1], heard

    yield make
    for one in made:
        one.release()


Make = Callable[[], tuple[Charge, list[str]]]


def test_one_holder_at_a_time(holders: Make) -> None:
    (first, _), (second, _) = holders(), holders()
    first.take()
    with pytest.raises(RunTaken, match="in the hands of process"):
        second.take()
    first.check()
    first.release()
    second.take()
    second.check()


def test_a_holder_that_gives_no_sign_is_followed_and_fenced_off(holders: Make) -> None:
    (first, heard), (second, _) = holders(), holders()
    first.take()
    first._over.set()  # as if it had been stopped in its tracks
    told: list[str] = []
    second.take(told.append)
    assert told == ["waiting for a sign of life of the process that had this run before"]
    with pytest.raises(RunTaken):
        first.check()
    assert heard == []


def test_a_holder_that_comes_back_hears_that_it_is_not_in_charge(holders: Make) -> None:
    (first, heard), (second, _) = holders(), holders()
    first.take()
    second.number = first.number
    assert charge.create_whole(second.fs, second._name(second.number + 1), second._content(0))
    until = time.monotonic() + 10
    while "lost" not in heard:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_process_that_is_known_to_have_ended_is_not_waited_for(holders: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, _), (second, _) = holders(), holders()
    first.take()
    monkeypatch.setattr(charge, "gone", lambda holder: True)
    monkeypatch.setattr(charge, "LEASE_S", 1e9)
    second.take()
    assert second.number == first.number + 1


def test_of_many_at_once_one_succeeds(url: str, holders: Make) -> None:
    outcomes: list[bool] = []
    start = threading.Barrier(6)

    def attempt(one: Charge) -> None:
        start.wait()
        outcomes.append(charge.create_whole(one.fs, one._name(1), b"{}"))

    threads = [threading.Thread(target=attempt, args=(holders()[0],)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 5 + [True]


def test_requests_are_heard_once_and_those_of_an_earlier_holder_never(url: str, holders: Make) -> None:
    ask(url, "force")
    one, heard = holders()
    one.take()
    ask(url, "stop")
    until = time.monotonic() + 10
    while not heard:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)
    assert heard == ["stop"]


def test_waiting_for_the_end(url: str, holders: Make) -> None:
    with pytest.raises(NotRunning):
        wait_for_end("run", url)
    one, _ = holders()
    one.take()
    threading.Timer(0.3, one.release).start()
    wait_for_end("run", url)
    with pytest.raises(NotRunning):
        wait_for_end("run", url)
