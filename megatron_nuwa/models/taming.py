"""VQ-GANs in the published layout of taming-transformers (arXiv 2012.09841), taken over exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import Field
from torch import Tensor

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.autoencoder import Downsample, ResidualBlock, SpatialAttention, Upsample
from megatron_nuwa.models.foreign_weights import read_tensors
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig

# Besides the VQ-GAN a checkpoint holds the losses' networks, averages and colours for pictures.
_PASSED_OVER = ("loss.", "model_ema.", "colorize")
_PASSED_OVER_EXACTLY = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
_PICTURE_CHANNELS = 3
_RESIDUAL = {"norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2", "conv_2": "conv2"}


class _Networks(Settings):
    """The `ddconfig` of a published configuration; what is left out has the values given here."""

    ch: int = Field(ge=32, multiple_of=32)
    ch_mult: tuple[int, ...] = Field(min_length=1)
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = Field(ge=1)
    z_channels: int = Field(ge=1)
    in_channels: int = Field(_PICTURE_CHANNELS, ge=1)
    out_ch: int = Field(_PICTURE_CHANNELS, ge=1)
    double_z: Literal[False] = False
    dropout: float = 0.0
    resamp_with_conv: Literal[True] = True
    attn_type: Literal["vanilla", "none"] = "vanilla"
    use_linear_attn: Literal[False] = False
    tanh_out: Literal[False] = False
    give_pre_end: Literal[False] = False


def load_taming(checkpoint: Path, configuration: Path, image_size: int | None = None) -> Vqgan:
    """The VQ-GAN of a published checkpoint and its YAML configuration, in eval mode.

    Tokens are the same numbers, and reconstructions the same up to rounding. `image_size` replaces
    the resolution that it was trained at. Raises `UserError` that names the file, and the field or
    tensor, where either is not what this architecture can be.
    """
    config = read_configuration(configuration, image_size)
    return converted(read_tensors(checkpoint), config, str(checkpoint))


def read_configuration(path: Path, image_size: int | None = None) -> VqganConfig:
    """The settings in a YAML configuration as published; raises `UserError` naming the field."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"configuration {path} is not valid YAML") from error
    model = tree.get("model", tree) if isinstance(tree, dict) else {}
    params = model.get("params", model) if isinstance(model, dict) else {}
    if not isinstance(params, dict) or not isinstance(params.get("ddconfig"), dict):
        raise UserError(
            f"configuration {path} has no 'ddconfig' under 'model.params': name the YAML that was "
            "published with the checkpoint"
        )
    target = str(model.get("target", ""))
    if "Gumbel" in target:
        raise UserError(
            f"configuration {path} is of {target}, whose tokens are not its nearest codes; "
            "only VQ-GANs with a codebook of vectors can be taken over"
        )
    if params.get("remap") is not None:
        raise UserError(
            f"configuration {path} renumbers the tokens (remap), which is not known here"
        )
    networks = parse_settings(_Networks, params["ddconfig"], f"configuration {path}, ddconfig")
    if networks.in_channels != networks.out_ch:
        raise UserError(
            f"configuration {path}: in_channels {networks.in_channels} and out_ch "
            f"{networks.out_ch} must be equal"
        )
    missing = next((name for name in ("n_embed", "embed_dim") if name not in params), None)
    if missing is not None:
        raise UserError(f"configuration {path} has no '{missing}' beside 'ddconfig'")
    is_for_maps = networks.in_channels != _PICTURE_CHANNELS or "Segmentation" in target
    levels = range(len(networks.ch_mult))
    has_attention = networks.attn_type == "vanilla"
    settings = {
        "image_size": image_size or networks.resolution,
        "downsampling": 2 ** (len(networks.ch_mult) - 1),
        "base_channels": networks.ch,
        "channel_multipliers": networks.ch_mult,
        "residual_blocks": networks.num_res_blocks,
        "attention": has_attention,
        "attention_factors": [
            2**level
            for level in levels
            if has_attention and networks.resolution // 2**level in networks.attn_resolutions
        ],
        "codebook_size": params["n_embed"],
        "code_dim": networks.z_channels,
        "lookup_dim": params["embed_dim"],
        "normalise_codes": False,
        "gradient": "straight_through",
        "classes": networks.in_channels if is_for_maps else None,
    }
    return parse_settings(VqganConfig, settings, f"configuration {path}")


def converted(state: Mapping[str, Tensor], config: VqganConfig, origin: str) -> Vqgan:
    """A VQ-GAN with the weights of a state dict in the published layout.

    Raises `UserError` that begins with `origin` and names a tensor that is missing, superfluous or
    of another shape than the settings ask for.
    """
    with torch.device("meta"):
        model = Vqgan(config)
    left = {
        name: value
        for name, value in state.items()
        if not name.startswith(_PASSED_OVER) and name not in _PASSED_OVER_EXACTLY
    }
    weights = {}
    for name, parameter in model.state_dict().items():
        parts = [_taken(left, source, origin) for source in _sources(model, name)]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if value.numel() == parameter.numel() and value.shape[:2] == parameter.shape[:2]:
            # A convolution of one pixel is the projection that it is here.
            value = value.reshape(parameter.shape)
        if value.shape != parameter.shape:
            raise UserError(
                f"{origin}: {' + '.join(_sources(model, name))} has shape {tuple(value.shape)}, "
                f"but the configuration asks for {tuple(parameter.shape)}"
            )
        weights[name] = value.float().clone()
    if left:
        raise UserError(
            f"{origin} holds '{min(left)}', which the configuration does not describe; name the "
            "YAML that was published with it"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def _taken(left: dict[str, Tensor], name: str, origin: str) -> Tensor:
    try:
        return left.pop(name)
    except KeyError:
        raise UserError(
            f"{origin} has no '{name}', which the configuration describes; name the YAML that was "
            "published with it"
        ) from None


def _sources(model: Vqgan, name: str) -> list[str]:
    """The published names of the tensors that make up one of ours."""
    prefix, _, kind = name.rpartition(".")
    whole = {
        "quantizer.table": "quantize.embedding.weight",
        "quantizer.project_in": "quant_conv",
        "quantizer.project_out": "post_quant_conv",
    }
    if name in whole:
        return [whole[name]]
    if prefix in whole:
        return [f"{whole[prefix]}.{kind}"]
    half, part, *place = prefix.split(".")
    if part in ("conv_in", "norm_out", "conv_out"):
        return [f"{half}.{part}.{kind}"]
    blocks = _middle_blocks(model) if part == "middle" else _level_blocks(model, half)
    block = f"{half}.{blocks[int(place[0])]}"
    inner = place[1]
    if inner == "query_key_value":
        return [f"{block}.{letter}.{kind}" for letter in "qkv"]
    # The names of a residual block, of an attention, and of what changes the resolution.
    names = {**_RESIDUAL, "skip": "nin_shortcut", "norm": "norm", "out": "proj_out", "conv": "conv"}
    return [f"{block}.{names[inner]}.{kind}"]


def _middle_blocks(model: Vqgan) -> list[str]:
    attention = ["mid.attn_1"] if model.config.attention else []
    return ["mid.block_1", *attention, "mid.block_2"]


def _level_blocks(model: Vqgan, half: str) -> list[str]:
    """The published name of each module in a half's levels, in their order."""
    return list(_encoder_blocks(model) if half == "encoder" else _decoder_blocks(model))


def _encoder_blocks(model: Vqgan) -> Iterator[str]:
    level, block = 0, -1
    for module in model.encoder.levels:
        if isinstance(module, ResidualBlock):
            block += 1
            yield f"down.{level}.block.{block}"
        elif isinstance(module, SpatialAttention):
            yield f"down.{level}.attn.{block}"
        else:
            assert isinstance(module, Downsample)
            yield f"down.{level}.downsample"
            level, block = level + 1, -1


def _decoder_blocks(model: Vqgan) -> Iterator[str]:
    level, block = len(model.config.level_channels) - 1, -1
    for module in model.decoder.levels:
        if isinstance(module, ResidualBlock):
            block += 1
            yield f"up.{level}.block.{block}"
        elif isinstance(module, SpatialAttention):
            yield f"up.{level}.attn.{block}"
        else:
            assert isinstance(module, Upsample)
            # Counted there to the resolution that it leaves, here to the one that it enters.
            yield f"up.{level}.upsample"
            level, block = level - 1, -1
