"""`index.json` of a gallery: what it holds, how source rows were cut, and which of its files are complete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json

FORMAT, VERSION = "dualmatch-gallery", 1
INDEX_FILE, QUARANTINE_FILE = "index.json", "quarantine.jsonl"

Kind = Literal["images", "captions"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the gallery: its name, size in bytes, and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Source rows [first_row, end_row), of which `count` could be encoded; the others are in the quarantine list."""

    first_row: int
    end_row: int
    count: int
    vectors: FileRecord
    items: FileRecord


@dataclass(frozen=True, kw_only=True)
class GalleryIndex:
    """`index.json`: what a gallery is, and which of its files are complete.

    Attributes:
        kind: what was encoded.
        bundle_path, bundle_hash: the bundle that encoded it; the path is relative to the gallery.
        dimension, dtype: of the stored vectors.
        batch_size, rows_per_shard: how source rows were cut; a resumed run must cut alike.
        root: the folder that the items' ids are relative to, relative to the gallery; None for captions.
        rows, source_hash: length and SHA-256 of the source list.
        quarantine: the quarantine list as far as the shards reach.
        shards: in row order, without gaps.
        complete: whether the shards reach the last source row.
    """

    kind: Kind
    bundle_path: str
    bundle_hash: str
    dimension: int
    dtype: str
    batch_size: int
    rows_per_shard: int
    root: str | None
    rows: int
    source_hash: str
    quarantine: FileRecord
    shards: tuple[Shard, ...] = ()

    @property
    def rows_done(self) -> int:
        return self.shards[-1].end_row if self.shards else 0

    @property
    def complete(self) -> bool:
        return self.rows_done == self.rows

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "kind": self.kind,
            "bundle": {"path": self.bundle_path, "hash": self.bundle_hash},
            "dimension": self.dimension,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "rows_per_shard": self.rows_per_shard,
            "source": {"root": self.root, "rows": self.rows, "sha256": self.source_hash},
            "count": self.count,
            "quarantine": {"count": self.rows_done - self.count, **vars(self.quarantine)},
            "shards": [
                {
                    "rows": [shard.first_row, shard.end_row],
                    "count": shard.count,
                    "vectors": vars(shard.vectors),
                    "items": vars(shard.items),
                }
                for shard in self.shards
            ],
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def read(cls, gallery: Path) -> Self:
        """Read and check `index.json`.

        Raises:
            DualmatchError: there is none, it is damaged, or another version wrote it.
        """
        path = gallery / INDEX_FILE
        content = read_json(path, f"gallery {gallery}")
        try:
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise DualmatchError(f"{path} is not the index of a gallery.")
            if (version := _field(content, "version", int)) != VERSION:
                raise DualmatchError(
                    f"{path} has version {version}, this dualmatch reads version {VERSION}: encode the gallery again."
                )
            return cls._from_json(content)
        except DualmatchError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DualmatchError(f"{path} is damaged ({error}): encode the gallery again.") from None

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        kind, dtype = _field(content, "kind", str), _field(content, "dtype", str)
        bundle, source = _field(content, "bundle", dict), _field(content, "source", dict)
        shards = []
        for number, entry in enumerate(_field(content, "shards", list)):
            first_row, end_row = _field(entry, "rows", list)
            vectors, items = _record(entry["vectors"]), _record(entry["items"])
            count = _field(entry, "count", int)
            if type(first_row) is not int or type(end_row) is not int:
                raise TypeError(f"rows of shard {number} are not whole numbers")
            # Names are checked, not trusted: an index cannot point outside its gallery.
            if (vectors.file, items.file) != shard_files(number) or not 0 <= count <= end_row - first_row:
                raise ValueError(f"shard {number} is inconsistent")
            shards.append(Shard(first_row=first_row, end_row=end_row, count=count, vectors=vectors, items=items))
        index = cls(
            kind=cast("Kind", kind),
            bundle_path=_field(bundle, "path", str),
            bundle_hash=_field(bundle, "hash", str),
            dimension=_field(content, "dimension", int),
            dtype=dtype,
            batch_size=_field(content, "batch_size", int),
            rows_per_shard=_field(content, "rows_per_shard", int),
            root=None if source["root"] is None else _field(source, "root", str),
            rows=_field(source, "rows", int),
            source_hash=_field(source, "sha256", str),
            quarantine=_record(content["quarantine"]),
            shards=tuple(shards),
        )
        bounds = [0, *(shard.end_row for shard in shards)]
        if (
            kind not in ("images", "captions")
            or dtype not in ("float16", "float32")
            or min(index.dimension, index.rows, index.batch_size, index.rows_per_shard) < 1
            or index.quarantine.file != QUARANTINE_FILE
            or [shard.first_row for shard in shards] != bounds[:-1]
            or bounds != [min(number * index.rows_per_shard, index.rows) for number in range(len(bounds))]
            or _field(content, "complete", bool) != index.complete
            or _field(content, "count", int) != index.count
            or _field(content["quarantine"], "count", int) != index.rows_done - index.count
        ):
            raise ValueError("its fields contradict each other")
        return index


def shard_files(number: int) -> tuple[str, str]:
    """Names of a shard's vectors and items."""
    return f"vectors-{number:05}.npy", f"items-{number:05}.jsonl"


def _field(content: Any, key: str, kind: type[T]) -> T:
    value = content[key]
    if type(value) is not kind:
        raise TypeError(f"{key} is not of type {kind.__name__}")
    return value


def _record(content: Any) -> FileRecord:
    return FileRecord(
        file=_field(content, "file", str), bytes=_field(content, "bytes", int), sha256=_field(content, "sha256", str)
    )
