"""The partitions of a run: their clusters open all at once, and are closed whatever happens."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from geotrain.clusters import RegionCluster, open_cluster, quiet_dask
from geotrain.errors import GeotrainError, Stopped
from geotrain.job import JobSpec
from geotrain.partition.partition import Control, Listener, Partition
from geotrain.report.board import Board


class Partitions(Mapping[str, Partition]):
    """By region; those whose clusters are up."""

    def __init__(self, job: JobSpec, control: Control, board: Board, heard: Listener) -> None:
        self._job, self._control, self._board, self._heard = job, control, board, heard
        self._opening: dict[str, Future[Partition]] = {}
        self._up: dict[str, Partition] = {}
        self._closing = False

    def __getitem__(self, region: str) -> Partition:
        return self._up[region]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._up))

    def __len__(self) -> int:
        return len(self._up)

    @property
    def begun(self) -> bool:
        return bool(self._opening)

    def open(self, regions: tuple[str, ...]) -> None:
        """Begin to open these regions' clusters, and return."""
        quiet_dask()
        threads = ThreadPoolExecutor(max_workers=len(regions), thread_name_prefix="geotrain-open")
        for region in regions:
            self._board.status(region, "starting its cluster")
            self._opening[region] = threads.submit(self._open, region)
        threads.shutdown(wait=False)

    def _open(self, region: str) -> Partition:
        cluster = open_cluster(self._job.region(region), check=self._check)
        try:
            self._up[region] = self.make(self._job, region, cluster)
        except BaseException:
            cluster.close()
            raise
        self._board.status(region, "cluster is up")
        return self._up[region]

    def _check(self) -> None:
        self._control.check()
        if self._closing:
            raise Stopped(self._control.run)

    def make(self, job: JobSpec, region: str, cluster: RegionCluster) -> Partition:
        """The partition of a region that is to come in."""
        return Partition(job, region, cluster, self._control, self._heard)

    def wait(self, region: str) -> Partition:
        """Until its cluster is up. Raises ClusterError."""
        return self._opening[region].result() if region in self._opening else self._up[region]

    def take_in(self, newcomer: Partition) -> None:
        """It belongs to the run from here on; its job is the others' too."""
        self._up[newcomer.region] = newcomer
        for partition in self._up.values():
            partition.job = newcomer.job

    def close(self) -> None:
        """All of them at once, those too that are still being opened."""
        self._closing = True
        closers = [threading.Thread(target=self._close, args=(region,)) for region in self._opening.keys() | self._up.keys()]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()

    def _close(self, region: str) -> None:
        try:
            partition = self.wait(region)
        except GeotrainError:
            return
        partition.leave()
        partition.cluster.close(at_once=self._control.hurry.is_set())
