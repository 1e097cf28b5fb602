"""A trained run, opened for generation: model, tokenizers and grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.data.text import NO_CAPTION, TextTokenizer, text_mask
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.parts import in_parts
from megatron_nuwa.generation.sampling import (
    OnFrame,
    OnToken,
    SamplingSettings,
    generate_tokens,
)
from megatron_nuwa.generation.token_memory import TokenMemory
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.training.trained_model import open_trained

_DEFAULT_FRAMES_PER_SECOND = 2.5
# Whose grid and frames a second each of the eight tasks has: its own, or else those of the nearest
# task that the model was trained on.
_NEAREST = {
    "t2i": ("t2i", "s2i"),
    "s2i": ("s2i", "t2i"),
    "i2i": ("t2i", "s2i"),
    "ti2i": ("t2i", "s2i"),
    "t2v": ("t2v", "v2v", "s2v"),
    "s2v": ("s2v", "t2v", "v2v"),
    "v2v": ("v2v", "t2v", "s2v"),
    "tv2v": ("t2v", "v2v", "s2v"),
}


@dataclass(frozen=True)
class CheckpointFacts:
    """Which weights a picture is from: where they lay, their last step, their file's sha256."""

    path: Path
    step: int
    sha256: str


@dataclass(frozen=True)
class Generator:
    """Everything that turns a prompt into pixels.

    `image_grid`, `clip_grid` and `frames_per_second` are those of t2i and t2v; `for_task` gives
    those of another task, out of `grids` and `rates`, which have all eight.
    """

    model: Nuwa
    vqgan: Vqgan
    bpe: TextTokenizer
    image_grid: Grid
    clip_grid: Grid
    frames_per_second: float
    grids: Mapping[str, Grid]
    rates: Mapping[str, float]
    # None for a model that reads no sketches.
    sketch_vqgan: Vqgan | None = None
    # None for a model in training.
    checkpoint: CheckpointFacts | None = None
    encoded: TokenMemory = field(default_factory=TokenMemory, compare=False)

    def for_task(self, task: str) -> Generator:
        """The same with the grid, the picture size and the frames a second of one of the tasks."""
        grid = self.grids[task]
        return replace(
            self,
            image_grid=grid._replace(s=1),
            clip_grid=self.clip_grid if grid.s == 1 else grid,
            frames_per_second=self.rates[task],
        )

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
        vqgan = self.sketch_vqgan
        tokens = [self.encoded.tokens(vqgan, each, self._encode_maps) for each in maps]
        grid = Grid(config.grid_side, config.grid_side, maps.shape[1])
        return Context("sketch", torch.stack(tokens), grid)

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
        """uint8 (frames, rows, columns, 3) → tokens int64 (frames · h · w) in generation order.

        Equal frames are encoded once, and give the same tensor again.
        """
        return self.encoded.tokens(self.vqgan, frames, self._encode_pixels)

    def _encode_pixels(self, frames: np.ndarray) -> Tensor:
        def tokens(part: Tensor) -> Tensor:
            pixels = part.to(self.device).float() / 127.5 - 1
            return self.vqgan.encode(pixels.permute(0, 3, 1, 2))

        with torch.no_grad():
            return in_parts(tokens, torch.tensor(frames), frames[0, ..., 0].size).flatten()

    def pixels(self, tokens: Tensor, grid: Grid) -> np.ndarray:
        """Tokens (batch, grid cells) → uint8 (batch, frames, rows, columns, 3).

        On a CPU a frame is the same, bit for bit, whatever it is decoded with.
        """

        def levels(part: Tensor) -> Tensor:
            images = self.vqgan.decode(part)
            return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

        frames = tokens.reshape(-1, grid.h, grid.w)
        pixels = grid.h * grid.w * self.vqgan.config.downsampling**2
        with torch.no_grad():
            if self.device.type == "cpu":
                # Convolutions choose their kernels by the number of frames.
                images = torch.cat([levels(frame) for frame in frames.split(1)])
            else:
                images = in_parts(levels, frames, pixels)
        return images.permute(0, 2, 3, 1).unflatten(0, (-1, grid.s)).numpy()

    def _encode_maps(self, maps: np.ndarray) -> Tensor:
        """Class numbers (frames, rows, columns) → tokens int64 (frames · h · w)."""
        assert self.sketch_vqgan is not None
        vqgan, classes = self.sketch_vqgan, self.sketch_vqgan.config.classes
        assert classes is not None

        def tokens(part: Tensor) -> Tensor:
            return vqgan.encode(one_hot(part.to(self.device).long(), classes))

        with torch.no_grad():
            return in_parts(tokens, torch.tensor(maps), maps[0].size).flatten()


def open_generator(path: Path, field: str, device: torch.device | None = None) -> Generator:
    """Open a pretraining run's newest whole checkpoint, one of its checkpoints or an exported file.

    The model computes in fp32; on a GPU in bf16, where its weights are. Raises `UserError` that
    names `field`, the argument that `path` comes from, or what is missing; without `device` also
    where a GPU is meant and CUDA does not work.
    """
    device = device or default_device()
    trained = open_trained(path, field, full_precision=False)
    model = trained.nuwa()
    # A GPU's time to a token is that of reading the weights.
    if device.type == "cuda" and trained.weight(trained.names[0]).dtype == torch.bfloat16:
        model = model.bfloat16()
    generator = make_generator(
        model.to(device),
        trained.vqgan().to(device),
        trained.bpe(),
        {task: Grid(*grid) for task, grid in trained.facts.grids.items()},
        trained.facts.frames_per_second,
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
    grids: Mapping[str, Grid],
    frames_per_second: Mapping[str, float | None],
) -> Generator:
    """A generator for a model that was trained on these grids and frames a second, by task.

    A task that it was not trained on takes those of the nearest one that writes the same kind:
    images t2i's, then s2i's, and clips t2v's, then v2v's and s2v's (s2v its own first, then t2v's).
    Images of a model of clips are single frames; clips of a model of images have as many frames as
    it has positions for.
    """
    # For a kind that no task was trained on.
    other, frames = next(iter(grids.values())), model.config.position_grid[2]
    all_grids, all_rates = {}, {}
    for task, nearest in _NEAREST.items():
        fallback = other._replace(s=1 if task.endswith("2i") else frames)
        all_grids[task] = next((grids[name] for name in nearest if name in grids), fallback)
        rates = (frames_per_second.get(name) for name in (*nearest, *frames_per_second))
        all_rates[task] = next((rate for rate in rates if rate), _DEFAULT_FRAMES_PER_SECOND)
    return Generator(
        model,
        vqgan,
        bpe,
        image_grid=all_grids["t2i"],
        clip_grid=all_grids["t2v"],
        frames_per_second=all_rates["t2v"],
        grids=all_grids,
        rates=all_rates,
    )
