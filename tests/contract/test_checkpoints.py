"""One suite for every kind of store that can hold a run."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from geotrain import checkpoint
from geotrain.checkpoint import Manifest, StoredPart
from geotrain.errors import BadCheckpoint, CheckpointUnreadable, OutputUnwritable


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    match request.param:
        case "local":
            yield str(tmp_path / "run")
        case "memory":
            yield f"memory://{uuid.uuid4().hex}/run"
        case "s3":
            yield f"s3://{request.getfixturevalue('bucket')}/run-{uuid.uuid4().hex}"


def part(url: str, region: str, round: int, value: float = 1.0) -> StoredPart:
    where = checkpoint.join(checkpoint.folder(url, round), f"{region}.safetensors")
    return checkpoint.write_part(
        region, where, round, {"w": torch.full((3, 2), value), "n": torch.tensor(7)}, {"round": round, "deep": {"a": [1, 2]}}
    )


def manifest(url: str, round: int, *parts: StoredPart) -> Manifest:
    return Manifest("r", round // 10, round, 0, 100, None, {"acc": 0.5}, {"north": {"samples": 1.0}}, parts)


def test_a_part_comes_back_as_it_was(url: str) -> None:
    tensors, facts = checkpoint.read_part(part(url, "north", 10, 2.5))
    assert torch.equal(tensors["w"], torch.full((3, 2), 2.5))
    assert tensors["n"].item() == 7
    assert facts == {"round": 10, "deep": {"a": [1, 2]}}


def test_the_newest_committed_checkpoint_is_the_latest(url: str) -> None:
    assert checkpoint.latest(url) is None
    for round in (10, 20):
        checkpoint.commit(url, manifest(url, round, part(url, "north", round)))
    part(url, "north", 30)
    latest = checkpoint.latest(url)
    assert latest is not None
    assert latest.round == 20, "without a manifest there is no checkpoint"
    assert latest == manifest(url, 20, part(url, "north", 20))
    assert latest.part("south") is None


def test_a_flipped_bit_is_noticed(url: str) -> None:
    written = part(url, "north", 10)
    fs, path = fsspec.core.url_to_fs(written.url)
    content = bytearray(fs.cat_file(path))
    content[-1] ^= 1
    fs.pipe_file(path, bytes(content))
    with pytest.raises(BadCheckpoint, match="SHA-256"):
        checkpoint.read_part(written)


def test_a_part_that_is_gone_is_named(url: str) -> None:
    written = part(url, "north", 10)
    fs, path = fsspec.core.url_to_fs(written.url)
    fs.rm(path)
    with pytest.raises(BadCheckpoint, match=r"north\.safetensors is damaged: it is gone"):
        checkpoint.read_part(written)


def test_old_checkpoints_are_pruned_and_half_made_ones_before_them(url: str) -> None:
    part(url, "north", 5)
    for round in (10, 20, 30, 40):
        checkpoint.commit(url, manifest(url, round, part(url, "north", round)))
    checkpoint.prune(url, keep=2)
    fs, path = fsspec.core.url_to_fs(checkpoint.join(url, "checkpoints"))
    assert sorted({name.rsplit("/", 2)[-2] for name in fs.find(path)}) == ["00000030", "00000040"]


def test_of_a_broken_manifest_the_one_before_is_taken(url: str) -> None:
    for round in (10, 20):
        checkpoint.commit(url, manifest(url, round, part(url, "north", round)))
    fs, path = fsspec.core.url_to_fs(checkpoint.join(checkpoint.folder(url, 20), "manifest.json"))
    fs.pipe_file(path, fs.cat_file(path)[:-20])
    latest = checkpoint.latest(url)
    assert latest is not None
    assert latest.round == 10
    checkpoint.set_aside(url, 10)
    assert checkpoint.latest(url) is None


def test_a_part_that_cannot_be_read_is_not_called_damaged(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = part(url, "north", 10)

    def denied(url: str) -> bytes:
        raise PermissionError("the token has expired")

    monkeypatch.setattr(checkpoint, "read_bytes", denied)
    with pytest.raises(CheckpointUnreadable, match="region north cannot read .* the token has expired"):
        checkpoint.read_part(written)


def test_what_was_written_for_a_checkpoint_that_is_set_aside_is_not_committed_late(url: str) -> None:
    fs, path = fsspec.core.url_to_fs(checkpoint.join(url, "checkpoints"))
    for round in (10, 20, 30):
        checkpoint.commit(url, manifest(url, round, part(url, "north", round)))
        checkpoint.write_bytes("region north", checkpoint.join(checkpoint.folder(url, round), "north.done.json"), b"{}")
    checkpoint.set_aside(url, 20)
    assert [name.rsplit("/", 2)[-2] for name in fs.glob(f"{path}/*/*.done.json")] == ["00000010"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputUnwritable, match="region north cannot write"):
        part(str(tmp_path / "file"), "north", 1)
    with pytest.raises(OutputUnwritable, match="region north cannot write"):
        part("s3://no-such-bucket-of-ours", "north", 1)


def test_what_a_kept_manifest_names_is_kept(url: str) -> None:
    away = part(url, "west", 10)
    for round in (10, 20, 30, 40):
        checkpoint.commit(url, manifest(url, round, part(url, "north", round), away))
    part(url, "north", 15)
    checkpoint.prune(url, keep=2)
    fs, path = fsspec.core.url_to_fs(checkpoint.join(url, "checkpoints"))
    assert sorted(name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)) == ["00000010", "00000030", "00000040"]
    assert checkpoint.read_part(away)
