"""The functions that Dask is given. They import what they call where they run, so that neither flow nor scheduler imports torch."""

import asyncio
import importlib
from typing import Any


def on_worker(name: str, *args: Any) -> Any:
    """Call a function on this worker: one of geotrain.partition.worker, or `module:name` of another module there."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(f"geotrain.partition.{module or 'worker'}"), function)(*args)


async def beside(name: str, *args: Any) -> Any:
    """The same by `Client.run`, whatever the worker is busy with, in a thread of its own."""
    return await asyncio.to_thread(on_worker, name, *args)
