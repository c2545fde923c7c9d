"""The inventory: what a region has, read from Parquet footers alone, on the region's own workers."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from geotrain.data.store import open_store
from geotrain.errors import DataUnreachable, EmptyRegion, MissingColumn, SchemaMismatch, UnreadableShard
from geotrain.job import RegionSpec
from geotrain.stores import STORE_ERRORS


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The unit of a lease: one row group of one file."""

    uri: str
    index: int
    rows: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file, as its footer describes it."""

    uri: str
    etag: str
    """Changes when the file changes: the store's etag, or size and time of change."""
    bytes: int
    groups: tuple[int, ...]
    """Rows of each row group."""

    @property
    def rows(self) -> int:
        return sum(self.groups)


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files of one region's `train` or `eval` data."""

    region: str
    url: str
    shards: tuple[Shard, ...]
    schema: dict[str, str]
    """Column -> Arrow type, of the columns that the task reads."""
    labels: dict[str, int] | None = field(default=None)
    """Rows per label, where every row group holds a single label by its statistics; else None."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def row_groups(self) -> tuple[RowGroup, ...]:
        """All row groups with rows in them, in the order of file names."""
        return tuple(RowGroup(s.uri, i, rows) for s in self.shards for i, rows in enumerate(s.groups) if rows)

    def watermark(self) -> str:
        """A digest that changes when a file comes, goes or changes."""
        return hashlib.sha256("\n".join(f"{s.uri} {s.etag}" for s in self.shards).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Inventory":
        shards = tuple(Shard(**{**shard, "groups": tuple(shard["groups"])}) for shard in tree["shards"])
        return cls(tree["region"], tree["url"], shards, tree["schema"], tree["labels"])


def take_inventory(spec: RegionSpec, url: str, columns: Sequence[str], label: str | None = None) -> Inventory:
    """Read the footers under `url`. Raises a DataError that names the region, the file and the column."""
    fs, path = open_store(spec, url)
    try:
        found = {path: fs.info(path)} if path.endswith(".parquet") else fs.find(path, detail=True)
        if not found and not fs.exists(path):
            raise FileNotFoundError("no such folder or bucket")
    except STORE_ERRORS as error:
        raise DataUnreachable(spec.name, url, error) from error
    files = sorted(name for name in found if name.endswith((".parquet", ".pq")) and not name.rsplit("/", 1)[-1].startswith(("_", ".")))
    shards: list[Shard] = []
    schema: dict[str, str] = {}
    counts = _LabelCount(label)
    for name in files:
        uri = fs.unstrip_protocol(name) if "://" in url else name
        footer, arrow = _footer(spec.name, fs, name, uri)
        types = _types(spec.name, uri, arrow, columns)
        _same(spec.name, uri, types, schema, files[0])
        schema = schema or types
        shards.append(
            Shard(uri, _etag(found[name]), found[name]["size"], tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
        )
        counts.add(footer)
    inventory = Inventory(spec.name, url, tuple(shards), schema, counts.histogram())
    if not inventory.rows:
        raise EmptyRegion(spec.name, url)
    return inventory


def check_same_schema(inventories: Iterable[Inventory]) -> None:
    """All regions must agree on the type of every column. Raises SchemaMismatch naming file and column."""
    first, *rest = inventories
    for other in rest:
        _same(other.region, other.shards[0].uri, other.schema, first.schema, f"{first.shards[0].uri} (region {first.region})")


def _same(region: str, uri: str, types: dict[str, str], expected: dict[str, str], reference: str) -> None:
    for column, kind in types.items():
        if expected.get(column, kind) != kind:
            raise SchemaMismatch(region, uri, column, kind, expected[column], reference)


def _footer(region: str, fs: Any, name: str, uri: str) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with fs.open(name, "rb", cache_type="readahead") as file:
            parquet = pq.ParquetFile(file)
            return parquet.metadata, parquet.schema_arrow
    except (pa.ArrowException, *STORE_ERRORS) as error:
        raise UnreadableShard(region, uri, error) from error


def _types(region: str, uri: str, schema: pa.Schema, columns: Sequence[str]) -> dict[str, str]:
    for column in columns:
        if column not in schema.names:
            raise MissingColumn(region, uri, column, ", ".join(schema.names))
    return {column: str(schema.field(column).type) for column in columns}


def _etag(info: dict[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or info.get("created")
    return f"{info['size']}-{tag}"


class _LabelCount:
    """Rows per label, for as long as row-group statistics (smallest = largest) tell it."""

    def __init__(self, column: str | None) -> None:
        self.column = column
        self.rows: dict[str, int] | None = {} if column else None

    def add(self, footer: pq.FileMetaData) -> None:
        for i in range(footer.num_row_groups):
            if self.rows is None:
                return
            group = footer.row_group(i)
            columns = [group.column(c) for c in range(group.num_columns)]
            stats = next((c.statistics for c in columns if c.path_in_schema == self.column), None)
            if stats is None or not stats.has_min_max or stats.min != stats.max:
                self.rows = None
                return
            self.rows[str(stats.min)] = self.rows.get(str(stats.min), 0) + group.num_rows

    def histogram(self) -> dict[str, int] | None:
        return dict(sorted(self.rows.items())) if self.rows else None
