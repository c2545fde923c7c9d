"""Opening a region's object store through fsspec: local folders, s3://, memory://, anything it knows."""

import os
from collections.abc import Mapping
from typing import Any

from geotrain import stores
from geotrain.errors import DataUnreachable
from geotrain.job import FromEnv, RegionSpec
from geotrain.stores import STORE_ERRORS

Options = Mapping[str, str | int | bool | FromEnv]


def resolve_options(region: str, options: Options) -> dict[str, Any]:
    """Options with `{env: NAME}` replaced by this process's environment. Raises DataUnreachable naming the variable."""
    resolved: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, FromEnv):
            if value.env not in os.environ:
                raise DataUnreachable(region, f"storage_options.{key}", f"the environment variable {value.env} is not set on this worker")
            resolved[key] = os.environ[value.env]
        else:
            resolved[key] = value
    return resolved


def open_store(spec: RegionSpec, url: str) -> tuple[Any, str]:
    """(filesystem, path) of a URL with the region's own options."""
    return open_url(spec.name, url, spec.storage_options)


def open_url(region: str, url: str, storage_options: Options, **more: Any) -> tuple[Any, str]:
    """(filesystem, path) of a URL. Local paths ignore the options meant for a bucket; so they do `more`. Raises DataUnreachable."""
    options = {**more, **resolve_options(region, storage_options)} if "://" in url else {}
    if url.startswith("s3://") and "endpoint_url" in options:
        options = {"client_kwargs": {"endpoint_url": options["endpoint_url"]}, **{k: v for k, v in options.items() if k != "endpoint_url"}}
    try:
        return stores.open_url(url, **options)
    except (ImportError, *STORE_ERRORS) as error:
        raise DataUnreachable(region, url, error) from error
