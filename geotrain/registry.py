"""Published models on any fsspec URL: versions, and one champion pointer that moves atomically.

<url>/<model>/versions/00001/model.safetensors, version.json
<url>/<model>/champion.json
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from geotrain.checkpoint import join, read_bytes, write_bytes
from geotrain.job import RegistrySpec
from geotrain.stores import open_url


@dataclass(frozen=True, slots=True)
class Version:
    """What is known of one published model."""

    number: int
    url: str
    """Of model.safetensors."""
    run: str
    job: str
    """SHA-256 of the resolved job."""
    metrics: dict[str, float]
    watermark: dict[str, str]
    """Region -> digest of the data it was trained on."""
    parent: int | None
    """The version that training began from."""
    created: str


def model_url(registry: str, model: str, number: int) -> str:
    return join(registry, model, "versions", f"{number:05d}", "model.safetensors")


def next_number(registry: str, model: str) -> int:
    """One above the highest number that was ever begun."""
    fs, path = open_url(join(registry, model, "versions"))
    if not fs.exists(path):
        return 1
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)]
    return max((int(name) for name in names if name.isdigit()), default=0) + 1


def of_run(registry: str, model: str, run: str) -> Version | None:
    """The version that a run has published already."""
    fs, path = open_url(join(registry, model, "versions"))
    fs.invalidate_cache()
    for name in sorted(fs.glob(f"{path}/*/version.json"), reverse=True):
        with suppress(ValueError, TypeError):  # somebody else's
            if (known := Version(**json.loads(fs.cat_file(name)))).run == run:
                return known
    return None


def publish(version: Version) -> None:
    """Make a version known. Its model file must be written. Raises OutputUnwritable."""
    url = version.url.rsplit("/", 1)[0]
    write_bytes("the registry", join(url, "version.json"), json.dumps(asdict(version), indent=1).encode())


def promote(registry: str, model: str, number: int) -> None:
    """Point the champion at a version: one small object, written whole. Raises OutputUnwritable."""
    write_bytes("the registry", join(registry, model, "champion.json"), json.dumps({"version": number}).encode())


def version(registry: str, model: str, number: int) -> Version:
    """Raises FileNotFoundError."""
    tree = json.loads(read_bytes(join(model_url(registry, model, number).rsplit("/", 1)[0], "version.json")))
    return Version(**tree)


def champion(registry: str, model: str) -> Version | None:
    """The champion, or None before the first publication."""
    try:
        number = json.loads(read_bytes(join(registry, model, "champion.json")))["version"]
    except FileNotFoundError:
        return None
    return version(registry, model, number)


def enter(spec: RegistrySpec, version: Version) -> str:
    """Make a version known whose model file is written, and the champion if it beats that. Returns the verdict. Raises OutputUnwritable."""
    publish(version)
    reigning = champion(spec.url, spec.model)
    if reigning is not None and reigning.number == version.number:
        return "champion: it was entered before"
    better, why = beats(version.metrics, reigning, spec.metric, higher_is_better=spec.higher_is_better)
    if better:
        promote(spec.url, spec.model, version.number)
    return f"{'champion' if better else 'rejected'}: {why}"


def beats(challenger: Mapping[str, float], reigning: Version | None, metric: str | None, *, higher_is_better: bool) -> tuple[bool, str]:
    """Should the challenger become champion, and a sentence that says why."""
    if reigning is None:
        return True, "the first version"
    if metric is None:
        return True, "no registry.metric in the job: the newest is the champion"
    if metric not in challenger:
        return False, f"it was not evaluated on {metric}"
    old, new = reigning.metrics.get(metric), challenger[metric]
    if old is None:
        return True, f"the champion has no {metric}"
    better = new >= old if higher_is_better else new <= old
    return better, f"{metric} {new:.4f} against the champion's {old:.4f} (version {reigning.number})"
