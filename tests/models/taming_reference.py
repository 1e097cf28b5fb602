"""The VQ-GAN of taming-transformers as its paper and its published names describe it.

Written for the tests alone, with nothing of this repository's networks: functions over a state
dict in the published layout, whose tensors `random_state` draws.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


class Published(NamedTuple):
    """A published configuration's numbers."""

    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256
    z_channels: int = 48
    embed_dim: int = 40
    n_embed: int = 1024
    channels: int = 3

    def tree(self) -> dict[str, Any]:
        """As in the YAML that is published with a checkpoint."""
        own = ("n_embed", "embed_dim", "channels")
        networks = {name: value for name, value in self._asdict().items() if name not in own}
        networks = {name: list(v) if isinstance(v, tuple) else v for name, v in networks.items()}
        networks |= {"in_channels": self.channels, "out_ch": self.channels}
        networks |= {"double_z": False, "dropout": 0.0}
        loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
        params = {"embed_dim": self.embed_dim, "n_embed": self.n_embed, "ddconfig": networks}
        target = "taming.models.vqgan.VQModel"
        return {"model": {"target": target, "params": {**params, "lossconfig": loss}}}


def random_state(net: Published, seed: int = 0) -> State:
    """Weights of every tensor of the published layout, and some of the losses' networks."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
        scale = 1 / math.sqrt(inputs * side**2)
        shape = (outputs, inputs, side, side)
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        convolution(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        convolution(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            convolution(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.{part}", width, width, 1)

    def middle(half: str, width: int) -> None:
        residual(f"{half}.mid.block_1", width, width)
        attention(f"{half}.mid.attn_1", width)
        residual(f"{half}.mid.block_2", width, width)

    last = len(net.ch_mult) - 1
    convolution("encoder.conv_in", net.channels, net.ch, 3)
    width, side = net.ch, net.resolution
    for level, multiplier in enumerate(net.ch_mult):
        for block in range(net.num_res_blocks):
            residual(f"encoder.down.{level}.block.{block}", width, net.ch * multiplier)
            width = net.ch * multiplier
            if side in net.attn_resolutions:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < last:
            convolution(f"encoder.down.{level}.downsample.conv", width, width, 3)
            side //= 2
    middle("encoder", width)
    norm("encoder.norm_out", width)
    convolution("encoder.conv_out", width, net.z_channels, 3)
    convolution("quant_conv", net.z_channels, net.embed_dim, 1)
    codes = torch.randn(net.n_embed, net.embed_dim, generator=generator)
    state["quantize.embedding.weight"] = codes
    convolution("post_quant_conv", net.embed_dim, net.z_channels, 1)
    convolution("decoder.conv_in", net.z_channels, width, 3)
    middle("decoder", width)
    for level in range(last, -1, -1):
        for block in range(net.num_res_blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", width, net.ch * net.ch_mult[level])
            width = net.ch * net.ch_mult[level]
            if side in net.attn_resolutions:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level > 0:
            convolution(f"decoder.up.{level}.upsample.conv", width, width, 3)
            side *= 2
    norm("decoder.norm_out", width)
    convolution("decoder.conv_out", width, net.channels, 3)
    # Within the range of pictures, for the most part.
    state["decoder.conv_out.weight"] *= 0.3
    for name in ("loss.perceptual_loss.lin0.model.1.weight", "loss.discriminator.main.0.weight"):
        state[name] = torch.randn(1, 4, 1, 1, generator=generator)
    return state


def tokens_of(state: State, net: Published, images: Tensor) -> Tensor:
    """Indices (batch, h, w) of the codes nearest to the encoder's vectors."""
    vectors = _convolved(state, "quant_conv", _encoded(state, net, images))
    codes = state["quantize.embedding.weight"]
    batch, width, h, w = vectors.shape
    rows = vectors.permute(0, 2, 3, 1).reshape(-1, 1, width)
    # Pair by pair, as the distance is defined.
    found = [(row - codes).square().sum(-1).argmin() for row in rows]
    return torch.stack(found).view(batch, h, w)


def images_of(state: State, net: Published, tokens: Tensor) -> Tensor:
    """The decoder's output for the codes of tokens (batch, h, w), not clamped."""
    codes = state["quantize.embedding.weight"][tokens].permute(0, 3, 1, 2)
    hidden = _convolved(state, "post_quant_conv", codes)
    hidden = _convolved(state, "decoder.conv_in", hidden)
    hidden = _middle(state, "decoder", hidden)
    for level in range(len(net.ch_mult) - 1, -1, -1):
        for block in range(net.num_res_blocks + 1):
            hidden = _residual(state, f"decoder.up.{level}.block.{block}", hidden)
            hidden = _attention(state, f"decoder.up.{level}.attn.{block}", hidden)
        if level > 0:
            hidden = hidden.repeat_interleave(2, 2).repeat_interleave(2, 3)
            hidden = _convolved(state, f"decoder.up.{level}.upsample.conv", hidden)
    hidden = _activated(_normed(state, "decoder.norm_out", hidden))
    return _convolved(state, "decoder.conv_out", hidden)


def _encoded(state: State, net: Published, images: Tensor) -> Tensor:
    hidden = _convolved(state, "encoder.conv_in", images)
    for level in range(len(net.ch_mult)):
        for block in range(net.num_res_blocks):
            hidden = _residual(state, f"encoder.down.{level}.block.{block}", hidden)
            hidden = _attention(state, f"encoder.down.{level}.attn.{block}", hidden)
        if level < len(net.ch_mult) - 1:
            name = f"encoder.down.{level}.downsample.conv"
            # Zeros at the right and the bottom only.
            padded = torch.zeros(*hidden.shape[:2], hidden.shape[2] + 1, hidden.shape[3] + 1)
            padded = padded.to(hidden)
            padded[:, :, :-1, :-1] = hidden
            hidden = F.conv2d(padded, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
    hidden = _middle(state, "encoder", hidden)
    hidden = _activated(_normed(state, "encoder.norm_out", hidden))
    return _convolved(state, "encoder.conv_out", hidden)


def _middle(state: State, half: str, hidden: Tensor) -> Tensor:
    hidden = _residual(state, f"{half}.mid.block_1", hidden)
    hidden = _attention(state, f"{half}.mid.attn_1", hidden)
    return _residual(state, f"{half}.mid.block_2", hidden)


def _residual(state: State, name: str, hidden: Tensor) -> Tensor:
    change = _convolved(state, f"{name}.conv1", _activated(_normed(state, f"{name}.norm1", hidden)))
    change = _convolved(state, f"{name}.conv2", _activated(_normed(state, f"{name}.norm2", change)))
    if f"{name}.nin_shortcut.weight" in state:
        hidden = _convolved(state, f"{name}.nin_shortcut", hidden)
    return hidden + change


def _attention(state: State, name: str, hidden: Tensor) -> Tensor:
    """Where there is none of that name, nothing happens."""
    if f"{name}.q.weight" not in state:
        return hidden
    normed = _normed(state, f"{name}.norm", hidden)
    query, key, value = (_convolved(state, f"{name}.{p}", normed).flatten(2) for p in "qkv")
    weights = torch.einsum("bci,bcj->bij", query, key) / math.sqrt(hidden.shape[1])
    mixed = torch.einsum("bij,bcj->bci", weights.softmax(-1), value).view(hidden.shape)
    return hidden + _convolved(state, f"{name}.proj_out", mixed)


def _convolved(state: State, name: str, hidden: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(hidden, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _normed(state: State, name: str, hidden: Tensor) -> Tensor:
    groups = hidden.unflatten(1, (32, -1))
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = groups.var(dim=(2, 3, 4), keepdim=True, unbiased=False)
    normed = ((groups - mean) / torch.sqrt(variance + 1e-6)).flatten(1, 2)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return normed * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _activated(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(hidden)
