"""The convolutional halves of a VQ-GAN: residual blocks that narrow an image and widen it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.compiled import is_compiled_for_gpus

# Convolutions on tensor cores take their input channels in groups of this many.
TENSOR_CORE_CHANNELS = 8


class Shape(NamedTuple):
    """What both halves share; the lists go from the highest resolution to the lowest.

    `channels` holds the width at each resolution; between two the resolution halves. Where
    `attention` holds true every residual block of that resolution is followed by self-attention;
    `middle_attention` asks for it at the lowest resolution between the halves. With `patch_size`
    > 1 patches of pixels become channels first, so that no convolution runs at full resolution.
    """

    image_channels: int
    channels: Sequence[int]
    attention: Sequence[bool]
    residual_blocks: int
    code_dim: int
    middle_attention: bool
    patch_size: int


class Encoder(nn.Module):
    """Images (batch, image_channels, H, W) → vectors (batch, code_dim, H/f, W/f)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels = shape.channels
        self.patch = nn.PixelUnshuffle(shape.patch_size)
        pixels = shape.image_channels * shape.patch_size**2
        self.conv_in = nn.Conv2d(pixels, channels[0], 3, padding=1)
        levels: list[nn.Module] = []
        width = channels[0]
        for level, out in enumerate(channels):
            levels += _blocks(width, out, shape.residual_blocks, shape.attention[level])
            width = out
            if level < len(channels) - 1:
                levels.append(Downsample(width))
        self.levels = nn.Sequential(*levels)
        self.middle = _middle(width, shape.middle_attention)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, shape.code_dim, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (batch, image_channels, H, W)."""
        hidden = self.middle(self.levels(self._read(self.patch(images))))
        encoded: Tensor = self.conv_out(F.silu(self.norm_out(hidden)))
        return encoded

    def _read(self, pixels: Tensor) -> Tensor:
        if not is_compiled_for_gpus(pixels):
            return self.conv_in(pixels)
        padded = (0, 0, 0, 0, 0, -pixels.shape[1] % TENSOR_CORE_CHANNELS)
        weight = F.pad(self.conv_in.weight, padded)
        return F.conv2d(F.pad(pixels, padded), weight, self.conv_in.bias, padding=1)


class Decoder(nn.Module):
    """Codes (batch, code_dim, h, w) → (batch, image_channels, h·f, w·f), the encoder's mirror.

    Each resolution has one residual block more than in the encoder, since writing an image is
    harder than reading it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.channels[-1]
        self.conv_in = nn.Conv2d(shape.code_dim, width, 3, padding=1)
        self.middle = _middle(width, shape.middle_attention)
        levels: list[nn.Module] = []
        for level in reversed(range(len(shape.channels))):
            if level < len(shape.channels) - 1:
                levels.append(Upsample(width))
            out = shape.channels[level]
            levels += _blocks(width, out, shape.residual_blocks + 1, shape.attention[level])
            width = out
        self.levels = nn.Sequential(*levels)
        self.norm_out = group_norm(width)
        pixels = shape.image_channels * shape.patch_size**2
        self.conv_out = nn.Conv2d(width, pixels, 3, padding=1)
        self.unpatch = nn.PixelShuffle(shape.patch_size)

    def forward(self, codes: Tensor) -> Tensor:
        """Decode codes (batch, code_dim, h, w)."""
        hidden = self.levels(self.middle(self.conv_in(codes)))
        images: Tensor = self.unpatch(self.conv_out(F.silu(self.norm_out(hidden))))
        return images


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each after GroupNorm and SiLU, added to the input."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_1 = group_norm(width)
        self.conv_1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm_2 = group_norm(out)
        self.conv_2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, width, H, W) to (batch, out, H, W)."""
        change = self.conv_1(F.silu(self.norm_1(hidden)))
        change = self.conv_2(F.silu(self.norm_2(change)))
        summed: Tensor = self.skip(hidden) + change
        return summed


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.query_key_value = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, width, H, W) to the same shape."""
        batch, width, h, w = hidden.shape
        rows = self.query_key_value(self.norm(hidden)).flatten(2).transpose(1, 2)
        query, key, value = rows.unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(batch, width, h, w)
        summed: Tensor = hidden + self.out(mixed)
        return summed


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, width, H, W) to (batch, width, H/2, W/2), H and W even."""
        # Padded at the right and bottom only, so that the kernel's centre meets every second cell.
        halved: Tensor = self.conv(F.pad(hidden, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then smooth by a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, width, H, W) to (batch, width, 2·H, 2·W)."""
        doubled: Tensor = self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return doubled


class GroupNorm(nn.GroupNorm):
    """GroupNorm whose compiled form on GPUs reads channels-last maps as they lie in memory."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (batch, width, H, W)."""
        if is_compiled_for_gpus(hidden):
            return group_norm_by_rows(hidden, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(hidden)


def group_norm(width: int) -> GroupNorm:
    """GroupNorm with 32 groups, or the largest power of two below that divides `width`."""
    groups = 32
    while width % groups:
        groups //= 2
    return GroupNorm(groups, width, eps=1e-6)


def group_norm_by_rows(
    hidden: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """GroupNorm of (batch, width, H, W) as sums along the rows of each channel, then of the groups.

    The maps are by far the largest thing that an encoder reads and writes. A group's own sum jumps
    from pixel to pixel where channels lie innermost; the sums of all channels read whole lines, and
    a compiler joins them to what comes before, the scaling to the activation that follows.
    """
    batch, width, h, w = hidden.shape
    pixels = hidden.permute(0, 2, 3, 1).float()

    def of_groups(rows: Tensor) -> Tensor:
        # (batch, H, width) → (batch, groups, 1)
        total = rows.sum(dim=1).view(batch, groups, -1).sum(dim=2, keepdim=True)
        return total / (h * w * (width // groups))

    mean = of_groups(pixels.sum(dim=2))
    variance = (of_groups(pixels.square().sum(dim=2)) - mean.square()).clamp_min(0)
    scale = torch.rsqrt(variance + eps) * weight.float().view(groups, -1)
    shift = bias.float().view(groups, -1) - mean * scale
    normalised = pixels * scale.view(batch, 1, 1, width) + shift.view(batch, 1, 1, width)
    return normalised.permute(0, 3, 1, 2).to(hidden.dtype)


def _blocks(width: int, out: int, count: int, attention: bool) -> list[nn.Module]:
    """The blocks of one resolution; the first one changes the width."""
    blocks: list[nn.Module] = []
    for place in range(count):
        blocks.append(ResidualBlock(width if place == 0 else out, out))
        if attention:
            blocks.append(SpatialAttention(out))
    return blocks


def _middle(width: int, attention: bool) -> nn.Sequential:
    blocks: list[nn.Module] = [ResidualBlock(width, width)]
    if attention:
        blocks.append(SpatialAttention(width))
    blocks.append(ResidualBlock(width, width))
    return nn.Sequential(*blocks)
