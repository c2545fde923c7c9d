"""Checkpoints on any fsspec URL: content-hashed parts, one per region, and a manifest written last.

No manifest, no checkpoint. Tensors are kept by name in safetensors; what is not a tensor is JSON in the file's metadata.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geotrain.errors import BadCheckpoint, OutputUnwritable
from geotrain.stores import STORE_ERRORS, open_url, write_whole

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where tensors are touched: manifests are read and committed in the flow's process, which has none.


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One region's file of a checkpoint."""

    region: str
    url: str
    sha256: str
    bytes: int
    round: int
    """The next round of that region: that of the manifest, or an earlier one where the region was away."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the run was when every region had finished a segment."""

    run: str
    segment: int
    round: int
    """The next round."""
    epoch: int
    """Of the view."""
    samples: int
    """Trained so far, all regions."""
    parent: int | None
    """The registry's version that the run began from."""
    metrics: dict[str, float]
    totals: dict[str, dict[str, float]]
    """Region -> what it added up to so far: samples, seconds, held_s, wire_bytes."""
    parts: tuple[StoredPart, ...]

    def part(self, region: str) -> StoredPart | None:
        """None when the region was away since the run began."""
        return next((part for part in self.parts if part.region == region), None)


def join(url: str, *names: str) -> str:
    return "/".join([url.rstrip("/"), *names])


def write_bytes(who: str, url: str, content: bytes) -> None:
    """Write a whole object; on a local disk by rename, so that it is there whole or not at all. Raises OutputUnwritable."""
    try:
        fs, path = open_url(url)
        write_whole(fs, path, content)
    except STORE_ERRORS as error:
        raise OutputUnwritable(who, url, str(error) or type(error).__name__) from error


def read_bytes(url: str) -> bytes:
    """Raises FileNotFoundError."""
    fs, path = open_url(url)
    content: bytes = fs.cat_file(path)
    return content


def tensors_to_bytes(tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None) -> bytes:
    """A safetensors file, with JSON-able facts in its metadata."""
    from safetensors.torch import save

    alone = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return bytes(save(alone, metadata={"geotrain": json.dumps(dict(facts or {}), sort_keys=True)}))


def tensors_from_bytes(content: bytes) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """(tensors by name, facts). Raises ValueError for what is not such a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return tensors, json.loads(header.get("__metadata__", {}).get("geotrain", "{}"))


def write_part(region: str, url: str, round: int, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any]) -> StoredPart:
    """Write one region's state before a round. `facts` must be JSON-able. Raises OutputUnwritable."""
    content = tensors_to_bytes(tensors, facts)
    write_bytes(f"region {region}", url, content)
    return StoredPart(region, url, hashlib.sha256(content).hexdigest(), len(content), round)


def read_part(part: StoredPart) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """(tensors by name, facts). Raises BadCheckpoint when the file is absent or not what the manifest says."""
    try:
        content = read_bytes(part.url)
    except STORE_ERRORS as error:
        raise BadCheckpoint(part.url, f"it cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise BadCheckpoint(part.url, "its content does not match the manifest's SHA-256")
    return tensors_from_bytes(content)


def folder(run_url: str, round: int) -> str:
    """Where the checkpoint before a round lies."""
    return join(run_url, "checkpoints", f"{round:08d}")


def commit(run_url: str, manifest: Manifest) -> None:
    """Make a checkpoint real. All its parts must be written. Raises OutputUnwritable."""
    content = json.dumps(asdict(manifest), indent=1).encode()
    write_bytes("the flow", join(folder(run_url, manifest.round), "manifest.json"), content)


def latest(run_url: str) -> Manifest | None:
    """The newest committed checkpoint of a run whose manifest can be read; None when there is none."""
    fs, path = open_url(join(run_url, "checkpoints"))
    for name in sorted(fs.glob(f"{path}/*/manifest.json"), reverse=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            tree = json.loads(fs.cat_file(name))
            parts = tuple(StoredPart(**part) for part in tree.pop("parts"))
            return Manifest(**tree, parts=parts)
    return None


def set_aside(run_url: str, round: int) -> None:
    """A checkpoint that cannot be used is none any more; its files stay, for who wants to look at them."""
    fs, path = open_url(folder(run_url, round))
    fs.mv(f"{path}/manifest.json", f"{path}/manifest.damaged.json")


def prune(run_url: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted segment left behind before them.

    A folder with a part that a kept manifest names stays: a region that is away has no newer one.
    """
    fs, path = open_url(join(run_url, "checkpoints"))
    kept = sorted(fs.glob(f"{path}/*/manifest.json"))[-keep:]
    if not kept:
        return
    named = {part["url"].rsplit("/", 2)[-2] for manifest in kept for part in json.loads(fs.cat_file(manifest))["parts"]}
    oldest = kept[0].rsplit("/", 2)[-2]
    for name in sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)):
        if name < oldest and name not in named:
            fs.rm(f"{path}/{name}", recursive=True)
