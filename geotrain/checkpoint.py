"""Checkpoints on any fsspec URL: content-hashed parts, one per region, and a manifest written last.

No manifest, no checkpoint. Tensors are kept by name in safetensors; what is not a tensor is JSON in the file's metadata.
"""

import contextlib
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geotrain.errors import BadCheckpoint, CheckpointUnreadable, OutputUnwritable
from geotrain.stores import PATIENCE_S, STORE_ERRORS, open_url, patiently, write_whole

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS_NAMES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
}

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


def write_bytes(
    who: str,
    url: str,
    content: bytes | bytearray,
    *,
    over: threading.Event | None = None,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """Write a whole object; on a local disk by rename, so that it is there whole or not at all. Raises OutputUnwritable.

    `over`: a store that fails for a while is waited for, until this is set; without it the first failure counts. `fence`: called before
    every try; raises when it is not to be written any more.
    """

    def write() -> None:
        fence()
        write_whole(fs, path, content)

    try:
        fs, path = open_url(url)
        patiently(write, over, PATIENCE_S if over is not None else 0.0)
    except STORE_ERRORS as error:
        raise OutputUnwritable(who, url, error) from error


def read_bytes(url: str) -> bytes:
    """Raises FileNotFoundError."""
    fs, path = open_url(url)
    content: bytes = fs.cat_file(path)
    return content


def pack(tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any] | None = None, into: bytearray | None = None) -> bytearray:
    """Tensors as they are now, and JSON-able facts as metadata: a safetensors file. `into`: memory to use again, of an earlier one.

    The library's own serializer holds the interpreter lock and takes fresh memory each time: training stood still for seconds a gigabyte.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"geotrain": json.dumps(dict(facts or {}), sort_keys=True)}}
    ends = list(itertools.accumulate(tensor.nbytes for _, tensor in ordered))
    for (name, tensor), end in zip(ordered, ends, strict=True):
        dtype = SAFETENSORS_NAMES[str(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    begin = 8 + len(head)
    size = begin + (ends[-1] if ends else 0)
    image = into or bytearray(size)
    del image[size:]
    image += bytes(size - len(image))
    image[:begin] = len(head).to_bytes(8, "little") + head
    body = torch.frombuffer(image, dtype=torch.uint8)[begin:]
    for (_, tensor), end in zip(ordered, ends, strict=True):
        body[end - tensor.nbytes : end] = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return image


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


def write_part(
    region: str,
    url: str,
    round: int,
    tensors: Mapping[str, "Tensor"],
    facts: Mapping[str, Any],
    over: threading.Event | None = None,
) -> StoredPart:
    """Write one region's state before a round. `facts` must be JSON-able; `over` as in `write_bytes`. Raises OutputUnwritable."""
    return write_packed(region, url, round, pack(tensors, facts), over)


def write_packed(region: str, url: str, round: int, content: bytearray, over: threading.Event | None = None) -> StoredPart:
    """The same of what `pack` made."""
    write_bytes(f"region {region}", url, content, over=over)
    return StoredPart(region, url, hashlib.sha256(content).hexdigest(), len(content), round)


def read_part(part: StoredPart) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """(tensors by name, facts). A store that fails for a while is waited for.

    Raises BadCheckpoint when the file is absent or not what the manifest says, CheckpointUnreadable when that cannot be known.
    """
    try:
        content = patiently(lambda: read_bytes(part.url))
    except FileNotFoundError as error:
        raise BadCheckpoint(part.url, "it is gone") from error
    except STORE_ERRORS as error:
        raise CheckpointUnreadable(part.region, part.url, error) from error
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise BadCheckpoint(part.url, "its content does not match the manifest's SHA-256")
    return tensors_from_bytes(content)


def folder(run_url: str, round: int) -> str:
    """Where the checkpoint before a round lies."""
    return join(run_url, "checkpoints", f"{round:08d}")


def commit(run_url: str, manifest: Manifest, over: threading.Event | None = None, fence: Callable[[], None] = lambda: None) -> None:
    """Make a checkpoint real. All its parts must be written. `over` and `fence` as in `write_bytes`. Raises OutputUnwritable."""
    content = json.dumps(asdict(manifest), indent=1).encode()
    write_bytes("the flow", join(folder(run_url, manifest.round), "manifest.json"), content, over=over, fence=fence)


def latest(run_url: str) -> Manifest | None:
    """The newest committed checkpoint of a run whose manifest can be read; None when there is none."""
    fs, path = open_url(join(run_url, "checkpoints"))
    fs.invalidate_cache()  # s3fs keeps the listing of every folder below as well
    for name in sorted(fs.glob(f"{path}/*/manifest.json"), reverse=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return _manifest(fs.cat_file(name))
    return None


def _manifest(content: bytes) -> Manifest:
    """Raises ValueError, TypeError, KeyError."""
    tree = json.loads(content)
    parts = tuple(StoredPart(**part) for part in tree.pop("parts"))
    return Manifest(**tree, parts=parts)


def set_aside(run_url: str, round: int) -> None:
    """A checkpoint that cannot be used is none any more; its parts stay, for who wants to look at them."""
    fs, path = open_url(folder(run_url, round))
    with contextlib.suppress(FileNotFoundError):  # it was set aside, and what follows failed
        fs.mv(f"{path}/manifest.json", f"{path}/manifest.damaged.json")
    forget_late(run_url, round)


def forget_late(run_url: str, since: int) -> None:
    """The run goes on from an earlier checkpoint: what regions wrote for those since is not to be committed late."""
    fs, path = open_url(join(run_url, "checkpoints"))
    fs.invalidate_cache()
    for name in fs.glob(f"{path}/*/*.done.json"):
        if int(name.rsplit("/", 2)[-2]) >= since:
            fs.rm_file(name)


def prune(run_url: str, keep: int, better: "tuple[str, bool] | None" = None) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and what was never committed before the newest.

    `better`: (held-out metric, whether higher is better); None: none is the best. A folder with a part that a kept manifest names stays:
    a region that is away has no newer one.
    """
    fs, path = open_url(join(run_url, "checkpoints"))
    manifests: dict[str, Manifest] = {}
    for name in sorted(fs.glob(f"{path}/*/manifest.json")):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            manifests[name.rsplit("/", 2)[-2]] = _manifest(fs.cat_file(name))
    kept = dict(list(manifests.items())[-keep:])
    if not kept:
        return
    if better is not None and (scored := [name for name, one in manifests.items() if better[0] in one.metrics]):
        sign = 1 if better[1] else -1
        best = max(scored, key=lambda name: (sign * manifests[name].metrics[better[0]], name))
        kept[best] = manifests[best]
    named = {part.url.rsplit("/", 2)[-2] for manifest in kept.values() for part in manifest.parts}
    for name in sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)):
        if name < max(kept) and name not in kept and name not in named:
            fs.rm(f"{path}/{name}", recursive=True)
