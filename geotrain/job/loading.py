"""Reading a job: strict YAML in, frozen values out. Paths in a job are relative to the job file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from geotrain.errors import JobError
from geotrain.job.spec import AddressCluster, Cluster, JobSpec, Mailbox, RegionSpec, SecurityFiles
from geotrain.job.sync import Sync
from geotrain.mistakes import explain, is_echo, members_of


def load_job(path: str, overrides: Mapping[str, Any] | None = None, *, fit_strategy: bool = False) -> JobSpec:
    """Read a job file. `overrides` are dotted keys (`sync.every`: 16) laid over it. Raises JobError.

    `fit_strategy`: leave out what the file's sync section says that the strategy laid over it does not know.
    """
    tree = _read(path, "the job file", "a mapping with name, task, regions, train and sync")
    overrides = overrides or {}
    for key, value in overrides.items():
        _lay_over(tree, key, value)
    if fit_strategy:
        known = next(
            (model for model in members_of(Sync) if tree["sync"].get("strategy") in get_args(model.model_fields["strategy"].annotation)),
            None,
        )
        tree["sync"] = {
            key: value for key, value in tree["sync"].items() if known is None or key in known.model_fields or f"sync.{key}" in overrides
        }
    return _resolved(parse_job(tree, path), Path(path).resolve().parent)


def _read(path: str, what: str, holds: str) -> dict[str, Any]:
    """A YAML file's mapping. Raises JobError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"cannot read {what} {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise JobError(f"{path} must hold {holds}")
    return tree


def load_region(path: str, job: JobSpec) -> JobSpec:
    """The job with one more region, from a file that holds what an entry of `regions` does. Raises JobError."""
    region = _read(path, "the region's file", "what an entry of a job's `regions` does: name, data, and what is not the default")
    if region.get("name") in [known.name for known in job.regions]:
        raise JobError(f"{path}: the job has a region '{region['name']}' already")
    tree = job.to_dict()
    return _resolved(parse_job({**tree, "regions": [*tree["regions"], region]}, path), Path(path).resolve().parent)


def parse_job(tree: Mapping[str, Any], source: str = "job") -> JobSpec:
    """Check a parsed job. Raises JobError that lists every mistake, each with its key and what to write instead."""
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        unions = (*members_of(Cluster), *members_of(Sync))
        lines = [explain(mistake, tree, JobSpec, unions) for mistake in error.errors() if not is_echo(mistake)]
        raise JobError(f"{source}: {len(lines)} mistake{'s' * (len(lines) > 1)}\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _lay_over(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    here: Any = tree
    for step in path:
        here = here[_index(here, step, dotted)] if isinstance(here, list) else here.setdefault(step, {})
        if not isinstance(here, dict | list):
            raise JobError(f"--set {dotted}: '{step}' is not a mapping")
    if isinstance(here, list):
        here[_index(here, last, dotted)] = value
    else:
        here[last] = value


def _index(items: list[Any], step: str, dotted: str) -> int:
    """A list's element by its `name`, or by its number."""
    for position, item in enumerate(items):
        if str(position) == step or (isinstance(item, dict) and item.get("name") == step):
            return position
    raise JobError(f"--set {dotted}: nothing called '{step}' there")


def _resolved(job: JobSpec, base: Path) -> JobSpec:
    """The job with its relative paths made absolute."""

    def full(url: str) -> str:
        return url if "://" in url else str((base / Path(url).expanduser()).resolve())

    def full_region(region: RegionSpec) -> RegionSpec:
        data = region.data.model_copy(update={"train": full(region.data.train), "eval": region.data.eval and full(region.data.eval)})
        cluster, wan = region.cluster, region.wan
        if isinstance(cluster, AddressCluster) and cluster.security:
            cluster = cluster.model_copy(update={"security": full_files(cluster.security)})
        wan = wan.model_copy(update={"security": wan.security and full_files(wan.security), "mailbox": full_box(wan.mailbox)})
        return region.model_copy(update={"data": data, "cluster": cluster, "wan": wan})

    def full_files(files: SecurityFiles) -> SecurityFiles:
        return SecurityFiles(**{key: full(value) for key, value in files.model_dump().items()})

    def full_box(box: Mailbox | None) -> Mailbox | None:
        return box and box.model_copy(update={"url": full(box.url)})

    changed: dict[str, Any] = {
        "code": tuple(full(path) for path in job.code),
        "regions": tuple(full_region(region) for region in job.regions),
        "mailbox": full_box(job.mailbox),
        "output": job.output.model_copy(update={"url": full(job.output.url)}),
    }
    if job.links and job.links.trace:
        changed["links"] = job.links.model_copy(update={"trace": full(job.links.trace)})
    if job.registry:
        changed["registry"] = job.registry.model_copy(update={"url": full(job.registry.url)})
    return job.model_copy(update=changed)
