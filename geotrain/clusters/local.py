"""A region's workers as processes of this machine: the embedded default."""

import logging
import os
from typing import Any

import dask
import distributed
from distributed.utils import get_mp_context

from geotrain.job import RegionSpec

IMPORTED = ["geotrain.clusters.forked", "geotrain.partition.worker"]
"""By the process that workers are forked from, once: with torch in it that takes seconds. By name, since the second is what runs on a
cluster, and above it."""


class RegionLocalCluster(distributed.LocalCluster):
    """One process per worker, one task at a time, no memory limit; a GPU each where the region has GPUs."""

    def __init__(self, spec: RegionSpec) -> None:
        self._gpus = _gpus(spec)
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})  # for good: a nanny asks at every start
        get_mp_context().set_forkserver_preload(IMPORTED)
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


def _gpus(spec: RegionSpec) -> list[str]:
    """CUDA_VISIBLE_DEVICES of the workers in turn; empty for a region that trains on CPUs."""
    wanted = sum(device.count for device in spec.devices if device.kind != "cpu")
    given = getattr(spec.cluster, "gpus", ()) or range(wanted)
    return [str(number) for number in given] if wanted else []
