"""Photographs in a column of parquet files, or of arrow files as Hugging Face `datasets` saves them."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from dualmatch.runtime.errors import DualmatchError

from .photos import OnlyIds, Photo, require_size

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_CHUNK = 32  # decoded from a row group at a time
CHUNKS_KEPT = 16  # threads read nearly in order: this is more than they are ever apart


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnPhoto(OnlyIds):
    """A row of a column: its id is the file's path, `#`, and the row in that file counted from 0."""

    file: str
    row: int
    reader: "_Column"

    @property
    def id(self) -> str:
        return f"{self.file}#{self.row}"

    def read(self) -> bytes:
        data = self.reader.value(self.row)
        if data is None:
            raise DualmatchError("the column holds nothing in this row.")
        require_size(len(data))
        return data


def photos_of_columns(files: Sequence[Path], root: Path, column: str | None) -> list[Photo]:
    """Every row of the files, in their order.

    Raises:
        DualmatchError: pyarrow is not installed, a file that cannot be read, or no such column, or several that may be meant.
    """
    try:
        import pyarrow  # noqa: F401, ICN001
    except ImportError:
        raise DualmatchError(
            "parquet and arrow files need pyarrow, which is not installed: pip install 'dualmatch[parquet]'."
        ) from None
    photos: list[Photo] = []
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            reader = _Column(path, column)
        except DualmatchError:
            raise
        except Exception as error:  # noqa: BLE001  (pyarrow's exceptions derive from whatever fits each)
            raise DualmatchError(f"{path} cannot be read: {_first_line(error)}.") from None
        photos += [ColumnPhoto(file=name, row=row, reader=reader) for row in range(reader.num_rows)]
    if not photos:
        raise DualmatchError(f"the {len(files)} file(s) {files[0]} … have no row.")
    return photos


class _Column:
    """Random access to a column's values, cheap as long as rows are asked for nearly in order."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path, self._asked = path, column
        self._file = _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
        self._column = _chosen(self._file.schema, column, path)
        self._starts = [0]
        for count in self._file.group_rows:
            self._starts.append(self._starts[-1] + count)
        self.num_rows = self._starts[-1]
        self._lock = Lock()
        self._chunks: OrderedDict[tuple[int, int], list[bytes | None]] = OrderedDict()
        self._running: tuple[int, int, Iterator[Any]] | None = None

    def __reduce__(self) -> tuple[type["_Column"], tuple[Path, str | None]]:
        """Sent to another process, it opens the file there."""
        return _Column, (self.path, self._asked)

    def value(self, row: int) -> bytes | None:
        """The bytes of a row.

        Raises:
            DualmatchError: the file is damaged where they are.
        """
        group = next(g for g in range(len(self._starts) - 1) if row < self._starts[g + 1])
        chunk, place = divmod(row - self._starts[group], ROWS_PER_CHUNK)
        with self._lock:
            if (group, chunk) not in self._chunks:
                try:
                    self._read(group, chunk)
                except Exception as error:  # noqa: BLE001  (as above)
                    self._running = None
                    raise DualmatchError(f"its file is damaged there: {_first_line(error)}") from None
            return self._chunks[group, chunk][place]

    def _read(self, group: int, chunk: int) -> None:
        """Decode a row group up to `chunk`, going on where the last call stopped if that is before it."""
        if self._running is None or self._running[0] != group or self._running[1] > chunk:
            self._running = group, 0, self._file.batches(group, self._column)
        _, position, batches = self._running
        while position <= chunk:
            values = next(batches)
            if position == chunk:
                self._chunks[group, chunk] = _bytes_of(values)
            position += 1
        self._running = group, position, batches
        while len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        # Buffered, because a row group of photographs may have gigabytes.
        self._file = pq.ParquetFile(path, buffer_size=2**20)
        self.schema: pa.Schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, group: int, column: str) -> Iterator[Any]:
        batches = self._file.iter_batches(ROWS_PER_CHUNK, row_groups=[group], columns=[column], use_threads=False)
        return (batch.column(0) for batch in batches)


class _Arrow:
    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        source = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
        except pa.ArrowInvalid:  # the other of the two arrow layouts
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.schema: pa.Schema = reader.schema
        self.group_rows = [batch.num_rows for batch in self._batches]

    def batches(self, group: int, column: str) -> Iterator[Any]:
        values = self._batches[group].column(column.partition(".")[0])
        return (values.slice(start, ROWS_PER_CHUNK) for start in range(0, len(values), ROWS_PER_CHUNK))


def _chosen(schema: "pa.Schema", column: str | None, path: Path) -> str:
    """The column's name, `.bytes` appended where it is a `{bytes, path}`."""
    possible = {field.name: leaf for field in schema if (leaf := _leaf(field.type)) is not None}
    if column is None and len(possible) == 1:
        column = next(iter(possible))
    if column is None or column not in possible:
        asked = "no column is named" if column is None else f"{column!r} is asked for"
        found = ", ".join(possible) or "none"
        raise DualmatchError(
            f"{path}: {asked}, columns that can hold photographs (bytes, or {{bytes, path}}): {found}; choose with --column."
        )
    return column + possible[column]


def _leaf(kind: "pa.DataType") -> str | None:
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return ""
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return None if _leaf(kind.field("bytes").type) != "" else ".bytes"
    return None


def _bytes_of(values: Any) -> list[bytes | None]:
    found = values.to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in found]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
