"""Checkpoints of a run that goes on: the regions write their parts while they train, and when all are there the manifest is committed."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from geotrain import checkpoint
from geotrain.checkpoint import Manifest, StoredPart
from geotrain.errors import GeotrainError, OutputUnwritable
from geotrain.report.folder import RunFolder
from geotrain.stores import STORE_ERRORS

AT_THE_END_S = 2.0
"""How long a run that fails waits for a checkpoint that is under way."""

Staging = tuple[int, int]
"""(life of the seat, number of its staging)."""


@dataclass(slots=True)
class _UnderWay:
    """A checkpoint of which not all parts are written."""

    manifest: Manifest
    """With the parts of those that were away."""
    wanted: dict[str, Staging]
    began: float


class Commits:
    """One checkpoint is under way at a time. Thread-safe."""

    def __init__(self, folder: RunFolder, fence: Callable[[], None], keep: int, better: tuple[str, bool] | None) -> None:
        """`fence`: raises RunTaken when another process is in charge of the run, or STORE_ERRORS. `keep`, `better`: as in
        `checkpoint.prune`.
        """
        self.folder, self.fence, self.keep, self.better = folder, fence, keep, better
        self.last: Manifest | None = None
        """The last that was committed, or taken up."""
        self.failed: Callable[[], None] = lambda: None
        """Called when a checkpoint cannot be written."""
        self._under_way: _UnderWay | None = None
        self._told: dict[tuple[str, Staging], StoredPart | OutputUnwritable] = {}
        self._error: GeotrainError | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition(threading.RLock())

    def begin(self, manifest: Manifest, wanted: Mapping[str, Staging], aborted: Callable[[], None]) -> None:
        """A checkpoint to be committed once these regions have written what they staged. Waits for the one before, as `settle` does."""
        self.settle(aborted)
        with self._changed:
            self._told = {(name, at): part for (name, at), part in self._told.items() if name in wanted and at >= wanted[name]}
            self._under_way = _UnderWay(manifest, dict(wanted), time.monotonic())
            self._thread = threading.Thread(target=self._commit_when_written, name="geotrain-commit", daemon=True)
            self._thread.start()

    def heard(self, region: str, message: Mapping[str, Any]) -> None:
        """What a leader told of what it staged."""
        with self._changed:
            if (stored := message.get("stored")) is not None:
                self._told[region, (message["life"], message["staging"])] = StoredPart(**stored)
            elif (why := message.get("unwritten")) is not None:
                self._told[region, (message["life"], message["staging"])] = OutputUnwritable(*why)
            self._changed.notify_all()

    @property
    def awaited(self) -> list[str]:
        """Regions whose parts are still to be written."""
        with self._changed:
            return [] if self._under_way is None else [region for region in self._under_way.wanted if not self._has_written(region)]

    def lost(self, region: str) -> None:
        """A region's seat is gone: what it has not written by now is never written, and the checkpoint before stays the last."""
        with self._changed:
            if (way := self._under_way) is not None and region in way.wanted and not self._has_written(region):
                self._under_way = None
                self.folder.event("checkpoint_lost", round=way.manifest.round, why=f"region {region} was lost before its part was written")
                self._changed.notify_all()

    def settle(self, aborted: Callable[[], None]) -> None:
        """Wait until no checkpoint is under way. `aborted`: called meanwhile; raises when nobody is to wait any longer.

        Raises OutputUnwritable, RunTaken.
        """
        while self._thread is not None and self._thread.is_alive():
            aborted()
            self._thread.join(0.05)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """At the end of the run, however it ended: what is nearly there may be committed."""
        if self._thread is not None:
            self._thread.join(AT_THE_END_S)
            with self._changed:
                self._over.set()
                self._under_way = None
                self._changed.notify_all()
            self._thread.join()

    def _has_written(self, region: str) -> bool:
        assert self._under_way is not None
        return (region, self._under_way.wanted[region]) in self._told

    def _fail(self, error: GeotrainError) -> None:
        with self._changed:
            self._error, self._under_way = self._error or error, None
            self._changed.notify_all()
        self.failed()

    def _commit_when_written(self) -> None:
        with self._changed:
            while (way := self._under_way) is not None and not all(map(self._has_written, way.wanted)):
                self._changed.wait()
            if way is None:
                return
            told = [self._told[region, at] for region, at in way.wanted.items()]
        if errors := [one for one in told if isinstance(one, OutputUnwritable)]:
            self._fail(errors[0])
            return
        parts = [one for one in told if isinstance(one, StoredPart)]
        manifest = replace(way.manifest, parts=(*parts, *way.manifest.parts))
        try:
            checkpoint.commit(self.folder.url, manifest, self._over, self.fence)
        except GeotrainError as error:
            self._fail(error)
            return
        with self._changed:
            self.last, self._under_way = manifest, None
        facts = {"bytes": sum(part.bytes for part in parts), "seconds": round(time.monotonic() - way.began, 3)}
        self.folder.event("checkpoint", round=manifest.round, **facts)
        try:
            checkpoint.prune(self.folder.url, self.keep, self.better)
        except STORE_ERRORS as error:
            self.folder.event("not_pruned", message=str(error))
