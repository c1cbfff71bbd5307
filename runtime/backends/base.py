"""What every backend offers: one compiled graph that maps named arrays to named arrays."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dualmatch.runtime.errors import DualmatchError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A graph's input or output as the manifest records it: a string in `shape` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class NotFiniteError(DualmatchError):
    """A graph gave NaN or infinity."""


class Session(ABC):
    """One graph, loaded. The base class owns the checks; a backend writes only `_run` and `_release`.

    Attributes:
        inputs, outputs: what the graph takes and gives.
        backend: the backend's name as `--backend` spells it.
        provider: what the graph *really* runs on, read back from the engine, never what was asked for.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    backend: str
    provider: str
    _closed = False

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            DualmatchError: a feed is missing, unknown, or of another dtype or shape than the graph takes, or an output is not finite.
            RuntimeError: the session was closed.
        """
        if self._closed:
            raise RuntimeError(f"this {self.backend} session is closed.")
        self._check_feeds(feeds)
        results = self._run(feeds)
        for name, value in results.items():
            if not np.logical_and.reduce(np.isfinite(value), axis=None):  # `.all()` goes through Python
                raise NotFiniteError(f"{self.backend} ({self.provider}): output {name!r} holds NaN or infinity.")
        return results

    @cached_property
    def _wanted(self) -> dict[str, tuple[np.dtype[Any], int, tuple[tuple[int, int], ...]]]:
        """For each input its dtype, its rank and its fixed axes with their sizes: worked out once, looked at in every call."""
        return {
            spec.name: (
                np.dtype(spec.dtype),
                len(spec.shape),
                tuple((axis, size) for axis, size in enumerate(spec.shape) if isinstance(size, int)),
            )
            for spec in self.inputs
        }

    def _check_feeds(self, feeds: Mapping[str, Array]) -> None:
        wanted = self._wanted
        if feeds.keys() != wanted.keys():
            raise DualmatchError(f"the graph takes inputs {sorted(wanted)}, got {sorted(feeds)}.")
        for name, (dtype, rank, fixed) in wanted.items():
            value = feeds[name]
            shape = value.shape
            fits = value.dtype == dtype and len(shape) == rank
            for axis, size in fixed:
                fits = fits and shape[axis] == size
            if not fits:
                (spec,) = (spec for spec in self.inputs if spec.name == name)
                raise DualmatchError(
                    f"input {name!r} must be {spec.dtype} {list(spec.shape)}, got {value.dtype} {list(shape)}."
                )

    @abstractmethod
    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    @abstractmethod
    def _release(self) -> None: ...

    def close(self) -> None:
        """Release the graph; the session cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
