"""What the benchmarks put into a graph: random tensors that fit it, or photographs and captions to prepare."""

from collections.abc import Sequence

import numpy as np

from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.errors import DualmatchError


def random_feeds(
    inputs: Sequence[TensorSpec],
    *,
    batch: int,
    length: int | None = None,
    vocabulary_size: int | None = None,
    seed: int = 0,
) -> dict[str, Array]:
    """One batch that a graph with these inputs accepts; the same seed gives the same batch.

    Floats are standard normal, as normalised pixels are; uint8 is 0 … 255; masks (bool, or `mask` in the name) are all on;
    integers of rank 2 are token ids in [1, vocabulary_size), 0 being the padding; integers of rank 1 are caption lengths.

    Args:
        batch: the size of the axes named `batch`.
        length: the size of the axes named `length` (tokens); needed only where there are any.
        vocabulary_size: needed only where there are token ids.

    Raises:
        DualmatchError: an axis of another name, an input that none of these rules covers, or a size that is missing.
    """
    sizes = {"batch": batch, "length": length}
    if any(size is not None and size < 1 for size in sizes.values()):
        raise DualmatchError(f"batch and length must be at least 1, got {batch} and {length}.")

    def size_of(axis: int | str, spec: TensorSpec) -> int:
        size = axis if isinstance(axis, int) else sizes.get(axis)
        if size is None:
            known = "no length was given" if axis == "length" else "only `batch` and `length` are known"
            raise DualmatchError(f"input {spec.name!r} has the dynamic axis {axis!r}; {known}.")
        return size

    generator, feeds = np.random.default_rng(seed), {}
    for spec in inputs:
        shape, dtype = tuple(size_of(axis, spec) for axis in spec.shape), np.dtype(spec.dtype)
        if dtype == np.bool_ or "mask" in spec.name:
            value: Array = np.ones(shape)
        elif np.issubdtype(dtype, np.floating):
            value = generator.standard_normal(shape, dtype=np.float32)
        elif dtype == np.uint8:
            value = generator.integers(256, size=shape)
        elif len(shape) == 2:
            if vocabulary_size is None or vocabulary_size < 2:
                raise DualmatchError(
                    f"input {spec.name!r} takes token ids: a vocabulary of at least 2 is needed, got {vocabulary_size}."
                )
            value = generator.integers(1, vocabulary_size, size=shape)
        elif len(shape) == 1 and length is not None:
            value = np.full(shape, length)
        else:
            raise DualmatchError(f"there is no rule to fill input {spec.name!r} ({spec.dtype} {list(spec.shape)}).")
        feeds[spec.name] = value.astype(dtype)
    return feeds
