"""Checkpoints beside training: what is to be written is copied at once, and written by a thread while the next inner steps are made."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from geotrain import checkpoint
from geotrain.checkpoint import StoredPart
from geotrain.errors import OutputUnwritable

PIECE = bytes(4 * 2**20)
"""Taken at once: the interpreter is not held for longer than the kernel needs for so much fresh memory."""


class Stager:
    """Of one leader. One checkpoint at a time: the next waits until the one before is written."""

    def __init__(self, region: str, tell: Callable[[dict[str, Any]], None]) -> None:
        """`tell`: called from the thread with {"stored": ...} or {"unwritten": ...}, and which staging that is about."""
        self.region, self.tell = region, tell
        self.number = 0
        """Of the last staging."""
        self._image = bytearray()
        """Memory of the last staging."""
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def fresh(self) -> bool:
        """Nothing was prepared or written yet."""
        return self._thread is None

    def prepare(self, size: int) -> None:
        """Take memory for about so many bytes, beside training: the first staging would wait until the kernel has found it."""
        self._thread = threading.Thread(target=self._take_memory, args=(size,), name=f"geotrain-stage-{self.region}", daemon=True)
        self._thread.start()

    def _take_memory(self, size: int) -> None:
        while len(self._image) < size and not self._closing.is_set():
            self._image += PIECE

    def stage(self, folder: str, round: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> float:
        """Copy a region's state before a round, to be written into the folder once `write` is called.

        Returns the seconds for which training waited: until the one before was written, and for the copy.
        """
        began = time.monotonic()
        self._join()
        self.number += 1
        self._image = checkpoint.pack(tensors, facts, into=self._image)
        self._staged = folder, round
        return time.monotonic() - began

    def write(self, done: Mapping[str, Any]) -> None:
        """Begin to write what was staged, and beside it `done`, JSON-able: what a late commit must know."""
        self._thread = threading.Thread(target=self._write, args=(*self._staged, done), name=f"geotrain-stage-{self.region}", daemon=True)
        del self._staged
        self._thread.start()

    def _write(self, folder: str, round: int, done: Mapping[str, Any]) -> None:
        number, began = self.number, time.monotonic()
        try:
            url = checkpoint.join(folder, f"{self.region}.safetensors")
            part: StoredPart = checkpoint.write_packed(self.region, url, round, self._image, self._closing)
            note = json.dumps({"done": done, "part": asdict(part)}).encode()
            checkpoint.write_bytes(f"region {self.region}", checkpoint.join(folder, f"{self.region}.done.json"), note, over=self._closing)
        except Exception as error:  # whatever it was, a checkpoint waits for this part
            why = error if isinstance(error, OutputUnwritable) else OutputUnwritable(f"region {self.region}", folder, repr(error))
            self.tell({"unwritten": why.args, "staging": number})
            return
        self.tell({"stored": asdict(part), "staging": number, "seconds": time.monotonic() - began})

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Waits until what was staged is written; a store that fails now is not tried again."""
        self._closing.set()
        self._join()
