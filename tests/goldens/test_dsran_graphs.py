"""The DSRAN goldens as graphs: torch against ONNX in float32 and float16, on the authors' inputs and on other shapes."""

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from dualmatch.export.graph import export_encoder
from dualmatch.export.half import to_half
from dualmatch.runtime.backends import open_session
from dualmatch.runtime.parity import TOLERANCES

from ..agreement import largest_difference  # noqa: TID252  (the tests are no package)
from .cases import folders_of
from .dsran_case import DsranCase

CASES = [DsranCase(folder) for kind in ("dsran_gru", "dsran_bert") for folder in folders_of(kind)]
INPUTS = {"final": "grid_map", "regions": "regions", "region_positions": "img_pos"}


class FromMap(nn.Module):
    """An image encoder from the trunk's map on, where the goldens begin."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, final: Tensor, regions: Tensor, region_positions: Tensor | None = None) -> Tensor:
        return self.encoder.embed({"final": final}, regions, region_positions)


def encoder_of(case, side):
    model = case.network()
    return FromMap(model.image_encoder).eval() if side == "image" else model.text_encoder


def own(case, side):
    if side == "text":
        return {"token_ids": case.theirs["in/captions"]}
    names = dict(INPUTS) if case.names.variant == "bert" else {k: v for k, v in INPUTS.items() if "position" not in k}
    return {name: case.theirs[f"in/{theirs}"] for name, theirs in names.items()}


def feeds(case, side, batch, length):
    chance = np.random.default_rng(batch + length)
    if side == "image":
        return {
            name: chance.standard_normal((batch, *value.shape[1:])).astype(np.float32)
            for name, value in own(case, side).items()
        }
    words = (case.facts["bert_config"] or case.opt)["vocab_size"]
    token_ids = chance.integers(1, words, (batch, length))
    lengths = chance.integers(1, length + 1, batch)
    return {"token_ids": token_ids * (np.arange(length) < lengths[:, None])}


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_in_float32_and_float16(case, side, tmp_path):
    encoder = encoder_of(case, side)
    example = {name: torch.from_numpy(value) for name, value in feeds(case, side, 3, 7).items()}
    graph = export_encoder(encoder, example, tmp_path / "single.onnx", output=f"{side}_embedding")
    lengths = (0,) if side == "image" else (32,) if case.names.variant == "bert" else (1, 2, 5, 17, 40)
    batches = [feeds(case, side, batch, length) for batch in (1, 2, 7) for length in lengths]
    assert largest_difference(encoder, tmp_path / "single.onnx", [*batches, own(case, side)]) <= 1e-5
    onnx.save(to_half(graph), tmp_path / "half.onnx")
    with open_session(tmp_path / "half.onnx") as session:
        (half,) = session.run(own(case, side)).values()
    theirs = case.theirs["out/img_emb" if side == "image" else "out/cap_emb"]
    cosines = (half * theirs).sum(axis=1) / np.linalg.norm(half, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() > TOLERANCES["fp16"].worst_cosine
