"""A region's Dask cluster: opened, scaled to the plan, closed whatever happens."""

import asyncio
import importlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack, suppress
from typing import Any, assert_never

import dask
from distributed import Client
from distributed.security import Security

from geotrain.clusters.code import CodePlugin, pack
from geotrain.errors import ClusterTooSmall, ClusterUnreachable, GeotrainError
from geotrain.job import AddressCluster, ClassCluster, LocalCluster, RegionSpec

_STARTING = threading.Lock()
"""Dask imports parts of itself while a cluster starts, and two threads that do so at once can see a half-imported module."""

CONNECT_S = 30.0
ANSWER_S = 20.0
"""A scheduler that answers nothing for so long stands still."""
LOOK_S = 0.1
"""Between two looks whether anybody waits for it."""
GROW_S = 120.0
SHRINK_S = 30.0
"""For workers that are too many to go."""
GROW_MARGIN_S = 10.0
"""Time that any cluster gets, when its own pace is not known."""

CLIENT_ERRORS = (OSError, TimeoutError, ValueError, RuntimeError, AttributeError, CancelledError)
"""What a Dask client raises that has lost its scheduler; AttributeError, since it then has none."""


class ReachingClient(Client):
    """Dask's waits for ever for a scheduler that stands still and whose machine takes the connection. It also leaves a thread and an event
    loop behind where nobody answers, until garbage is collected: which then may wait for itself.
    """

    def __init__(self, *args: Any, timeout: float, check: Callable[[], None] = lambda: None, **more: Any) -> None:
        """`check`: called while the scheduler does not answer; raises when nobody is to wait any longer. `timeout`: of a cluster that is
        being begun for its scheduler alone, not for its first worker.
        """
        self._within_s, self._check_meanwhile = timeout, check
        try:
            super().__init__(*args, timeout=timeout, **more)
        except BaseException:
            with suppress(Exception):
                self.close(1.0)
            self.status = "closed"
            if (runner := getattr(self, "_loop_runner", None)) is not None:
                runner.stop()
            raise

    def start(self, **more: Any) -> None:
        if self.status != "newly-created":
            return
        self._loop_runner.start()
        within_s = self._within_s if self.cluster is None else math.inf
        answer(asyncio.run_coroutine_threadsafe(self._start(**more), self.loop.asyncio_loop), within_s, self._check_meanwhile)


def answer(asked: Future[Any], within_s: float, check: Callable[[], None]) -> Any:
    """What comes of it. Raises TimeoutError, and what `check` raises, which is called while there is no answer."""
    until = time.monotonic() + within_s
    try:
        while wait([asked], timeout=LOOK_S).not_done and time.monotonic() < until:
            check()
        return asked.result(timeout=0)
    finally:
        asked.cancel()


class RegionCluster:
    """A client of one region's scheduler, and the cluster behind it where geotrain started that. A context manager."""

    def __init__(self, region: str, client: Client, cluster: Any | None, stack: ExitStack) -> None:
        self.region, self.client, self.cluster = region, client, cluster
        self._stack = stack

    @property
    def dashboard(self) -> str:
        return str(self.client.dashboard_link)

    @property
    def where(self) -> str:
        """Of its scheduler, for people."""
        return str(self.client.scheduler) if self.client.scheduler is not None else "its address"

    def there(self, check: Callable[[], None] = lambda: None, within_s: float | None = None) -> dict[str, float]:
        """Worker -> its last heartbeat by the scheduler's clock. Raises ClusterUnreachable.

        `check`: called while the scheduler does not answer; raises when nobody is to wait any longer. `within_s`: ANSWER_S unless told.
        """
        try:
            asked = asyncio.run_coroutine_threadsafe(self.client.scheduler.identity(n_workers=-1), self.client.loop.asyncio_loop)
            known = answer(asked, ANSWER_S if within_s is None else within_s, check)["workers"]
        except CLIENT_ERRORS as error:
            raise ClusterUnreachable(self.region, self.where, error) from error
        return {address: worker["last_seen"] for address, worker in known.items()}

    def workers(self, check: Callable[[], None] = lambda: None) -> list[str]:
        """Addresses of all workers, sorted. Raises ClusterUnreachable. `check`: as of `there`."""
        return sorted(self.there(check))

    def scale(self, workers: int, check: Callable[[], None] = lambda: None) -> list[str]:
        """Ask for so many workers and wait for them; returns the addresses to use. Raises ClusterTooSmall, ClusterUnreachable.

        An existing scheduler (`address`) is not scaled: it must have the workers. `check`: called meanwhile; raises when nobody is to wait
        any longer.
        """
        if len(self.workers(check)) != workers:
            self.ask_for(workers)
        began = time.monotonic()
        while len(found := self.workers(check)) != workers:
            check()
            waited = time.monotonic() - began
            if len(found) > workers and (self.cluster is None or waited > SHRINK_S):
                break
            if len(found) < workers and waited > (GROW_S if self.cluster is not None else GROW_MARGIN_S):
                raise ClusterTooSmall(self.region, workers, len(found), waited)
            time.sleep(0.1)
        return found[:workers]

    def ask_for(self, workers: int) -> None:
        """So many, of a cluster of our own. Raises ClusterUnreachable."""
        if self.cluster is not None:
            try:
                self.cluster.scale(workers)
            except Exception as error:  # whatever a provider's library raises
                raise ClusterUnreachable(self.region, type(self.cluster).__name__, f"{type(error).__name__}: {error}") from error

    def ship(self, code: tuple[str, ...]) -> None:
        """Put the user's files on every worker's import path, those that come later too."""
        if code:
            self.client.register_plugin(CodePlugin(pack(code)), name="geotrain-code")

    def close(self, *, at_once: bool = False) -> None:
        """`at_once`: processes of this machine get no time to end by themselves."""
        try:
            if at_once and self.cluster is not None and hasattr(self.cluster, "kill_workers"):
                self.cluster.kill_workers()
        finally:
            self._stack.close()

    def __enter__(self) -> "RegionCluster":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_cluster(spec: RegionSpec, connect_s: float | None = None, check: Callable[[], None] = lambda: None) -> RegionCluster:
    """Connect to a region's cluster, starting it with one worker where it is ours to start. Raises ClusterError.

    `connect_s`: how long the scheduler of one that is not ours may take to answer, CONNECT_S unless told. `check`: called meanwhile; raises
    when nobody is to wait any longer. One that is begun is waited for whatever happens: it costs money until it is closed.
    """
    stack = ExitStack()
    where = "?"
    try:
        match spec.cluster:
            case LocalCluster():
                from geotrain.clusters.local import RegionLocalCluster

                where = "this machine"
                with _STARTING:
                    cluster = stack.enter_context(RegionLocalCluster(spec))
                client = stack.enter_context(ReachingClient(cluster, set_as_default=False, timeout=CONNECT_S))
            case AddressCluster():
                where, cluster = spec.cluster.address, None
                waits: dict[str, Any] = {"timeout": CONNECT_S if connect_s is None else connect_s, "check": check}
                client = stack.enter_context(ReachingClient(where, set_as_default=False, security=_security(spec.cluster), **waits))
            case ClassCluster():
                where = spec.cluster.path
                with _STARTING:
                    cluster = stack.enter_context(_cluster_class(spec.name, where)(**spec.cluster.args))
                client = stack.enter_context(ReachingClient(cluster, set_as_default=False, timeout=CONNECT_S))
                if not RegionCluster(spec.name, client, cluster, stack).there():
                    cluster.scale(1)
            case _:
                assert_never(spec.cluster)
    except BaseException as error:
        stack.close()  # a cluster that was begun costs money
        if isinstance(error, GeotrainError) or not isinstance(error, Exception):
            raise
        raise ClusterUnreachable(spec.name, where, error) from error  # whatever a provider's library raises
    return RegionCluster(spec.name, client, cluster, stack)


def _security(cluster: AddressCluster) -> Security | None:
    if cluster.security is None:
        return None
    files = cluster.security
    return Security(tls_ca_file=files.ca, tls_client_cert=files.cert, tls_client_key=files.key, require_encryption=True)


def _cluster_class(region: str, path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ClusterUnreachable(region, path, f"the class cannot be imported: {error}") from error


def quiet_dask() -> None:
    """Settings that a training process wants from Dask. Call it before the first cluster is opened."""
    dask.config.set(
        {
            "distributed.logging.distributed": "critical",
            "distributed.scheduler.allowed-failures": 0,
            "distributed.comm.timeouts.connect": f"{CONNECT_S:.0f}s",
        }
    )
    os.environ.setdefault("DASK_DISTRIBUTED__LOGGING__DISTRIBUTED", "critical")
    for name in ("distributed", "distributed.scheduler", "distributed.worker", "distributed.nanny", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
