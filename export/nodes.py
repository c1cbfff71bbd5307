"""The image encoder with its nodes as a second output, for the pictures of what it looks at."""

from torch import Tensor, nn

from dualmatch.models import ImageEncoder
from dualmatch.models.vsrn import VsrnImageEncoder
from dualmatch.runtime.nodes import NodeGroup


class WithNodes(nn.Module):
    """An image encoder that gives its embeddings, unchanged, and its nodes (see its `with_nodes`)."""

    def __init__(self, encoder: ImageEncoder | VsrnImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, pixels: Tensor | None = None, regions: Tensor | None = None, region_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and nodes (B, N, D) from the encoder's own inputs."""
        given = {"pixels": pixels, "regions": regions, "region_positions": region_positions}
        result: tuple[Tensor, Tensor] = self.encoder.with_nodes(
            **{name: value for name, value in given.items() if value is not None}
        )
        return result

    def groups(self, count: int) -> tuple[NodeGroup, ...]:
        """What the nodes are, for the manifest, where they are `count` in all."""
        boxes_of = self.encoder.node_boxes
        rest = count - sum(len(boxes) for boxes in boxes_of.values() if boxes is not None)
        return tuple(
            NodeGroup(
                kind=kind,
                count=rest if boxes is None else len(boxes),
                boxes=() if boxes is None else tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes.tolist()),
            )
            for kind, boxes in boxes_of.items()
        )
