"""One suite for every kind of cluster: open, use, scale, close."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from distributed import LocalCluster as DaskLocalCluster
from distributed.security import Security

from geotrain.clusters import open_cluster, quiet_dask
from geotrain.clusters.code import pack
from geotrain.errors import ClusterTooSmall, ClusterUnreachable, JobError, Stopped
from geotrain.job import AddressCluster, ClassCluster, DataSpec, Device, LocalCluster, RegionSpec, SecurityFiles
from geotrain.wan import certs
from tests.s3 import free_port


def region(cluster: object, devices: tuple[Device, ...] = (Device(),)) -> RegionSpec:
    return RegionSpec(name="north", data=DataSpec(train="t"), cluster=cluster, devices=devices)  # type: ignore[arg-type]


@contextmanager
def tls_cluster(folder: Path) -> Iterator[tuple[str, SecurityFiles]]:
    """A scheduler and two workers that speak to nobody without a certificate of their CA."""
    certs.make_ca(folder)
    cert = certs.make_region(folder, "dask")
    files = SecurityFiles(ca=str(folder / "ca.pem"), cert=str(cert), key=str(cert.with_suffix(".key")))
    names = {
        f"tls_{who}_{what}": path for who in ("scheduler", "worker", "client") for what, path in (("cert", files.cert), ("key", files.key))
    }
    security = Security(tls_ca_file=files.ca, require_encryption=True, **names)
    with DaskLocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tls://", security=security
    ) as theirs:
        yield theirs.scheduler_address, files


def test_a_tls_scheduler_lets_nobody_in_without_its_files(tmp_path: Path) -> None:
    quiet_dask()
    with tls_cluster(tmp_path) as (address, files):
        assert address.startswith("tls://")
        with pytest.raises(ClusterUnreachable, match="region north"):
            open_cluster(region(AddressCluster(kind="address", address=address)))
        certs.make_ca(tmp_path / "other")
        other = certs.make_region(tmp_path / "other", "dask")
        wrong = SecurityFiles(ca=files.ca, cert=str(other), key=str(other.with_suffix(".key")))
        with pytest.raises(ClusterUnreachable, match="region north"):
            open_cluster(region(AddressCluster(kind="address", address=address, security=wrong)))


def test_a_scheduler_that_is_not_there_leaves_no_thread_behind() -> None:
    quiet_dask()
    before = set(threading.enumerate())
    with pytest.raises(ClusterUnreachable, match="region north"):
        open_cluster(region(AddressCluster(kind="address", address=f"tcp://127.0.0.1:{free_port()}")), 1.0)
    assert not [thread for thread in threading.enumerate() if thread not in before and thread.name == "IO loop"]


def test_nobody_waits_for_a_scheduler_that_is_not_there_when_the_run_is_to_end() -> None:
    quiet_dask()
    end = threading.Event()

    def check() -> None:
        if end.is_set():
            raise Stopped("run")
        end.set()

    with pytest.raises(Stopped):
        open_cluster(region(AddressCluster(kind="address", address=f"tcp://127.0.0.1:{free_port()}")), 600.0, check)


@pytest.fixture(params=["local", "address", "tls", "class"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RegionSpec]:
    quiet_dask()
    match request.param:
        case "local":
            yield region(LocalCluster())
        case "class":
            args = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
            yield region(ClassCluster(kind="class", path="distributed:LocalCluster", args=args))
        case "address":
            with DaskLocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp://") as theirs:
                yield region(AddressCluster(kind="address", address=theirs.scheduler_address))
        case "tls":
            with tls_cluster(tmp_path) as (address, files):
                yield region(AddressCluster(kind="address", address=address, security=files))


def test_a_cluster_works_scales_and_closes(spec: RegionSpec) -> None:
    with open_cluster(spec) as cluster:
        assert cluster.client.submit(sum, [1, 2], pure=False).result(timeout=30) == 3
        workers = cluster.scale(2)
        assert len(set(workers)) == 2
        assert cluster.workers() == workers
        assert "http" in cluster.dashboard
    assert cluster.client.status == "closed"


def test_code_reaches_workers_that_come_later_too(spec: RegionSpec, tmp_path: Path) -> None:
    (tmp_path / "brought.py").write_text("def answer():\n    return 42\n")

    def ask() -> int:
        import brought  # type: ignore[import-not-found]

        return int(brought.answer())

    with open_cluster(spec) as cluster:
        cluster.ship((str(tmp_path / "brought.py"),))
        for worker in cluster.scale(2):
            assert cluster.client.submit(ask, workers=[worker], pure=False).result(timeout=30) == 42


def test_a_worker_that_outlives_a_run_takes_the_next_runs_code(tmp_path: Path) -> None:
    def ask() -> int:
        import changing  # type: ignore[import-not-found]

        return int(changing.VERSION)

    with open_cluster(region(LocalCluster())) as cluster:
        for version in (1, 2):
            (tmp_path / "changing.py").write_text(f"VERSION = {version}\n")
            cluster.ship((str(tmp_path / "changing.py"),))
            assert cluster.client.submit(ask, pure=False).result(timeout=30) == version


@pytest.mark.parametrize(
    ("cluster", "where"),
    [
        (AddressCluster(kind="address", address="tcp://127.0.0.1:1"), "tcp://127.0.0.1:1"),
        (ClassCluster(kind="class", path="distributed:NoSuchCluster"), "distributed:NoSuchCluster"),
        (ClassCluster(kind="class", path="no_such_module:Cluster"), "no_such_module:Cluster"),
        (ClassCluster(kind="class", path="distributed:LocalCluster", args={"no_such_argument": 1}), "distributed:LocalCluster"),
    ],
    ids=["address", "class", "module", "argument"],
)
def test_a_cluster_that_is_not_there_is_named(cluster: object, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.CONNECT_S", 1.0)
    with pytest.raises(ClusterUnreachable, match=f"region north: no Dask cluster at {where}"):
        open_cluster(region(cluster))


def test_workers_of_this_machine_that_do_not_listen_can_be_ended_at_once() -> None:
    with open_cluster(region(LocalCluster())) as cluster:
        (pid,) = cluster.client.run(os.getpid, workers=cluster.scale(1)).values()
        worker = psutil.Process(pid)
        worker.suspend()
        cluster.cluster.kill_workers()
        worker.wait(30)
        nannies, until = list(cluster.cluster.workers.values()), time.monotonic() + 30
        while time.monotonic() < until and any(nanny.status.name != "closed" for nanny in nannies):
            time.sleep(0.05)
        assert {nanny.status.name for nanny in nannies} == {"closed"}, "no other takes its place"


def test_clusters_of_several_regions_start_side_by_side_in_a_fresh_process() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from geotrain.clusters import open_cluster, quiet_dask
from geotrain.job import DataSpec, RegionSpec

def main():
    quiet_dask()
    specs = [RegionSpec(name=name, data=DataSpec(train="t")) for name in ("north", "south", "west", "east")]
    with ThreadPoolExecutor(4) as threads:
        clusters = list(threads.map(open_cluster, specs))
    assert all(cluster.scale(1) for cluster in clusters)
    for cluster in clusters:
        cluster.close()

if __name__ == "__main__":
    main()
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr[-2000:]


def test_an_existing_cluster_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geotrain.clusters.cluster.GROW_MARGIN_S", 0.3)
    with DaskLocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp://") as theirs:
        with open_cluster(region(AddressCluster(kind="address", address=theirs.scheduler_address))) as cluster:
            with pytest.raises(ClusterTooSmall, match="3 workers were planned, 1 came"):
                cluster.scale(3)


def test_each_worker_sees_one_gpu_and_two_may_share() -> None:
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    with open_cluster(region(LocalCluster(gpus=(1, 1)), (Device(kind="h100", count=2),))) as cluster:
        cluster.scale(2)
        assert list(cluster.client.run(seen).values()) == ["1", "1"]
    with open_cluster(region(LocalCluster(), (Device(kind="h100", count=2),))) as cluster:
        cluster.scale(2)
        assert sorted(str(number) for number in cluster.client.run(seen).values()) == ["0", "1"]


def test_code_that_is_not_there_or_is_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        pack((str(tmp_path / "absent.py"),))
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "weights.bin").write_bytes(b"0" * 1000)
    assert b"mine/__init__.py" in pack((str(package),))
    assert b"weights.bin" not in pack((str(package),))
    assert pack((str(package),)) == pack((str(package),)), "the same code packs to the same bytes"
