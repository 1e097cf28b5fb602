"""NÜWA's encoder–decoder over token grids (paper section 3.3), as a plain module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from megatron_nuwa.config import Settings
from megatron_nuwa.grid import Extent, ExtentReading, Grid
from megatron_nuwa.models.attention import AttentionKind, Pattern, pattern_of
from megatron_nuwa.models.cross_entropy import CrossEntropy
from megatron_nuwa.models.initialisation import assign, initialise
from megatron_nuwa.models.layers import CrossAttention, DecoderLayer, EncoderLayer, NormPosition
from megatron_nuwa.ops.tables import Geometry

Widths = tuple[int | None, int | None, int | None]
ContextKind = Literal["text", "visual", "sketch"]
_READ_IN_TRAINING: tuple[ContextKind, ...] = ("text", "sketch")
# Fields that came later: runs of models without sketches began before there were any.
_SKETCH_FIELDS = {"sketch_codebook_size", "sketch_code_dim"}


class NuwaConfig(Settings):
    """Shape of the transformer; the defaults are the paper's 870 M."""

    width: int = Field(1280, ge=1)
    heads: int = Field(20, ge=1)
    encoder_layers: int = Field(12, ge=1)
    decoder_layers: int = Field(24, ge=1)
    feed_forward_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    codebook_size: int = Field(12_288, ge=2, le=65_536)
    code_dim: int = Field(256, ge=1)
    # The codes of VQ-GAN-Seg; null for a model that knows no sketches and has no weights for them.
    sketch_codebook_size: int | None = Field(None, ge=2, le=65_536)
    sketch_code_dim: int = Field(256, ge=1)
    # "codebook": codes of the VQ-GAN, projected to the width; "direct": a table of that width.
    # This and `train_codebook` hold for pictures and sketches alike.
    visual_embedding: Literal["codebook", "direct"] = "codebook"
    train_codebook: bool = True
    tie_head: bool = False
    text_vocabulary: int = Field(49_408, ge=2, le=65_536)
    text_tokens: int = Field(77, ge=1)
    # The largest grid that has positions.
    position_grid: tuple[int, int, int] = (21, 21, 10)

    text_extent: Widths = (1, 1, None)
    image_extent: Widths = (3, 3, 1)
    video_extent: Widths = (3, 3, 3)
    extent_reading: ExtentReading = "width"

    # Standard deviation of the starting weights. GPT-2's 0.02 suits widths of about a thousand; a
    # narrow model finds what attention should look at much sooner from about 0.7 / √width.
    initial_deviation: float = Field(0.02, gt=0)

    norm: NormPosition = "pre"
    cross_attention: CrossAttention = "parallel"
    # The paper's ablation; the decoder's is its self-attention's.
    encoder_attention: AttentionKind = "nearby"
    decoder_attention: AttentionKind = "nearby"
    # Blocks of block-sparse attention; null for the square root of the number of tokens.
    sparse_blocks: int | None = Field(None, ge=1)

    @field_validator("position_grid")
    @classmethod
    def _grid_is_valid(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        h, w, s = Grid.of(value, "position_grid")
        return h, w, s

    @model_validator(mode="after")
    def _fits_together(self) -> NuwaConfig:
        if self.width % self.heads:
            raise ValueError(
                f"model.width {self.width} is not a multiple of model.heads {self.heads}"
            )
        for name in ("text_extent", "image_extent", "video_extent"):
            Extent.from_reading(getattr(self, name), self.extent_reading)
        return self

    def description(self) -> dict[str, Any]:
        """The settings as plain values, the same ones for the same model in later versions, too."""
        left_out = set(_SKETCH_FIELDS) if self.sketch_codebook_size is None else set()
        # A trained model no longer depends on how it began.
        return self.model_dump(mode="json", exclude={*left_out, "initial_deviation"})

    @property
    def encoder_pattern(self) -> Pattern:
        """Who sees whom in the encoder."""
        return pattern_of(self.encoder_attention, self.sparse_blocks)

    @property
    def decoder_pattern(self) -> Pattern:
        """Who sees whom in the decoder's self-attention."""
        return pattern_of(self.decoder_attention, self.sparse_blocks)

    @property
    def text_grid(self) -> Grid:
        """The grid of a text: a line along the third axis."""
        return Grid(1, 1, self.text_tokens)

    def visual_extent(self, grid: Grid) -> Extent:
        """Window of an image (one frame) or a clip."""
        widths = self.image_extent if grid.s == 1 else self.video_extent
        return Extent.from_reading(widths, self.extent_reading)

    def context_extent(self, kind: ContextKind, grid: Grid) -> Extent:
        """Window of a context; sketches have that of what they are sketches of."""
        if kind == "text":
            return Extent.from_reading(self.text_extent, self.extent_reading)
        return self.visual_extent(grid)


@dataclass(frozen=True)
class Context:
    """What the encoder reads.

    `tokens` int64 (batch, grid cells): words, codes of the VQ-GAN, or codes of VQ-GAN-Seg; `mask`
    bool of the same shape, False = padding.
    """

    kind: ContextKind
    tokens: Tensor
    grid: Grid
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Context:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, tokens=self.tokens.to(device), mask=mask)


class PositionEmbedding(nn.Module):
    """Learned positions along each axis, added: `P_h[i] + P_w[j] + P_s[k]` (paper Eq. 9)."""

    def __init__(self, largest: Grid, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(largest.h, width))
        self.columns = nn.Parameter(torch.empty(largest.w, width))
        self.frames = nn.Parameter(torch.empty(largest.s, width))

    def forward(self, grid: Grid) -> Tensor:
        """(grid cells, width) in generation order; `ValueError` for a grid without positions."""
        tables = (self.rows, self.columns, self.frames)
        largest = tuple(len(table) for table in tables)
        if any(side > most for side, most in zip(grid, largest, strict=True)):
            raise ValueError(f"grid {tuple(grid)} is larger than the model's positions {largest}")
        rows, columns, frames = (table[:side] for table, side in zip(tables, grid, strict=True))
        total = frames[:, None, None] + rows[None, :, None] + columns[None, None, :]
        return total.flatten(0, 2)


class VisualEmbedding(nn.Module):
    """Vectors of a VQ-GAN's tokens: its codebook and a projection, or a plain table."""

    def __init__(self, config: NuwaConfig, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        projected = config.visual_embedding == "codebook"
        self.codes = nn.Embedding(codebook_size, code_dim if projected else config.width)
        self.projection = (
            nn.Linear(code_dim, config.width, bias=False) if projected else nn.Identity()
        )
        self.codes.weight.requires_grad_(config.train_codebook)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (batch, cells) → (batch, cells, width)."""
        return self.projection(self.codes(tokens))

    def logits(self, x: Tensor) -> Tensor:
        """Products of (…, width) with the vectors of all codes: the output head when it is tied."""
        return F.linear(x, self.projection(self.codes.weight))


class Begin(nn.Module):
    """The learned `<bos>` that stands before the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))

    def forward(self, following: Tensor) -> Tensor:
        """(batch, n, width) → (batch, n + 1, width)."""
        first = self.vector.to(following.dtype).expand(following.shape[0], 1, -1)
        return torch.cat([first, following], dim=1)


class Nuwa(nn.Module):
    """Encoder over a text, a visual or a sketch's grid, causal decoder over a visual grid.

    It knows nothing of processes: `parallel/` swaps layers of its own for `embedding_output`
    (where tokens would be spread), the layers, the tables, the head and `cross_entropy`.
    """

    def __init__(self, config: NuwaConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.width, int(config.width * config.feed_forward_ratio)
        largest = Grid(*config.position_grid)
        self.text_embedding = nn.Embedding(config.text_vocabulary, width)
        self.text_positions = PositionEmbedding(config.text_grid, width)
        self.visual_embedding = VisualEmbedding(config, config.codebook_size, config.code_dim)
        self.sketch_embedding = (
            None
            if config.sketch_codebook_size is None
            else VisualEmbedding(config, config.sketch_codebook_size, config.sketch_code_dim)
        )
        self.context_positions = PositionEmbedding(largest, width)
        self.target_positions = PositionEmbedding(largest, width)
        self.begin = Begin(width)
        self.embedding_output = nn.Identity()
        self.encoder = nn.ModuleList(
            EncoderLayer(
                width, config.heads, inner, config.dropout, config.norm, config.encoder_pattern
            )
            for _ in range(config.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(
                width,
                config.heads,
                inner,
                config.dropout,
                config.norm,
                config.cross_attention,
                config.decoder_pattern,
            )
            for _ in range(config.decoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder_norm = nn.LayerNorm(width)
        self.head = None if config.tie_head else nn.Linear(width, config.codebook_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.initialise(int(torch.randint(1 << 62, (), device="cpu")))

    def forward(self, context: Context, target: Tensor, grid: Grid) -> Tensor:
        """Logits (batch, grid cells, codebook size) of every target token given those before it.

        `target` is int64 (batch, grid cells) in generation order.
        """
        encoded = self.encode(context)
        x = self.embed_target(target, grid)
        geometry, cross_geometry = self.decoder_geometries(grid, context)
        for layer in self.decoder:
            x = layer(x, encoded, geometry, cross_geometry, context.mask)
        return self.predict(x)

    def loss(self, context: Context, target: Tensor, grid: Grid) -> Tensor:
        """Mean cross-entropy of the target's tokens, in nats a token, fp32 (paper Eq. 12)."""
        return self.cross_entropy(self(context, target, grid), target)

    def encode(self, context: Context) -> Tensor:
        """The context's vectors `C^(L)`, (batch, context cells, width)."""
        x = self.embed_context(context)
        geometry = self.encoder_geometry(context)
        for layer in self.encoder:
            x = layer(x, geometry, context.mask)
        return self.encoder_norm(x)

    def embed_context(self, context: Context) -> Tensor:
        """Encoder input (batch, context cells, width); `ValueError` for an unknown kind of it."""
        x = self._vectors(context)
        if self.sketch_embedding is not None and torch.is_grad_enabled():
            # Every weight must get a gradient in every micro-batch: to that of one that has none in
            # a step's first, DeepSpeed's ZeRO 3 (0.19.8) adds the step before's, and where one has
            # none in the last, its offloading takes the step before's.
            token = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
            for kind in _READ_IN_TRAINING:
                if kind != context.kind:
                    x = x + 0 * self._vectors(Context(kind, token, Grid(1, 1, 1)))
        return self.embedding_output(x)

    def embed_target(self, target: Tensor, grid: Grid) -> Tensor:
        """Decoder input (batch, cells, width): `<bos>` first, then each cell's previous token."""
        vectors = self.begin(self.visual_embedding(target[:, :-1]))
        return self.embedding_output(vectors + self.target_positions(grid))

    def predict(self, x: Tensor) -> Tensor:
        """Decoder output (…, width) → logits (…, codebook size)."""
        x = self.decoder_norm(x)
        return self.visual_embedding.logits(x) if self.head is None else self.head(x)

    def encoder_geometry(self, context: Context) -> Geometry:
        """Who sees whom in the encoder."""
        extent = self.config.context_extent(context.kind, context.grid)
        return Geometry(context.grid, context.grid, extent, False)

    def decoder_geometries(self, grid: Grid, context: Context) -> tuple[Geometry, Geometry]:
        """Who sees whom in the decoder's self-attention and in its cross-attention."""
        own = Geometry(grid, grid, self.config.visual_extent(grid), True)
        extent = self.config.context_extent(context.kind, context.grid)
        return own, Geometry(grid, context.grid, extent, False)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the transformer with its visual embedding, text table, head, and total.

        A model that reads sketches counts their embedding apart, as `sketch_embedding`. Of a model
        that is whole; a split one counts what lies here.
        """
        total = sum(p.numel() for p in self.parameters())
        parts = {
            "text_table": self.text_embedding.weight.numel(),
            "head": 0 if self.head is None else self.head.weight.numel(),
        }
        if self.sketch_embedding is not None:
            parts["sketch_embedding"] = sum(p.numel() for p in self.sketch_embedding.parameters())
        return {"transformer": total - sum(parts.values()), **parts, "total": total}

    def initialise(self, seed: int) -> None:
        """Draw every weight that is not on the meta device anew."""
        branches = 2 * max(len(self.encoder), len(self.decoder))
        initialise(self.named_parameters(), seed, branches, self.config.initial_deviation)

    def use_codebook(self, codebook: Tensor) -> None:
        """Start the visual embedding from a VQ-GAN's codes, (codebook size, code dim)."""
        expected = (self.config.codebook_size, self.config.code_dim)
        _check_codebook(codebook, expected, "codebook")
        assign(self.visual_embedding.codes.weight, codebook)

    def use_sketch_codebook(self, codebook: Tensor) -> None:
        """Start the sketch embedding from VQ-GAN-Seg's codes, (codebook size, code dim)."""
        size = self.config.sketch_codebook_size
        if self.sketch_embedding is None or size is None:
            raise ValueError("the model reads no sketches: model.sketch_codebook_size is null")
        _check_codebook(codebook, (size, self.config.sketch_code_dim), "sketch codebook")
        assign(self.sketch_embedding.codes.weight, codebook)

    def _vectors(self, context: Context) -> Tensor:
        if context.kind == "text":
            return self.text_embedding(context.tokens) + self.text_positions(context.grid)
        table = self.visual_embedding if context.kind == "visual" else self.sketch_embedding
        if table is None:
            raise ValueError("the model reads no sketches: model.sketch_codebook_size is null")
        vectors: Tensor = table(context.tokens)
        return vectors + self.context_positions(context.grid)


def _check_codebook(codebook: Tensor, expected: tuple[int, int], name: str) -> None:
    if tuple(codebook.shape) != expected:
        raise ValueError(f"{name} must be {expected} for this model, not {tuple(codebook.shape)}")
