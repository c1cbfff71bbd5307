"""Optimisation profiles: the shapes that an engine accepts, and the one in each profile that it is tuned for."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dualmatch.runtime.backends import TensorSpec
from dualmatch.runtime.backends.engine_record import Profile, Shape, ShapeRange
from dualmatch.runtime.errors import DualmatchError


class AxisRange(NamedTuple):
    """The smallest, the tuned-for and the largest size of a dynamic axis."""

    min: int
    opt: int
    max: int


MAX_SIZE = 65536
"""The largest batch and length that the exporter lets a graph take."""

NAMED_BATCHES = {"latency": AxisRange(1, 1, 1), "throughput": AxisRange(1, 32, 64)}
"""The batch sizes of the profiles that have a name."""


def parse_axis_range(text: str, *, what: str) -> AxisRange:
    """Read `MIN:OPT:MAX`; `what` names it in the error.

    Raises:
        DualmatchError: not three whole numbers with 1 <= MIN <= OPT <= MAX, or more than the graphs take.
    """
    try:
        smallest, tuned, largest = (int(part) for part in text.split(":"))
    except ValueError:
        smallest, tuned, largest = 0, 0, 0
    if not 1 <= smallest <= tuned <= largest:
        raise DualmatchError(f"{what} must be MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, as in 1:32:64, got {text!r}.")
    if largest > MAX_SIZE:
        raise DualmatchError(
            f"{what} reaches {largest}, but the exported graphs take at most {MAX_SIZE}; give a smaller MAX."
        )
    return AxisRange(smallest, tuned, largest)


def profile_from_text(text: str, inputs: Sequence[TensorSpec], *, length: AxisRange | None = None) -> Profile:
    """The profile that `latency`, `throughput` or a batch size MIN:OPT:MAX asks for.

    Args:
        text: the profile as a user writes it; it becomes the profile's name.
        inputs: the graph's inputs.
        length: caption lengths in tokens; needed where an input has the axis `length`.

    Raises:
        DualmatchError: a text that is neither, or an input with a dynamic axis that is not covered.
    """
    if text not in NAMED_BATCHES and ":" not in text:
        raise DualmatchError(
            f"there is no profile {text!r}; choose {', '.join(NAMED_BATCHES)} or batch sizes MIN:OPT:MAX."
        )
    batch = NAMED_BATCHES.get(text) or parse_axis_range(text, what="a profile's batch size")
    return profile_for(text, inputs, axes={"batch": batch} | ({"length": length} if length else {}))


def profile_for(name: str, inputs: Sequence[TensorSpec], *, axes: Mapping[str, AxisRange]) -> Profile:
    """A profile in which every dynamic axis takes the range given for its name, in all inputs alike.

    Raises:
        DualmatchError: an input has a dynamic axis for which there is no range.
    """
    for spec in inputs:
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in axes:
                raise DualmatchError(
                    f"profile {name!r}: input {spec.name!r} has the dynamic axis {axis!r}, "
                    f"for which no sizes are given (only for {', '.join(axes) or 'none'})."
                )

    def sized(spec: TensorSpec, bound: int) -> Shape:
        return tuple(axes[axis][bound] if isinstance(axis, str) else axis for axis in spec.shape)

    return Profile(
        name=name, shapes={spec.name: ShapeRange(sized(spec, 0), sized(spec, 1), sized(spec, 2)) for spec in inputs}
    )


def check_profile(profile: Profile, inputs: Sequence[TensorSpec]) -> None:
    """Refuse a profile that TensorRT would reject for these inputs, in the user's terms.

    Raises:
        DualmatchError: another set of inputs, another rank, another size of a fixed axis, or sizes out of order.
    """
    names = [spec.name for spec in inputs]
    if set(profile.shapes) != set(names):
        raise DualmatchError(
            f"profile {profile.name!r} gives shapes for {sorted(profile.shapes)}, but the graph takes {sorted(names)}."
        )
    for spec in inputs:
        shapes = profile.shapes[spec.name]
        fits = all(
            len(shape) == len(spec.shape)
            and all(isinstance(want, str) or want == got for want, got in zip(spec.shape, shape, strict=True))
            for shape in shapes
        )
        if not fits or not all(1 <= low <= tuned <= high for low, tuned, high in zip(*shapes, strict=True)):
            raise DualmatchError(
                f"profile {profile.name!r} does not fit input {spec.name!r} {list(spec.shape)}: "
                f"min {list(shapes.min)}, opt {list(shapes.opt)}, max {list(shapes.max)}."
            )
