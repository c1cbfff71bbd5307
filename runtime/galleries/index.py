"""`index.json` of a gallery: what it holds, how source rows were cut, and which of its files are complete."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import read_json, refuse_other_kind

FORMAT, VERSIONS = "dualmatch-gallery", (1, 2)
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
    """Source rows [first_row, end_row), of which `count` have a vector in the files; the others are quarantined or `dropped`.

    Attributes:
        removed: tombstones: half-open, increasing ranges of positions in the files that no longer count.
        dropped: rows that were removed and are no longer in the files.
        root: the folder that the items' ids are relative to, where it is not the gallery's.
    """

    first_row: int
    end_row: int
    count: int
    vectors: FileRecord
    items: FileRecord
    removed: tuple[tuple[int, int], ...] = ()
    dropped: int = 0
    root: str | None = None

    @property
    def living(self) -> int:
        """How many of its vectors count."""
        return self.count - sum(end - first for first, end in self.removed)

    def _edits(self) -> dict[str, Any]:
        """What only an edited gallery's shards say."""
        removed = {"removed": [list(pair) for pair in self.removed]} if self.removed else {}
        dropped = {"dropped": self.dropped} if self.dropped else {}
        return removed | dropped | ({} if self.root is None else {"root": self.root})

    def to_json(self) -> dict[str, Any]:
        rows = [self.first_row, self.end_row]
        files = {"vectors": vars(self.vectors), "items": vars(self.items)}
        return {"rows": rows, "count": self.count, **files, **self._edits()}


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
        part: source rows [first, end) that this gallery is made of; all of them unless it was encoded with `--rows`.
        quarantine: the quarantine list as far as the shards reach.
        shards: in row order, without gaps.
        complete: whether the shards reach the last source row of the part.
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
    part: tuple[int, int]
    shards: tuple[Shard, ...] = ()

    @property
    def next_row(self) -> int:
        """The first source row beyond the shards."""
        return self.shards[-1].end_row if self.shards else self.part[0]

    @property
    def rows_done(self) -> int:
        """How many source rows the shards account for."""
        return self.next_row - self.part[0]

    @property
    def complete(self) -> bool:
        return self.next_row == self.part[1]

    @property
    def count(self) -> int:
        """How many vectors the shards hold, removed ones included."""
        return sum(shard.count for shard in self.shards)

    @property
    def living(self) -> int:
        """How many vectors count: `count` without the removed ones."""
        return sum(shard.living for shard in self.shards)

    @property
    def quarantined(self) -> int:
        """How many source rows could not be read."""
        return self.rows_done - self.count - sum(shard.dropped for shard in self.shards)

    @property
    def version(self) -> int:
        """1 as encoded; 2 once shards were joined, removed from or rewritten, which earlier versions would misread."""
        end = self.part[1]
        cuts = [min(self.part[0] + number * self.rows_per_shard, end) for number in range(1, len(self.shards) + 1)]
        as_encoded = (
            [shard.end_row for shard in self.shards] == cuts
            and all(shard.vectors.file == shard_files(number)[0] for number, shard in enumerate(self.shards))
            and not any(shard._edits() for shard in self.shards)  # noqa: SLF001  (of this file)
        )
        return 1 if as_encoded else 2

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": self.version,
            "complete": self.complete,
            "kind": self.kind,
            "bundle": {"path": self.bundle_path, "hash": self.bundle_hash},
            "dimension": self.dimension,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "rows_per_shard": self.rows_per_shard,
            "source": {"root": self.root, "rows": self.rows, "sha256": self.source_hash, **self._part()},
            "count": self.count,
            "quarantine": {"count": self.quarantined, **vars(self.quarantine)},
            "shards": [shard.to_json() for shard in self.shards],
        }
        return json.dumps(content, indent=1) + "\n"

    def require_alike(self, path: Path, other: "GalleryIndex") -> None:
        """Refuse the gallery at `path`, whose vectors do not compare with these.

        Raises:
            DualmatchError: another bundle, kind, dimension or dtype.
        """
        for name, what in {"bundle_hash": "bundle", "kind": "kind", "dimension": "dimension", "dtype": "dtype"}.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise DualmatchError(
                    f"gallery {path} has another {what}: {str(theirs)[:12]} there, {str(ours)[:12]} wanted; "
                    "encode it again like the first."
                )

    def _part(self) -> dict[str, list[int]]:
        return {} if self.part == (0, self.rows) else {"part": list(self.part)}

    @classmethod
    def read(cls, gallery: Path) -> Self:
        """Read and check `index.json`.

        Raises:
            DualmatchError: there is none, it is damaged, or another version wrote it.
        """
        refuse_other_kind(gallery, "a gallery")
        path = gallery / INDEX_FILE
        return cls._of(read_json(path, f"gallery {gallery}"), path)

    @classmethod
    def parsed(cls, data: bytes, path: str) -> Self:
        """As `read`, of bytes that were fetched from `path`."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DualmatchError(f"{path} cannot be read as JSON ({error}).") from None
        return cls._of(content, path)

    @classmethod
    def _of(cls, content: Any, path: Path | str) -> Self:
        try:
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise DualmatchError(f"{path} is not the index of a gallery.")
            if (version := _field(content, "version", int)) not in VERSIONS:
                raise DualmatchError(
                    f"{path} has version {version}, this dualmatch reads versions {VERSIONS[0]} to {VERSIONS[-1]}: "
                    "encode the gallery again."
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
        rows = _field(source, "rows", int)
        first, end = _pair(source["part"]) if "part" in source else (0, rows)
        shards = [_shard(entry) for entry in _field(content, "shards", list)]
        index = cls(
            kind=cast("Kind", kind),
            bundle_path=_field(bundle, "path", str),
            bundle_hash=_field(bundle, "hash", str),
            dimension=_field(content, "dimension", int),
            dtype=dtype,
            batch_size=_field(content, "batch_size", int),
            rows_per_shard=_field(content, "rows_per_shard", int),
            root=None if source["root"] is None else _field(source, "root", str),
            rows=rows,
            part=(first, end),
            source_hash=_field(source, "sha256", str),
            quarantine=_record(content["quarantine"]),
            shards=tuple(shards),
        )
        bounds = [first, *(shard.end_row for shard in shards)]
        if (
            kind not in ("images", "captions")
            or dtype not in ("float16", "float32")
            or min(index.dimension, index.rows, index.batch_size, index.rows_per_shard) < 1
            or index.quarantine.file != QUARANTINE_FILE
            or [shard.first_row for shard in shards] != bounds[:-1]
            or not 0 <= first < end <= rows
            or first % index.rows_per_shard
            or bounds != sorted(set(bounds))
            or bounds[-1] > end
            or len({shard.vectors.file for shard in shards}) < len(shards)
            or index.version != _field(content, "version", int)
            or _field(content, "complete", bool) != index.complete
            or _field(content, "count", int) != index.count
            or _field(content["quarantine"], "count", int) != index.quarantined
        ):
            raise ValueError("its fields contradict each other")
        return index


def relative(path: Path, gallery: Path) -> str:
    """A path as an index records it: seen from the gallery, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), gallery.resolve())).as_posix()


def shard_files(number: int) -> tuple[str, str]:
    """Names of a shard's vectors and items."""
    return f"vectors-{number:05}.npy", f"items-{number:05}.jsonl"


def shard_number(shard: Shard) -> int:
    """The number in the names of a shard's files."""
    return int(shard.vectors.file[len("vectors-") : -len(".npy")])


def _shard(entry: Any) -> Shard:
    first_row, end_row = _pair(entry["rows"])
    shard = Shard(
        first_row=first_row,
        end_row=end_row,
        count=_field(entry, "count", int),
        vectors=_record(entry["vectors"]),
        items=_record(entry["items"]),
        removed=tuple(_pair(pair) for pair in _field(entry, "removed", list)) if "removed" in entry else (),
        dropped=_field(entry, "dropped", int) if "dropped" in entry else 0,
        root=_field(entry, "root", str) if "root" in entry else None,
    )
    # Names are checked, not trusted: an index cannot point outside its gallery.
    if not re.fullmatch(r"vectors-[0-9]{5,9}\.npy", shard.vectors.file):
        raise ValueError(f"{shard.vectors.file[:40]!r} is no name of a shard")
    edges = [edge for pair in shard.removed for edge in pair]
    if (
        shard_files(shard_number(shard)) != (shard.vectors.file, shard.items.file)
        or min(shard.count, shard.dropped) < 0
        or shard.count + shard.dropped > end_row - first_row
        or edges != sorted(set(edges))
        or (edges and not 0 <= edges[0] < edges[-1] <= shard.count)
    ):
        raise ValueError(f"the shard of rows {first_row} to {end_row} is inconsistent")
    return shard


def _pair(content: Any) -> tuple[int, int]:
    if type(content) is not list or len(content) != 2 or any(type(value) is not int for value in content):
        raise TypeError("a range is not two whole numbers")
    return content[0], content[1]


def _field(content: Any, key: str, kind: type[T]) -> T:
    value = content[key]
    if type(value) is not kind:
        raise TypeError(f"{key} is not of type {kind.__name__}")
    return value


def _record(content: Any) -> FileRecord:
    return FileRecord(
        file=_field(content, "file", str), bytes=_field(content, "bytes", int), sha256=_field(content, "sha256", str)
    )
