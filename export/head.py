"""DSRAN's image encoder without its trunk: the graph for who has the trunk's maps already, cached or from another service."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualmatch.models import ImageEncoder
from dualmatch.runtime.errors import DualmatchError


class ImageHead(nn.Module):
    """Grid maps and region features to unit vectors: an encoder's own head, with its weights.

    Args:
        encoder: an image encoder whose trunk is left out.

    Raises:
        DualmatchError: the encoder reads no map, so it is a head already.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        if not encoder.stages:
            raise DualmatchError("this image encoder takes region features alone: it has no trunk to leave out.")
        self.stages = encoder.stages
        self.input_names = (
            *(f"{stage}_map" for stage in encoder.stages),
            *(name for name in encoder.input_names if name != "pixels"),
        )
        trunk, encoder.trunk = encoder.trunk, None
        try:
            self.encoder = encoder.__class__(encoder.config, None)
            self.encoder.load_state_dict(encoder.state_dict())
        finally:
            encoder.trunk = trunk
        self.eval()

    def forward(
        self,
        final_map: Tensor | None = None,
        previous_map: Tensor | None = None,
        regions: Tensor | None = None,
        region_positions: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, D), of unit norm, from maps (B, C, H, W) by stage and, where the network takes them, regions."""
        given = {"final": final_map, "previous": previous_map}
        maps = {stage: value for stage, value in given.items() if value is not None}
        result: Tensor = self.encoder.embed(maps, regions, region_positions)
        return result


def head_inputs(encoder: ImageEncoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the head takes in the place of an image encoder's `inputs`: `pixels` become the trunk's maps."""
    assert encoder.trunk is not None
    with torch.inference_mode():
        maps = encoder.trunk(inputs["pixels"])
    given = {f"{stage}_map": maps[stage].clone() for stage in encoder.stages}
    return given | {name: value for name, value in inputs.items() if name != "pixels"}
