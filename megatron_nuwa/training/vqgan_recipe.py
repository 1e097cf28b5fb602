"""The recipe of a VQ-GAN training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from megatron_nuwa.config import Settings
from megatron_nuwa.models.discriminator import AdversarialLoss
from megatron_nuwa.models.vqgan import VqganConfig
from megatron_nuwa.training.vqgan_guard import VqganGuardSettings


class VqganData(Settings):
    """Which frames are seen, and how they are cropped.

    Manifests mix images and clips; a clip gives up to `frames` frames. Frames are decoded at
    `decode_size` pixels (default: the model's image size) and cropped at random to the image size.
    `cache_frames` decodes everything once into the run folder; without it, `workers` processes
    decode while training. A VQ-GAN-Seg sees the items' sketches, in which pixels of the value
    `unlabelled` (255 in many data sets) count as the last class; items without one are left out.
    """

    train: tuple[Path, ...] = Field(min_length=1)
    held_out: tuple[Path, ...] = ()
    frames: int = Field(10, ge=2)
    frames_per_second: float = Field(2.5, gt=0)
    decode_size: int | None = Field(None, ge=4)
    flip: bool = False
    cache_frames: bool = False
    workers: int = Field(4, ge=0)
    unlabelled: int | None = Field(None, ge=0)

    @property
    def loading_workers(self) -> int:
        """Processes that load frames: none where they only have to be read."""
        return 0 if self.cache_frames else self.workers


class PerceptualSettings(Settings):
    """The network of the perceptual loss.

    `weights` and `lpips_weights` are files of VGG16; with both the loss is LPIPS.
    """

    network: Literal["efficientnet_lite0", "vgg16"] = "efficientnet_lite0"
    stages: int = Field(4, ge=1, le=5)
    weights: Path | None = None
    lpips_weights: Path | None = None

    @model_validator(mode="after")
    def _check_weights(self) -> PerceptualSettings:
        if self.network == "vgg16" and self.weights is None:
            raise ValueError(
                "network 'vgg16' needs weights: the path of a torchvision vgg16 state dict"
            )
        if self.network == "efficientnet_lite0" and (self.weights or self.lpips_weights):
            raise ValueError("weights and lpips_weights belong to network 'vgg16'")
        return self


class VqganLoss(Settings):
    """Weights of the terms of the loss; a weight of 0 switches its term off.

    `reconstruction` is the distance of pictures, or `cross_entropy` (nats a pixel) where the model
    has classes. The commitment weight is the paper's β. The discriminator starts at step
    `discriminator_start`, counted from 0, with a weight that is `adversarial_weight` times the
    ratio of gradient norms (at most `adaptive_weight_limit`) or, when not `adaptive`, times 1.
    """

    reconstruction: Literal["l2", "l1", "cross_entropy"] = "l2"
    reconstruction_weight: float = Field(1.0, gt=0)
    codebook_weight: float = Field(1.0, ge=0)
    commitment_weight: float = Field(0.25, ge=0)
    perceptual_weight: float = Field(1.0, ge=0)
    perceptual: PerceptualSettings = PerceptualSettings()
    adversarial: AdversarialLoss = "log_non_saturating"
    adversarial_weight: float = Field(0.8, ge=0)
    adaptive: bool = True
    adaptive_weight_limit: float = Field(1e4, gt=0)
    discriminator_start: int = Field(50_000, ge=0)
    discriminator_channels: int = Field(64, ge=8)
    discriminator_layers: int = Field(3, ge=1, le=5)


class CodebookUpkeep(Settings):
    """How the codebook is started and kept in use.

    Until `start_step` the decoder receives unquantised vectors. Then, with `kmeans`, the codes
    become the centres of `kmeans_vectors` encoder outputs. Every `restart_every` steps (0 = never)
    codes whose share of the recent vectors lies below `restart_below` times an equal share are
    replaced by encoder outputs; `usage_decay` is the memory of "recent"; the last restart is at
    `restart_until` (null: the end of training).
    """

    start_step: int = Field(0, ge=0)
    kmeans: bool = True
    kmeans_vectors: int = Field(131_072, ge=2)
    kmeans_iterations: int = Field(10, ge=1)
    restart_every: int = Field(100, ge=0)
    restart_below: float = Field(0.05, ge=0, lt=1)
    restart_until: int | None = Field(None, ge=0)
    usage_decay: float = Field(0.99, gt=0, lt=1)


class VqganOptimizer(Settings):
    """Adam for both networks: linear warm-up, then constant or down a cosine to 0."""

    learning_rate: float = Field(1e-4, gt=0)
    discriminator_learning_rate: float | None = Field(None, gt=0)
    betas: tuple[float, float] = (0.5, 0.9)
    warmup_steps: int = Field(1000, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    gradient_clipping: float | None = Field(None, gt=0)


class VqganRecipe(Settings):
    """Everything about one VQ-GAN training; `batch_size` counts images over all processes.

    With `ema_decay` the tokenizer that is evaluated and written is the exponential moving average
    of the trained weights, with that memory a step.
    """

    run: Path
    # A VQ-GAN, or a run of one, whose weights a new run begins with.
    start: Path | None = None
    model: VqganConfig = VqganConfig()
    data: VqganData
    loss: VqganLoss = VqganLoss()
    codebook: CodebookUpkeep = CodebookUpkeep()
    optimizer: VqganOptimizer = VqganOptimizer()
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: float | None = Field(None, gt=0, lt=1)
    guard: VqganGuardSettings = VqganGuardSettings()
    log_every: int = Field(50, ge=1)
    evaluate_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    _section: str = PrivateAttr("vqgan")

    @property
    def section(self) -> str:
        """Under which name it stands in the whole recipe, for error messages."""
        return self._section

    @model_validator(mode="after")
    def _check_decode_size(self) -> VqganRecipe:
        size = self.data.decode_size
        if size is not None and size < self.model.image_size:
            raise ValueError(
                f"data.decode_size {size} must be at least model.image_size {self.model.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _fit_the_loss(self) -> VqganRecipe:
        is_for_maps = self.model.classes is not None
        if is_for_maps != (self.loss.reconstruction == "cross_entropy"):
            raise ValueError(
                "loss.reconstruction must be cross_entropy with model.classes, and l2 or l1 "
                "without it"
            )
        if is_for_maps and self.loss.perceptual_weight:
            raise ValueError(
                "loss.perceptual_weight must be 0 with model.classes: the perceptual loss knows "
                "pictures only"
            )
        if self.data.unlabelled is not None and not is_for_maps:
            raise ValueError("data.unlabelled belongs to model.classes")
        return self

    @model_validator(mode="after")
    def _keep_the_codes(self) -> VqganRecipe:
        if self.start is not None and (self.codebook.kmeans or self.codebook.start_step):
            raise ValueError(
                "start takes the codes of a trained VQ-GAN: set codebook.kmeans to false and "
                "codebook.start_step to 0, which would place them anew"
            )
        return self

    @property
    def decode_size(self) -> int:
        """Side in pixels of the decoded frames, before cropping."""
        return self.data.decode_size or self.model.image_size
