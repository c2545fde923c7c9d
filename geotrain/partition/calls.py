"""The one function that Dask is given. It imports the seat where it runs, so that neither flow nor scheduler imports torch."""

import importlib
from typing import Any


def on_worker(name: str, *args: Any) -> Any:
    """Call a function on this worker: one of geotrain.partition.seat, or `module:name` of another module there."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(f"geotrain.partition.{module or 'seat'}"), function)(*args)
