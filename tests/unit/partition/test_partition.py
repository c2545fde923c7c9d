"""A partition takes no worker that hung, or is about to end, however it asks for its workers."""

from pathlib import Path
from typing import Any

import pytest

from geotrain.errors import ClusterTooSmall, ClusterUnreachable, RunTaken
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

    def workers(self) -> list[str]:
        return list(self.there)

    def scale(self, workers: int) -> list[str]:
        if not self.there:
            raise OSError("no scheduler")
        return self.there[:workers]


@pytest.fixture
def cluster() -> Any:
    return Cluster("a", "b", "c")


@pytest.fixture
def partition(tmp_path: Path, cluster: Any) -> Partition:
    return Partition(points_job(tmp_path), "north", cluster, Control("run"), lambda region, message: None)


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


def test_a_scheduler_that_is_gone_is_a_cluster_that_cannot_be_reached(partition: Partition, cluster: Cluster) -> None:
    cluster.there.clear()
    with pytest.raises(ClusterUnreachable, match="region north"):
        partition.scale(1)


def test_who_was_overtaken_ends_nobodys_workers(tmp_path: Path, cluster: Any) -> None:
    def taken() -> None:
        raise RunTaken("run", "another process")

    partition = Partition(points_job(tmp_path), "north", cluster, Control("run", fence=taken), lambda region, message: None)
    with pytest.raises(RunTaken):
        partition._restart(["a"])
    assert partition.regroup(3, 0.0) == 3
