"""The visual tokenizer: a convolutional autoencoder around a codebook (VQ-GAN)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import why_unreadable
from megatron_nuwa.models.autoencoder import Decoder, Encoder, Shape
from megatron_nuwa.models.quantizer import GradientEstimator, VectorQuantizer
from megatron_nuwa.models.weights_file import write_weights

_FORMAT = "megatron_nuwa.vqgan/1"
# Fields that came later: left out of a description at their defaults, so that the fingerprints of
# tokenizers that know nothing of them stay what corpora were made with.
_LATER_FIELDS = ("classes", "attention_factors")
_DEFAULT_MULTIPLIERS = {4: (1, 2, 4), 8: (1, 2, 2, 4), 16: (1, 1, 2, 2, 4)}


class VqganConfig(Settings):
    """Sizes of a VQ-GAN; the defaults are the paper's 336² → 21×21 with 12,288 codes of 256.

    The paper's literal codebook is `lookup_dim: null`, `normalise_codes: false` and
    `gradient: straight_through`; the defaults here keep a large codebook in use. With `classes` it
    is VQ-GAN-Seg, for maps of that many classes instead of pictures. `attention_factors` names
    resolutions, by how far they are downsampled, whose residual blocks are each followed by
    self-attention; `attention` is the one at the lowest resolution between encoder and codebook.
    """

    image_size: int = Field(336, ge=4)
    downsampling: Literal[4, 8, 16] = 16
    base_channels: int = Field(128, ge=8)
    channel_multipliers: tuple[int, ...] = ()
    residual_blocks: int = Field(2, ge=1)
    attention: bool = True
    patch_size: Literal[1, 2, 4] = 1
    codebook_size: int = Field(12288, ge=2, le=65536)
    code_dim: int = Field(256, ge=1)
    lookup_dim: int | None = Field(8, ge=1)
    normalise_codes: bool = True
    gradient: GradientEstimator = "rotation"
    classes: int | None = Field(None, ge=2, le=256)
    attention_factors: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check_sizes(self) -> VqganConfig:
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of downsampling "
                f"{self.downsampling}"
            )
        levels = (self.downsampling // self.patch_size).bit_length()
        if self.channel_multipliers and len(self.channel_multipliers) != levels:
            raise ValueError(
                f"channel_multipliers must have {levels} numbers for downsampling "
                f"{self.downsampling} and patch_size {self.patch_size}, not "
                f"{len(self.channel_multipliers)}"
            )
        if any(multiplier < 1 for multiplier in self.channel_multipliers):
            raise ValueError("channel_multipliers must be at least 1")
        known = self._level_factors
        for factor in self.attention_factors:
            if factor not in known:
                raise ValueError(
                    f"attention_factors must be among {', '.join(map(str, known))}, not {factor}"
                )
        return self

    @property
    def _level_factors(self) -> tuple[int, ...]:
        levels = (self.downsampling // self.patch_size).bit_length()
        return tuple(self.patch_size << level for level in range(levels))

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels at each resolution, the highest resolution first."""
        levels = (self.downsampling // self.patch_size).bit_length()
        multipliers = self.channel_multipliers or _DEFAULT_MULTIPLIERS[self.downsampling][-levels:]
        return tuple(self.base_channels * multiplier for multiplier in multipliers)

    @property
    def grid_side(self) -> int:
        """Rows and columns of the token grid."""
        return self.image_size // self.downsampling

    @property
    def image_channels(self) -> int:
        """Channels of what is encoded: three colours, or one a class."""
        return self.classes or 3

    @property
    def shape(self) -> Shape:
        """The sizes of encoder and decoder."""
        return Shape(
            image_channels=self.image_channels,
            channels=self.level_channels,
            attention=[factor in self.attention_factors for factor in self._level_factors],
            residual_blocks=self.residual_blocks,
            code_dim=self.code_dim,
            middle_attention=self.attention,
            patch_size=self.patch_size,
        )

    def description(self) -> str:
        """The settings as JSON, the same text for the same network in later versions, too."""
        fields = type(self).model_fields
        unused = {name for name in _LATER_FIELDS if getattr(self, name) == fields[name].default}
        return self.model_dump_json(exclude=unused)


class VqganOutput(NamedTuple):
    """What a training pass yields."""

    reconstruction: Tensor  # (batch, 3, H, W), not clamped, or class logits (batch, classes, H, W)
    tokens: Tensor  # (batch, h, w) int64
    codebook_loss: Tensor
    commitment_loss: Tensor
    vectors: Tensor  # (batch·h·w, lookup_dim), detached


class Vqgan(nn.Module):
    """Encoder, codebook and decoder: images (batch, 3, H, W) in [-1, 1] ↔ tokens (batch, h, w).

    With `config.classes` it encodes one-hot maps (batch, classes, H, W) and decodes class logits of
    that shape (VQ-GAN-Seg); `models/segmentation.py` has both ways between these and maps.
    """

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.shape)
        self.quantizer = VectorQuantizer(
            config.codebook_size,
            config.code_dim,
            lookup_dim=config.lookup_dim,
            normalise_codes=config.normalise_codes,
            gradient=config.gradient,
        )
        self.decoder = Decoder(config.shape)

    @property
    def grid_side(self) -> int:
        """Rows and columns of the token grid of an image of the configured size."""
        return self.config.grid_side

    def codebook(self) -> Tensor:
        """The vectors that the decoder receives: (codebook_size, code_dim)."""
        return self.quantizer.codebook()

    def forward(self, images: Tensor, quantise: bool = True) -> VqganOutput:
        """Reconstruct images or one-hot maps, with the codebook's losses."""
        found = self.quantizer(self.encoder(self._checked(images)), quantise)
        return VqganOutput(
            self.decoder(found.codes),
            found.tokens,
            found.codebook_loss,
            found.commitment_loss,
            found.vectors,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (batch, h, w) int64 of images (batch, 3, H, W) in [-1, 1] or of one-hot maps.

        Raises `ValueError` when `images` has another shape or sides that `downsampling` does not
        divide.
        """
        return self.quantizer.tokens_of(self.encoder(self._checked(images)))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (batch, 3, H, W) in [-1, 1], or class logits, of tokens (batch, h, w).

        Raises `ValueError` when `tokens` has another shape or values outside the codebook.
        """
        if tokens.ndim != 3:
            raise ValueError(f"tokens must have shape (batch, h, w), not {tuple(tokens.shape)}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < (
            self.config.codebook_size
        ):
            raise ValueError(
                f"tokens must lie in 0 … {self.config.codebook_size - 1}, not "
                f"{int(tokens.min())} … {int(tokens.max())}"
            )
        decoded: Tensor = self.decoder(self.quantizer.codes_of(tokens.long()))
        return decoded if self.config.classes else decoded.clamp(-1, 1)

    def _checked(self, images: Tensor) -> Tensor:
        factor, channels = self.config.downsampling, self.config.image_channels
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor:
            kind = "one-hot maps" if self.config.classes else "images"
            raise ValueError(
                f"{kind} must have shape (batch, {channels}, H, W) with H and W multiples of "
                f"{factor}, not {shape}"
            )
        return images


def save_vqgan(model: Vqgan, path: Path) -> None:
    """Write weights and settings to one safetensors file, which appears whole or not at all.

    Raises `OSError` where it cannot be written.
    """
    tensors, metadata = file_content(model)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_weights(Path(path), tensors, metadata)


def file_content(model: Vqgan) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `load_vqgan` reads."""
    tensors = {name: tensor.detach() for name, tensor in _tensors(model)}
    return tensors, {"format": _FORMAT, "config": model.config.description()}


def load_vqgan(path: str | Path) -> Vqgan:
    """The VQ-GAN of a safetensors file or of a VQ-GAN run folder, on the CPU, in eval mode.

    Raises `UserError` when the file is missing or was not written by `save_vqgan`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "vqgan.safetensors"
    if not path.is_file():
        raise UserError(
            f"VQ-GAN {path} does not exist; train one with launch/train_vqgan.py or name another"
        )
    if (reason := why_unreadable(path)) is not None:
        raise UserError(f"VQ-GAN {path} cannot be read: {reason}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"VQ-GAN {path} is not a readable safetensors file") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} was not written by launch/train_vqgan.py (its format is "
            f"{metadata.get('format', 'unknown')!r}, not {_FORMAT!r})"
        )
    try:
        tree = json.loads(metadata["config"])
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"VQ-GAN {path} carries no readable settings") from error
    with torch.device("meta"):
        model = Vqgan(parse_settings(VqganConfig, tree, f"VQ-GAN {path}"))
    try:
        model.load_state_dict(load_file(path), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"VQ-GAN {path} holds other weights than its settings describe") from error
    return model.eval()


def is_vqgan_file(path: Path) -> bool:
    """Whether a file was written by `save_vqgan`."""
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def fingerprint(model: Vqgan) -> str:
    """SHA-256 (hex) over the settings and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(model.config.description().encode())
    for name, tensor in _tensors(model):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: Vqgan) -> list[tuple[str, Tensor]]:
    return sorted(model.state_dict().items())
