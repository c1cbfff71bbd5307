"""Trunks: pixels to feature maps. Each returns a `final` map and the `previous` one at twice its resolution."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from dualmatch.runtime.errors import DualmatchError
from dualmatch.runtime.preprocess import Preprocess

from .config import TrunkConfig
from .efficientnet_lite import FINAL_CHANNELS, PREVIOUS_CHANNELS, EfficientNetLite0, pretrained_efficientnet_lite0

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (127 / 255,) * 3, (128 / 255,) * 3  # how TensorFlow's EfficientNet-Lite was trained

CHANNELS = {
    "tiny": {"final": 96, "previous": 64},
    "efficientnet-lite0": {"final": FINAL_CHANNELS, "previous": PREVIOUS_CHANNELS},
    "resnet152": {"final": 2048, "previous": 1024},
}
STRIDES = {"tiny": 8, "efficientnet-lite0": 32, "resnet152": 32}


class TinyTrunk(nn.Module):
    """Four convolutions for the embedded scenes, trained with the rest: stride 8, 96 channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        strides = (2, 2, 1, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i], widths[i + 1], 3, stride=strides[i], padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.ReLU(),
            )
            for i in range(4)
        )

    def forward(self, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        previous = pixels_B3SS
        for layer in self.layers[:-1]:
            previous = layer(previous)
        return {"final": self.layers[-1](previous), "previous": previous}


class ResNet152(nn.Module):
    """transformers' ResNet in the shape of torchvision's ResNet-152 (stride on the 3x3 convolution): stride 32, 2048 channels."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        self.resnet = ResNetModel(
            ResNetConfig(depths=[3, 8, 36, 3], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck")
        )

    def forward(self, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        x = self.resnet.embedder(pixels_B3SS)
        previous = x
        for stage in self.resnet.encoder.stages:
            previous, x = x, stage(x)
        return {"final": x, "previous": previous}

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Load a state dict with torchvision's names; the classifier is left out, a missing `num_batches_tracked` accepted.

        Raises:
            DualmatchError: a tensor is missing, unknown or of another shape.
        """
        renamed = {
            transformers_from_torchvision(name): value for name, value in state.items() if not name.startswith("fc.")
        }
        own = self.resnet.state_dict()
        counters = {name for name in own if name.endswith("num_batches_tracked")}
        if missing := sorted(set(own) - set(renamed) - counters):
            raise DualmatchError(
                f"the ResNet-152 weights lack {len(missing)} tensors, the first {torchvision_from_transformers(missing[0])!r}; torchvision's names are expected."
            )
        if unknown := sorted(set(renamed) - set(own)):
            raise DualmatchError(
                f"the ResNet-152 weights hold {len(unknown)} tensors that ResNet-152 has not, the first {torchvision_from_transformers(unknown[0])!r}."
            )
        for name, value in renamed.items():
            if value.shape != own[name].shape:
                raise DualmatchError(
                    f"ResNet-152 weight {torchvision_from_transformers(name)!r} must have shape {list(own[name].shape)}, "
                    f"got {list(value.shape)}."
                )
        self.resnet.load_state_dict(renamed, strict=False)


def transformers_from_torchvision(name: str) -> str:
    """transformers' name of a torchvision ResNet tensor (`layer1.0.conv2.weight` and so on)."""
    kind = {"conv": "convolution", "bn": "normalization"}
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kind[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", name):
        part = ("convolution", "normalization")[int(match[3])]
        return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.shortcut.{part}.{match[4]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", name):
        return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.layer.{int(match[4]) - 1}.{kind[match[3]]}.{match[5]}"
    return name


def torchvision_from_transformers(name: str) -> str:
    """The inverse of `transformers_from_torchvision`."""
    kind = {"convolution": "conv", "normalization": "bn"}
    if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{kind[match[1]]}1.{match[2]}"
    if match := re.fullmatch(
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(convolution|normalization)\.(\w+)", name
    ):
        part = int(match[3] == "normalization")
        return f"layer{int(match[1]) + 1}.{match[2]}.downsample.{part}.{match[4]}"
    layer = r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.(convolution|normalization)\.(\w+)"
    if match := re.fullmatch(layer, name):
        return f"layer{int(match[1]) + 1}.{match[2]}.{kind[match[4]]}{int(match[3]) + 1}.{match[5]}"
    return name


def build_trunk(config: TrunkConfig, *, weights: Path | None = None, pretrained: bool = True) -> nn.Module:
    """The trunk that `config` names.

    Args:
        weights: a safetensors file with torchvision's tensor names (`resnet152`).
        pretrained: load pretrained weights; False builds the shape only, for a checkpoint that brings its own.

    Raises:
        DualmatchError: weights are needed and missing, or do not fit.
    """
    if config.name == "tiny":
        return TinyTrunk()
    if config.name == "efficientnet-lite0":
        return pretrained_efficientnet_lite0() if pretrained else EfficientNetLite0()
    assert config.name == "resnet152"
    trunk = ResNet152()
    if pretrained:
        if weights is None:
            raise DualmatchError(
                "the resnet152 trunk needs its weights: give a safetensors file with torchvision's tensor names by --set trunk_weights=FILE."
            )
        if not weights.is_file():
            raise DualmatchError(f"the resnet152 trunk's weights were asked for at {weights}, where there is no file.")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise DualmatchError(
                f"the resnet152 trunk's weights {weights} are not a readable safetensors file ({error})."
            ) from None
        trunk.load_torchvision(state)
    return trunk


def preprocess_of(config: TrunkConfig, resize: str) -> Preprocess:
    """The pre-processing that goes with a trunk.

    Args:
        resize: `squash` (the whole photograph) or `crop` (shorter side to 256/224 of the input, then the centre).
    """
    if config.name == "efficientnet-lite0":
        mean, std, interpolation = HALF_MEAN, HALF_STD, "bicubic"
    else:
        mean, std, interpolation = IMAGENET_MEAN, IMAGENET_STD, "bilinear"
    return Preprocess(image_size=config.image_size, resize=resize, mean=mean, std=std, interpolation=interpolation)  # type: ignore[arg-type]


def map_size(config: TrunkConfig, stage: str) -> int:
    """Side of the trunk's `final` or `previous` map, in cells."""
    stride = STRIDES[config.name] // (1 if stage == "final" else 2)
    return -(-config.image_size // stride)


def hash_of_weights(module: nn.Module) -> str:
    """SHA-256 over all tensors and their names: the identity of a frozen trunk that cached features are keyed by."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()
