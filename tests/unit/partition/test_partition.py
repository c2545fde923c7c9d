"""A partition takes no worker that hung, or is about to end, however it asks for its workers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from geotrain.clusters import RegionCluster
from geotrain.errors import ClusterTooSmall, ClusterUnreachable, RunTaken, Stopped
from geotrain.partition.partition import Control, Partition
from tests.making import points_job


class Client:
    scheduler = "tcp://here"

    def subscribe_topic(self, *_: Any) -> None: ...
    def unsubscribe_topic(self, *_: Any) -> None: ...


class Cluster:
    """Whose workers are these."""

    def __init__(self, *workers: str) -> None:
        self.client, self.there, self.cluster = Client(), list(workers), None

    def workers(self, check: Callable[[], None]) -> list[str]:
        check()
        return list(self.there)

    def scale(self, workers: int, check: Callable[[], None]) -> list[str]:
        check()
        return self.there[:workers]


@pytest.fixture
def cluster() -> Any:
    return Cluster("a", "b", "c")


@pytest.fixture
def partition(tmp_path: Path, cluster: Any) -> Partition:
    return Partition(points_job(tmp_path), "north", cluster, Control("run"), lambda region, message: None)


@contextmanager
def scheduler(identity: Callable[..., Any]) -> Iterator[RegionCluster]:
    """A cluster whose scheduler answers so."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    client = SimpleNamespace(scheduler=SimpleNamespace(identity=identity), loop=SimpleNamespace(asyncio_loop=loop))
    try:
        yield RegionCluster("north", cast(Any, client), None, ExitStack())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_one_that_hung_gets_no_seat(partition: Partition) -> None:
    partition._unusable.add("a")
    partition.scale(2)
    assert partition.workers == ["b", "c"]
    with pytest.raises(ClusterTooSmall, match="3 workers were planned, 2 came"):
        partition.scale(3)
    assert partition.regroup(3, 0.0) == 2


def test_one_that_came_to_the_same_address_does(partition: Partition, cluster: Cluster) -> None:
    partition._unusable.add("a")
    cluster.there.remove("a")
    partition.scale(2)
    cluster.there.insert(0, "a")
    partition.scale(2)
    assert partition.workers == ["a", "b"]


def test_one_that_was_busy_for_too_long_does_once_it_is_free(partition: Partition) -> None:
    answer = SimpleNamespace(status="pending")
    partition._unusable.add("a")
    partition._owed["a"] = cast(Any, answer)
    assert partition.regroup(2, 0.0) == 2
    assert partition.workers == ["b", "c"]
    answer.status = "finished"
    partition.scale(2)
    assert partition.workers == ["a", "b"]


def test_workers_are_let_go_after_a_failure_too(partition: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "_take_back", lambda workers: None)
    partition.control.abort.set()
    assert partition.let_go(["a"])


def test_nobody_waits_for_workers_of_a_run_that_is_to_end(partition: Partition) -> None:
    partition.control.abort.set()
    with pytest.raises(Stopped):
        partition.scale(1)


@pytest.mark.parametrize("error", [OSError("no scheduler"), TimeoutError()])
def test_a_scheduler_that_is_gone_or_stands_still_is_a_cluster_that_cannot_be_reached(error: Exception) -> None:
    async def identity(**_: Any) -> None:
        raise error

    with scheduler(identity) as asked, pytest.raises(ClusterUnreachable, match=f"region north: .*{error or 'TimeoutError'}"):
        asked.workers()


def test_nobody_waits_for_the_answer_of_a_scheduler_when_the_run_is_to_end() -> None:
    control, cancelled = Control("run"), threading.Event()

    def check() -> None:
        if control.abort.is_set():
            raise Stopped(control.run)

    async def identity(**_: Any) -> None:
        control.abort.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    with scheduler(identity) as asked:
        with pytest.raises(Stopped):
            asked.there(check)
        assert cancelled.wait(10)


def test_what_a_provider_raises_is_a_cluster_that_cannot_be_reached() -> None:
    class ApiException(Exception): ...

    def scale(_: int) -> None:
        raise ApiException("403: quota")

    cluster = RegionCluster("north", cast(Any, None), SimpleNamespace(scale=scale), ExitStack())
    with pytest.raises(ClusterUnreachable, match="region north: .*ApiException: 403: quota"):
        cluster.ask_for(2)


def test_who_was_overtaken_ends_nobodys_workers(tmp_path: Path, cluster: Any) -> None:
    def taken() -> None:
        raise RunTaken("run", "another process")

    partition = Partition(points_job(tmp_path), "north", cluster, Control("run", fence=taken), lambda region, message: None)
    with pytest.raises(RunTaken):
        partition._restart(["a"])
    assert partition.regroup(3, 0.0) == 3


def test_an_order_to_end_is_said_again_until_other_seats_are_taken(partition: Partition, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Answer:
        """That comes once something was said so often."""

        def __init__(self, after: int) -> None:
            self.after = after

        @property
        def status(self) -> str:
            return "pending" if said.count("watched") < self.after else "finished"

        def result(self, timeout: float) -> None: ...

    monkeypatch.setattr("geotrain.partition.partition.WORKERS_CHECK_S", 0.0)
    monkeypatch.setattr(partition, "_tell", lambda name, *args: said.append(name))
    monkeypatch.setattr(partition, "_check_workers", lambda *args: None)
    partition._await([cast(Any, Answer(2))], "training")
    assert "abort" not in said
    partition.tell_abort()
    partition._await([cast(Any, Answer(4))], "training")
    assert said.count("abort") == 3
    partition._lives = {8}
    partition._await([cast(Any, Answer(6))], "training")
    assert said.count("abort") == 3
