"""The networks that are measured, with random weights (time does not depend on them), as torch modules, sessions and graphs."""

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from dualmatch.export.graph import export_encoder, specs
from dualmatch.export.half import to_half
from dualmatch.models import DSRAN, DsranConfig, TextConfig, TrunkConfig
from dualmatch.models.trunks import build_trunk
from dualmatch.runtime.backends import Session, TensorSpec
from dualmatch.runtime.backends.base import Array
from dualmatch.runtime.bundle import EncoderEntry, EncoderName

Precision = Literal["fp32", "fp16"]
Mode = Literal["eager", "compile"]
VOCABULARY = 30522


def network(trunk: Literal["tiny", "resnet152"]) -> DSRAN:
    """DSRAN on ResNet-152 with a text encoder of MiniLM's size; `tiny` for trying the benchmark out."""
    torch.manual_seed(0)
    large = trunk == "resnet152"
    config = DsranConfig(
        trunk=TrunkConfig(name=trunk, frozen=large, image_size=224 if large else 64),
        text=TextConfig(
            encoder="bert",
            vocabulary_size=VOCABULARY,
            word_dim=384 if large else 24,
            num_layers=6 if large else 1,
            num_heads=12 if large else 3,
            intermediate_dim=1536 if large else 32,
        ),
        embed_dim=1024 if large else 16,
        num_heads=16 if large else 4,
    )
    model = DSRAN(config, None if config.trunk.name == "none" else build_trunk(config.trunk, pretrained=False))
    for name in ("image", "text"):
        _settle(encoder_of(model, name), example(model, name, 16))
    return model.eval()


def _settle(encoder: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """BatchNorm statistics of these inputs: with those of an untrained network activations double from block to block, past float16."""
    encoder.eval()
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        encoder(**inputs)
    encoder.eval()


def encoder_of(model: DSRAN, name: EncoderName) -> nn.Module:
    """One side of a network."""
    return model.image_encoder if name == "image" else model.text_encoder


def example(model: DSRAN, name: EncoderName, batch: int, length: int = 16) -> dict[str, torch.Tensor]:
    """Random inputs."""
    chance = torch.Generator().manual_seed(batch)
    if name == "text":
        return {"token_ids": torch.randint(1, VOCABULARY, (batch, length), generator=chance)}
    size = model.image_encoder.config.trunk.image_size
    return {"pixels": torch.randn(batch, 3, size, size, generator=chance)}


def export_graph(model: DSRAN, name: EncoderName, precision: Precision, folder: Path) -> EncoderEntry:
    """The encoder's graph in `folder`, described as a manifest does."""
    path = folder / f"{name}_encoder.{precision}.onnx"
    graph = export_encoder(encoder_of(model, name), example(model, name, 2), path, output=f"{name}_embedding")
    if precision == "fp16":
        graph = to_half(graph)
        onnx.save(graph, path)
    return EncoderEntry(
        file=path.name,
        precision=precision,
        opset=max(entry.version for entry in graph.opset_import),
        inputs=specs(graph.graph.input),
        outputs=specs(graph.graph.output),
        tolerance=0.0,
        measured=0.0,
    )


class TorchSession(Session):
    """An encoder in torch, from host arrays to host arrays as every other backend.

    Args:
        precision: `fp16` runs under autocast, torch's own way to mixed precision.
        mode: eager, or `torch.compile` with CUDA graphs (`reduce-overhead`).
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        precision: Precision,
        mode: Mode,
        device: str,
    ) -> None:
        self._device, self._half = device, precision == "fp16"
        self._encoder: Any = (
            copy.deepcopy(encoder).to(device).eval()
        )  # the network itself stays where it is exported from
        if mode == "compile":
            self._encoder = torch.compile(self._encoder, mode="reduce-overhead" if device == "cuda" else "default")
        self.inputs, self.outputs = inputs, outputs
        self.backend = f"torch-{mode}"
        where = torch.cuda.get_device_name() if device == "cuda" else device
        self.provider = f"torch {torch.__version__} {mode} {'autocast fp16' if self._half else 'fp32'} on {where}"

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode(), torch.autocast(self._device, torch.float16, enabled=self._half):
            values = {name: torch.from_numpy(value).to(self._device) for name, value in feeds.items()}
            return {self.outputs[0].name: self._encoder(**values).float().cpu().numpy()}

    def _release(self) -> None:
        self._encoder = None


def flops(model: DSRAN, name: EncoderName, length: int) -> int:
    """Floating-point operations of one item, from torch's own count of products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder_of(model, name)(**example(model, name, 1, length))
    return int(counter.get_total_flops())


def gemm_roof(precision: Precision, device: str, size: int = 8192, repeats: int = 20) -> float:
    """Operations per second of a large matrix product on random numbers: the most that an encoder could reach here.

    float32 products are without TF32, as everything that is compared with them here.
    """
    dtype = torch.float16 if precision == "fp16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        torch.matmul(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronise(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def strict_float32() -> None:
    """No TF32 in torch: float32 means float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
