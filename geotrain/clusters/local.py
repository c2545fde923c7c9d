"""A region's workers as processes of this machine: the embedded default."""

import logging
from typing import Any

import distributed

from geotrain.job import RegionSpec


class RegionLocalCluster(distributed.LocalCluster):
    """One process per worker, one task at a time, no memory limit; a GPU each where the region has GPUs."""

    def __init__(self, spec: RegionSpec) -> None:
        self._gpus = _gpus(spec)
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
