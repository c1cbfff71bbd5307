"""DSRAN's image encoder without its trunk: the graph for who has the trunk's maps already, cached or from another service."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch import Tensor, nn

from dualmatch.models import ImageEncoder
from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.files import refuse_existing
from dualmatch.runtime.stages import GraphCheck, Stage

from .gate import check_graph, range_stage
from .graph import export_encoder
from .half import magnitudes, to_half

# Largest difference of a component of a unit vector to torch.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3}
LEAST_IMAGES = 4


def export_head(
    encoder: ImageEncoder, inputs: Mapping[str, Tensor], path: Path, *, precision: str = "fp32"
) -> GraphCheck:
    """Write the head of an image encoder as one ONNX graph, if it gives torch's embeddings.

    The graph is traced on three images and checked, in a fresh process, on one, on two and on all of `inputs`: names, axes, shapes,
    values. At fp16 the largest magnitudes on all of `inputs` are compared with float16's range before. It is no bundle, and recall is not
    compared: the whole encoder's export does that.

    Args:
        inputs: what the whole encoder takes, of at least `LEAST_IMAGES` real images: `pixels`, and regions where it reads them.
        path: the `.onnx` file.
        precision: "fp32" or "fp16".

    Returns:
        The stages with what each measured.

    Raises:
        DualmatchError: the file exists, too few images, another precision, a weight or tensor that float16 cannot hold, or a stage failed;
            no file is left behind.
    """
    refuse_existing(path, "the head's graph")
    if precision not in TOLERANCE:
        raise DualmatchError(f"the head alone is exported at {' or '.join(TOLERANCE)}, not {precision!r}.")
    count = len(next(iter(inputs.values())))
    if count < LEAST_IMAGES:
        raise DualmatchError(
            f"the head is checked on shapes other than the traced one: at least {LEAST_IMAGES} images are needed, {count} are given."
        )
    head, given = ImageHead(encoder), head_inputs(encoder, inputs)
    with TemporaryDirectory(dir=path.parent, prefix=".head-") as scratch:
        written = Path(scratch) / path.name
        model = export_encoder(
            head, {name: value[:3] for name, value in given.items()}, written, output="image_embedding"
        )
        batches = [{name: value[:batch].numpy() for name, value in given.items()} for batch in (1, 2, count)]
        stages: tuple[Stage, ...] = ()
        if precision == "fp16":
            half = to_half(model)
            in_range = range_stage(magnitudes(model, half, batches[-1:], Path(scratch)), "head fp16")
            if in_range.status == "FAIL":
                raise DualmatchError(
                    f"the head's graph would overflow at fp16: {in_range.found} (stage {in_range.name}); export it at fp32."
                )
            onnx.save(half, written)
            stages = (in_range,)
        found = check_graph("image", head, batches, written, tolerance=TOLERANCE[precision], graph=f"head {precision}")
        if failed := found.failed:
            raise DualmatchError(f"the head's graph {failed.found} (stage {failed.name}); nothing was written.")
        written.replace(path)
    return replace(found, stages=(*stages, *found.stages))


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
