from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geotrain.data.inventory import Inventory, check_same_schema, take_inventory
from geotrain.errors import DataUnreachable, EmptyRegion, MissingColumn, SchemaMismatch, UnreadableShard
from geotrain.job import DataSpec, FromEnv, RegionSpec


def take(folder: Path, columns: tuple[str, ...] = ("x",), label: str | None = None, name: str = "north") -> Inventory:
    spec = RegionSpec(name=name, data=DataSpec(train=str(folder)))
    return take_inventory(spec, str(folder), columns, label)


def put(file: Path, **columns: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=4)


def test_footers_tell_files_rows_groups_and_schema(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", x=np.arange(10), other=np.zeros(10))
    put(tmp_path / "deep" / "b.parquet", x=np.arange(3))
    found = take(tmp_path)
    assert (found.rows, len(found.shards)) == (13, 2)
    assert [group.rows for group in found.row_groups()] == [4, 4, 2, 3]
    assert found.schema == {"x": "int64"}
    assert Inventory.from_dict(found.to_dict()) == found


def test_labels_are_counted_where_statistics_allow(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", x=[1] * 4 + [2] * 4)
    assert take(tmp_path, label="x").labels == {"1": 4, "2": 4}
    put(tmp_path / "b.parquet", x=[1, 2])
    assert take(tmp_path, label="x").labels is None


def test_the_watermark_changes_with_the_files(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", x=[1])
    before = take(tmp_path).watermark()
    assert take(tmp_path).watermark() == before
    put(tmp_path / "b.parquet", x=[1])
    assert take(tmp_path).watermark() != before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataUnreachable, match="region north: cannot list .*absent"):
        take(tmp_path / "absent")


def test_a_folder_without_rows_is_an_empty_region(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no data")
    with pytest.raises(EmptyRegion, match="holds no row"):
        take(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    put(tmp_path / "a.parquet", x=np.arange(100))
    file = tmp_path / "b.parquet"
    whole = (tmp_path / "a.parquet").read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello" * 20, "empty": b""}[damage])
    with pytest.raises(UnreadableShard, match=r"north.*b\.parquet"):
        take(tmp_path)


def test_a_missing_column_names_file_and_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.parquet", x=[1], y=[2])
    with pytest.raises(MissingColumn, match=r"a\.parquet has no column 'z' \(it has: x, y\)"):
        take(tmp_path, ("x", "z"))


def test_schemas_must_agree_within_and_across_regions(tmp_path: Path) -> None:
    put(tmp_path / "n" / "a.parquet", x=[1])
    put(tmp_path / "n" / "b.parquet", x=[1.5])
    with pytest.raises(SchemaMismatch, match=r"column 'x' of .*b\.parquet is double, but it is int64 in .*a\.parquet"):
        take(tmp_path / "n")
    put(tmp_path / "s" / "c.parquet", x=["1"])
    (tmp_path / "n" / "b.parquet").unlink()
    with pytest.raises(SchemaMismatch, match=r"region south: column 'x' of .*c\.parquet is string, but it is int64"):
        check_same_schema([take(tmp_path / "n"), take(tmp_path / "s", name="south")])


def test_an_unset_credential_names_the_variable() -> None:
    spec = RegionSpec(name="north", data=DataSpec(train="s3://b/t"), storage_options={"key": FromEnv(env="GEOTRAIN_NOT_SET")})
    with pytest.raises(DataUnreachable, match="GEOTRAIN_NOT_SET is not set"):
        take_inventory(spec, "s3://b/t", ["x"])
