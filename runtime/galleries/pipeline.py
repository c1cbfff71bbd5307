"""From sources to batches: read and pre-processed in threads, a few batches ahead of the encoder and never further.

Threads, because decoding, resizing and arithmetic release Python's lock (`bench/encode.py` measures them against processes).
What is in a batch depends on the row alone: neither on the pace of threads nor on which neighbours can be read.
"""

import errno
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

from .photos import SourceGoneError

UNITS_AHEAD = 2  # being prepared or waiting while one is encoded
# Troubles of the machine or its network, not of the photograph that met them.
MACHINE_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}
)


class Source(Protocol):
    """Something to encode, not yet read; `fields` is what the gallery records about it beside row and id."""

    @property
    def id(self) -> str: ...

    def fields(self) -> dict[str, str]: ...


SourceT = TypeVar("SourceT", bound=Source)
SourceT_contra = TypeVar("SourceT_contra", bound=Source, contravariant=True)


class GalleryEncoder(Protocol[SourceT_contra]):
    """What turns sources into vectors; inherit it and write `prepare` and `encode`."""

    dimension: int
    """Length of a vector."""
    window_batches: int = 1
    """Rows may change batches, by their size, within so many batches of consecutive rows; 1 leaves them in order."""

    def prepare(self, source: SourceT_contra, /) -> Any:
        """Read and pre-process one source; called from several threads.

        DualmatchError and OSError mean that this source cannot be used; anything else is a fault of the program.
        """
        ...

    def size(self, prepared: Any, /) -> int:  # noqa: ARG002
        """What a prepared source costs when it is padded to its batch's largest: rows of similar size share a batch."""
        return 0

    def collate(self, prepared: Sequence[Any], /) -> Any:
        """Up to a batch of prepared sources as `encode` takes them; called from a thread, so that the encoder need not wait for it."""
        return prepared

    def encode(self, batch: Any, /) -> NDArray[np.float32]:
        """A collated batch to float32 (n, dimension); called from one thread, in row order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Consecutive rows that are prepared, encoded and stored together.

    Attributes:
        rows: all of them, unreadable ones too.
        batches: for each, the rows in it and what the encoder takes; a readable row is in exactly one.
        unreadable: the other rows, and why.
    """

    rows: range
    batches: list[tuple[list[int], Any]]
    unreadable: dict[int, str]


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    reason: str


def prepared_units(
    sources: Sequence[SourceT],
    encoder: GalleryEncoder[SourceT],
    units: Iterable[range],
    *,
    batch_size: int,
    threads: int,
) -> Generator[Unit, None, None]:
    """The units in order, ready to encode.

    Raises:
        DualmatchError: a source that the machine cannot read now, though it may be good.
    """
    prepare = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    assemble = ThreadPoolExecutor(1, thread_name_prefix="assemble")
    pending: deque[Future[Unit]] = deque()
    try:
        for rows in units:
            # A task is a part of a batch: one for each row would cost captions more than their tokenising.
            step = -(-min(len(rows), batch_size) // threads)
            parts = [
                prepare.submit(_prepared, [sources[row] for row in rows[start : start + step]], encoder)
                for start in range(0, len(rows), step)
            ]
            pending.append(assemble.submit(_assembled, rows, parts, encoder, batch_size))
            del parts  # else the last unit's pixels would be held until the next one is submitted
            if len(pending) > max(UNITS_AHEAD, 2 * threads // len(rows)):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # In this order: the assembling thread may wait for parts that are cancelled here, and then ends.
        prepare.shutdown(cancel_futures=True)
        assemble.shutdown(cancel_futures=True)


def _prepared(sources: Sequence[SourceT], encoder: GalleryEncoder[SourceT]) -> list[Any]:
    return [_prepared_one(source, encoder.prepare) for source in sources]


def _prepared_one(source: SourceT, prepare: Callable[[SourceT], Any]) -> Any:
    try:
        return prepare(source)
    except SourceGoneError:
        raise
    except MemoryError:
        raise DualmatchError(
            f"there is not enough memory to read {source.id}; go on with --resume and a smaller --max-pixels."
        ) from None
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise DualmatchError(f"{source.id} cannot be read now: {error.strerror}; go on with --resume.") from None
        return _Unreadable(reason=_reason(error))
    except DualmatchError as error:
        return _Unreadable(reason=_reason(error))


def _assembled(rows: range, parts: list[Future[list[Any]]], encoder: GalleryEncoder[Any], batch_size: int) -> Unit:
    values = [value for part in parts for value in part.result()]
    parts.clear()
    unreadable = {row: v.reason for row, v in zip(rows, values, strict=True) if isinstance(v, _Unreadable)}
    # An unreadable row keeps its place among the others, so that they are cut into the same batches with and without it.
    order = sorted(range(len(rows)), key=lambda i: 0 if rows[i] in unreadable else encoder.size(values[i]))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [i for i in order[start : start + batch_size] if rows[i] not in unreadable]
        if chosen:
            batches.append(([rows[i] for i in chosen], encoder.collate([values[i] for i in chosen])))
    return Unit(rows=rows, batches=batches, unreadable=unreadable)


def _reason(error: Exception) -> str:
    """Why a source cannot be used, without what differs between two runs (addresses of objects)."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text).rstrip(".") or type(error).__name__
