"""A trained run, opened for generation: model, tokenizers and grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.data.text import NO_CAPTION, TextTokenizer, text_mask
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.sampling import (
    OnFrame,
    OnToken,
    SamplingSettings,
    generate_tokens,
)
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.training.trained_model import open_trained

_DEFAULT_FRAMES_PER_SECOND = 2.5


@dataclass(frozen=True)
class CheckpointFacts:
    """Which weights a picture is from: where they lay, their last step, their file's sha256."""

    path: Path
    step: int
    sha256: str


@dataclass(frozen=True)
class Generator:
    """Everything that turns a prompt into pixels."""

    model: Nuwa
    vqgan: Vqgan
    bpe: TextTokenizer
    image_grid: Grid
    clip_grid: Grid
    frames_per_second: float
    # None for a model that reads no sketches.
    sketch_vqgan: Vqgan | None = None
    # None for a model in training.
    checkpoint: CheckpointFacts | None = None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Rows and columns of pixels of what it writes."""
        factor = self.vqgan.config.downsampling
        return self.image_grid.h * factor, self.image_grid.w * factor

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.begin.vector.device

    def text_context(self, prompts: Sequence[str]) -> Context:
        """The encoder's input for prompts; `UserError` for one that is empty or too long."""
        ids = np.stack([self.bpe.encode(prompt) for prompt in prompts]).astype(np.int64)
        mask = torch.from_numpy(text_mask(ids))
        tokens = torch.from_numpy(ids)
        return Context("text", tokens.to(self.device), TEXT_GRID, mask.to(self.device))

    def sketch_context(self, maps: np.ndarray) -> Context:
        """The encoder's input for sketches, class numbers (batch, frames, rows, columns).

        Raises `UserError` for another size than the sketch tokenizer's and for unknown classes.
        """
        assert self.sketch_vqgan is not None
        config = self.sketch_vqgan.config
        assert config.classes is not None
        side = config.image_size
        if maps.shape[2:] != (side, side):
            raise UserError(
                f"the sketch is {maps.shape[3]} × {maps.shape[2]} pixels, and the model's sketches "
                f"are {side} × {side}"
            )
        if not 0 <= int(maps.min()) <= int(maps.max()) < config.classes:
            raise UserError(
                f"the sketch has class {int(maps.max())}, and the model knows the classes 0 to "
                f"{config.classes - 1}"
            )
        flat = torch.from_numpy(maps.reshape(-1, side, side).astype(np.int64)).to(self.device)
        with torch.no_grad():
            tokens = self.sketch_vqgan.encode(one_hot(flat, config.classes))
        grid = Grid(config.grid_side, config.grid_side, maps.shape[1])
        return Context("sketch", tokens.view(len(maps), grid.cells), grid)

    def generate(
        self,
        prompts: Sequence[str],
        grid: Grid,
        seeds: Sequence[int],
        settings: SamplingSettings,
        *,
        known: Tensor | None = None,
        is_known: Tensor | None = None,
        on_token: OnToken | None = None,
        on_frame: OnFrame | None = None,
    ) -> Tensor:
        """Tokens int64 (batch, grid cells) for prompts; see `generate_tokens`."""
        return generate_tokens(
            self.model,
            self.text_context(prompts),
            self.text_context([NO_CAPTION] * len(prompts)),
            grid,
            seeds,
            settings,
            known=known,
            is_known=is_known,
            on_token=on_token,
            on_frame=on_frame,
        )

    def encode_frames(self, frames: np.ndarray) -> Tensor:
        """uint8 (frames, rows, columns, 3) → tokens int64 (frames · h · w) in generation order."""
        pixels = torch.tensor(frames, device=self.device).float() / 127.5 - 1
        with torch.no_grad():
            return self.vqgan.encode(pixels.permute(0, 3, 1, 2)).flatten()

    def pixels(self, tokens: Tensor, grid: Grid) -> np.ndarray:
        """Tokens (batch, grid cells) → uint8 (batch, frames, rows, columns, 3)."""
        frames = tokens.view(-1, grid.h, grid.w)
        with torch.no_grad():
            images = self.vqgan.decode(frames)
        bytes_ = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return bytes_.permute(0, 2, 3, 1).unflatten(0, (-1, grid.s)).cpu().numpy()


def open_generator(path: Path, field: str, device: torch.device | None = None) -> Generator:
    """Open a pretraining run's newest whole checkpoint, one of its checkpoints or an exported file.

    The model computes in fp32; on a GPU in bf16, where its weights are. Raises `UserError` that
    names `field`, the argument that `path` comes from, or what is missing.
    """
    trained = open_trained(path, field, full_precision=False)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.nuwa()
    # A GPU's time to a token is that of reading the weights.
    if device.type == "cuda" and trained.weight(trained.names[0]).dtype == torch.bfloat16:
        model = model.bfloat16()
    rates = trained.facts.frames_per_second.values()
    generator = make_generator(
        model.to(device),
        trained.vqgan().to(device),
        trained.bpe(),
        [Grid(*grid) for grid in trained.facts.grids.values()],
        next((rate for rate in rates if rate), None),
    )
    sketch_vqgan = trained.sketch_vqgan()
    return replace(
        generator,
        sketch_vqgan=None if sketch_vqgan is None else sketch_vqgan.to(device),
        checkpoint=CheckpointFacts(trained.origin, trained.facts.step, trained.weights_sha256),
    )


def make_generator(
    model: Nuwa,
    vqgan: Vqgan,
    bpe: TextTokenizer,
    grids: Sequence[Grid],
    frames_per_second: float | None,
) -> Generator:
    """A generator for the grids that a model was trained on."""
    clips = [grid for grid in grids if grid.s > 1]
    images = [grid for grid in grids if grid.s == 1] or [clips[0]._replace(s=1)]
    largest = Grid(*model.config.position_grid)
    return Generator(
        model,
        vqgan,
        bpe,
        image_grid=images[0],
        clip_grid=clips[0] if clips else images[0]._replace(s=largest.s),
        frames_per_second=frames_per_second or _DEFAULT_FRAMES_PER_SECOND,
    )
