"""The image encoder's second output, where a bundle has one: its nodes, from which `attention` draws what the network looks at."""

from dataclasses import dataclass
from typing import Literal

from .backends.base import TensorSpec
from .errors import DualmatchError

NodeKind = Literal["global", "regional"]
NODES_OUTPUT = "image_nodes"


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Consecutive nodes of one kind.

    Attributes:
        kind: `global`: cells of the trunk's map, row by row; `regional`: regions.
        count: how many.
        boxes: x1, y1, x2, y2 of each in fractions of the square of pixels that the graph takes; none where the regions come from a
            file, which then holds their boxes too.
    """

    kind: NodeKind
    count: int
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class NodesOutput:
    """What the manifest says of the output.

    Attributes:
        output: its name, dtype and shape (batch, nodes, dimension).
        groups: its nodes, in order.
        tolerance: largest absolute difference to torch of a component that export allowed, as a share of the largest component.
        measured: the largest that it saw.
    """

    output: TensorSpec
    groups: tuple[NodeGroup, ...]
    tolerance: float
    measured: float

    def check(self, dimension: int) -> None:
        """Refuse what does not fit together.

        Raises:
            DualmatchError: it does not.
        """
        count = sum(group.count for group in self.groups)
        kinds = [group.kind for group in self.groups]
        if self.output.shape[1:] != (count, dimension) or len(set(kinds)) != len(kinds) or not kinds:
            raise DualmatchError(
                f"gives {self.output.name!r} the shape {list(self.output.shape)}, and its groups are "
                f"{', '.join(f'{group.count} {group.kind}' for group in self.groups) or 'none'} nodes of {dimension} components"
            )
        for group in self.groups:
            if group.count < 1 or len(group.boxes) not in (0, group.count):
                raise DualmatchError(f"has {len(group.boxes)} boxes for its {group.count} {group.kind} nodes")
            if any(not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1) for x1, y1, x2, y2 in group.boxes):
                raise DualmatchError(f"has a box of a {group.kind} node that is empty or not within 0 and 1")
