"""Which optimisation profile runs a batch, and how a batch larger than any profile is cut. Plain logic, no TensorRT."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from typing import Generic, NamedTuple, TypeVar

from dualmatch.runtime.errors import DualmatchError

from .base import TensorSpec
from .engine_record import Profile, Shape

V = TypeVar("V")
BATCH = "batch"


class Piece(NamedTuple):
    """Rows `start:stop` of a batch, run with the profile of that index."""

    profile: int
    start: int
    stop: int


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The index of the profile that fits these shapes and is tuned for the nearest size; None where none fits.

    Of several the one whose tuned-for shapes are nearest in elements, then the one with the smaller maximum, then the first.
    """
    fitting = [index for index, profile in enumerate(profiles) if _fits(profile, shapes)]
    if not fitting:
        return None

    def distance(index: int) -> tuple[float, int]:
        ranges = profiles[index].shapes
        ratios = [_ratio(prod(ranges[name].opt), prod(shape)) for name, shape in shapes.items()]
        return max(ratios), sum(prod(ranges[name].max) for name in shapes)

    return min(fitting, key=distance)


def plan_pieces(
    profiles: Sequence[Profile], inputs: Sequence[TensorSpec], shapes: Mapping[str, Shape], *, engine: str
) -> list[Piece]:
    """How to run a batch of these shapes: in one piece where a profile fits, else cut along the batch axis.

    Cutting changes no embedding: a row of a batch does not see the others.

    Args:
        inputs: name the axis of each input that is the batch.
        shapes: of every input.
        engine: what to call the engine in the error.

    Raises:
        DualmatchError: no profile fits, however the batch is cut.
    """
    batches = {shapes[spec.name][spec.shape.index(BATCH)] for spec in inputs if BATCH in spec.shape}
    whole = choose_profile(profiles, shapes)
    if len(batches) == 1 and (batch := batches.pop()) > 0:
        if whole is not None:
            return [Piece(whole, 0, batch)]

        def with_batch(size: int) -> dict[str, Shape]:
            return {
                spec.name: tuple(
                    size if axis == BATCH else length
                    for axis, length in zip(spec.shape, shapes[spec.name], strict=True)
                )
                for spec in inputs
            }

        # Largest pieces first: fewest launches, and at most two different shapes, so that captured graphs are used again.
        for largest in sorted({_largest_batch(profile, inputs) for profile in profiles}, reverse=True):
            for sizes in _cuts(batch, largest):
                chosen = {size: choose_profile(profiles, with_batch(size)) for size in set(sizes)}
                if all(index is not None for index in chosen.values()):
                    pieces, start = [], 0
                    for size in sizes:
                        index = chosen[size]
                        assert index is not None
                        pieces.append(Piece(index, start, start + size))
                        start += size
                    return pieces
    offered = "; ".join(f"{profile.name}: {_described(profile)}" for profile in profiles)
    asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise DualmatchError(
        f"no profile of {engine} takes {asked}. It has {offered}. Compile with a profile (--profile, --length) that reaches it."
    )


def _cuts(batch: int, largest: int) -> list[list[int]]:
    """Ways to cut a batch into pieces of at most `largest`: full pieces and a rest, else pieces as equal as can be."""
    if batch <= largest:
        return []
    full, rest = divmod(batch, largest)
    count = -(-batch // largest)
    small, larger = divmod(batch, count)
    return [[largest] * full + [rest] * (rest > 0), [small + 1] * larger + [small] * (count - larger)]


def _largest_batch(profile: Profile, inputs: Sequence[TensorSpec]) -> int:
    return min(profile.shapes[spec.name].max[spec.shape.index(BATCH)] for spec in inputs if BATCH in spec.shape)


def _fits(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shape) == len(profile.shapes[name].min)
        and all(
            low <= size <= high
            for low, size, high in zip(profile.shapes[name].min, shape, profile.shapes[name].max, strict=True)
        )
        for name, shape in shapes.items()
    )


def _ratio(tuned: int, size: int) -> float:
    return max(tuned, size) / max(min(tuned, size), 1)


def _described(profile: Profile) -> str:
    return ", ".join(f"{name} {list(s.min)} to {list(s.max)}" for name, s in profile.shapes.items())


class GraphCache(Generic[V]):
    """What was captured for a shape, made at its second use; the one that was not used for longest is dropped beyond the limit.

    The first use runs without a graph: TensorRT allocates and chooses kernels then, which a capture must not record, and a shape
    that never comes back is not worth a capture.

    Args:
        limit: how many are kept.
        release: called with one that is dropped.
    """

    def __init__(self, limit: int, release: Callable[[V], None]) -> None:
        assert limit >= 1
        self._limit, self._release = limit, release
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._made: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._made)

    def get(self, key: Hashable, make: Callable[[], V]) -> V | None:
        """None at a key's first use; at the second what `make` gives; later the same again."""
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        if key not in self._seen:
            self._seen[key] = None
            while (
                len(self._seen) > 64 * self._limit
            ):  # captions come in many shapes; forget what was seen once long ago
                self._seen.popitem(last=False)
            return None
        if len(self._made) >= self._limit:
            self._release(self._made.popitem(last=False)[1])
        self._made[key] = made = make()
        return made

    def clear(self) -> None:
        """Drop all."""
        while self._made:
            self._release(self._made.popitem()[1])
        self._seen.clear()
