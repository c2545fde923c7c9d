"""A region's workers as processes of this machine: the embedded default."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from typing import Any

import dask
import distributed
from distributed.utils import get_mp_context

from geotrain.job import RegionSpec

METHOD = "distributed.worker.multiprocessing-method"
METHOD_ASKED_FOR = "DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD"
"""An environment variable by which a user says how Dask is to begin worker processes."""
HASH_SEED = "6640"
"""As Dask's nannies set it: strings have the same hash in every worker, and in every run."""


class RegionLocalCluster(distributed.LocalCluster):
    """One process per worker, one task at a time, no memory limit; a GPU each where the region has GPUs."""

    def __init__(self, spec: RegionSpec) -> None:
        self._gpus = _gpus(spec)
        if METHOD_ASKED_FOR not in os.environ:
            _fork_workers()
        super().__init__(
            name=f"geotrain-{spec.name}",
            n_workers=0,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            silence_logs=logging.CRITICAL,
            preload=["geotrain.clusters.detach"],
            env=dict(os.environ),  # what they are forked from has that of the first cluster
        )
        self.scale(1)

    def kill_workers(self) -> None:
        """For good. What is left to be closed is closed as usual."""
        for nanny in list(self.workers.values()):
            nanny.close_gracefully()  # which is what keeps it from beginning another
            if nanny.pid:
                with suppress(ProcessLookupError):
                    os.kill(nanny.pid, signal.SIGKILL)

    def new_worker_spec(self) -> dict[Any, Any]:
        """The next worker; which device number it sees follows from how many there are."""
        spec: dict[Any, Any] = super().new_worker_spec()
        if not self._gpus:
            return spec
        taken = len(self.worker_spec)
        for number, (name, worker) in enumerate(spec.items()):
            env = {**worker["options"].get("env", {}), "CUDA_VISIBLE_DEVICES": self._gpus[(taken + number) % len(self._gpus)]}
            spec[name] = {**worker, "options": {**worker["options"], "env": env}}
        return spec


def _fork_workers() -> None:
    """From here on Dask forks worker processes from Python's fork server, which has imported what they need (`forked`) and begins now.

    Not to be called by two threads at once.
    """
    dask.config.set({METHOD: "forkserver"})
    get_mp_context().set_forkserver_preload(["geotrain.clusters.forked"])
    threads = {name: str(value) for name, value in dask.config.get("distributed.nanny.pre-spawn-environ").items() if value is not None}
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}  # ours, and no `code.py` of the working directory's
    with _environment({"PYTHONHASHSEED": HASH_SEED, **threads, **os.environ, **path}):
        forkserver.ensure_running()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a process that begins meanwhile inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpus(spec: RegionSpec) -> list[str]:
    """CUDA_VISIBLE_DEVICES of the workers in turn; empty for a region that trains on CPUs."""
    wanted = sum(device.count for device in spec.devices if device.kind != "cpu")
    given = getattr(spec.cluster, "gpus", ()) or range(wanted)
    return [str(number) for number in given] if wanted else []
