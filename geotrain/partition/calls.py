"""The one function that Dask is given. It imports the seat where it runs, so that neither flow nor scheduler imports torch."""

import importlib
from typing import Any


def on_worker(name: str, *args: Any) -> Any:
    """Call a function of geotrain.partition.seat on this worker."""
    return getattr(importlib.import_module("geotrain.partition.seat"), name)(*args)
