"""A small network that reads which digit a frame shows, trained on the train samples alone."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.moving_digits.handwriting import Handwriting
from launch.moving_digits.motion_reading import centres, ink_of
from launch.moving_digits.motions import DIGITS
from launch.moving_digits.world import World, anywhere, draw

# Pixels around the digit that the network sees too.
_MARGIN = 3
_STEPS = 1000
_BATCH = 64
_LEARNING_RATE = 3e-3
_CHANNELS = 32
# Augmentation: turn in radians, relative size, shift in pixels, blur, contrast, noise.
_TURN, _STRETCH, _SHIFT, _BLUR, _CONTRAST, _NOISE = 0.2, 0.12, 1.0, 0.7, 0.2, 0.05


class DigitClassifier(nn.Module):
    """Windows around a digit, ink (batch, window, window) → logits (batch, 10)."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.window = world.digit + 2 * _MARGIN
        side = math.ceil(math.ceil(self.window / 2) / 2)
        self.layers = nn.Sequential(
            nn.Conv2d(1, _CHANNELS, 3, padding=1),
            nn.BatchNorm2d(_CHANNELS),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, stride=2),
            nn.BatchNorm2d(_CHANNELS),
            nn.ReLU(),
            nn.Conv2d(_CHANNELS, 2 * _CHANNELS, 3, padding=1, stride=2),
            nn.BatchNorm2d(2 * _CHANNELS),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * _CHANNELS * side**2, DIGITS),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """Logits of windows."""
        return self.layers(windows.unsqueeze(1))

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> np.ndarray:
        """Log-probabilities of the digits in frames uint8 (frames, side, side[, 3]): (frames, 10).

        A frame without ink says nothing: its row is uniform.
        """
        self.eval()
        ink = ink_of(frames)
        middles = centres(ink)
        log = self(torch.from_numpy(windows(ink, middles, self.window))).log_softmax(-1).numpy()
        return np.where(np.isnan(middles[:, :1]), -np.log(DIGITS), log)


def windows(ink: np.ndarray, middles: np.ndarray, side: int) -> np.ndarray:
    """The square of `side` pixels around the middle of each frame's ink, empty outside."""
    padded = np.pad(ink, ((0, 0), (side, side), (side, side)))
    corners = np.nan_to_num(middles).round().astype(int) + side - side // 2
    return np.stack(
        [
            frame[row : row + side, column : column + side]
            for frame, (row, column) in zip(padded, corners, strict=True)
        ]
    )


def train_classifier(
    digits: Handwriting, world: World, seed: int = 0, steps: int = _STEPS
) -> DigitClassifier:
    """Train on digits drawn anywhere in a frame, a little turned, stretched, shifted and noisy."""
    random = np.random.default_rng(seed)
    frames = np.concatenate([draw(world, ink, anywhere(world, random)[None]) for ink in digits.ink])
    ink = ink_of(frames)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(world)
        inputs = torch.from_numpy(windows(ink, centres(ink), model.window))
        labels = torch.from_numpy(digits.labels)
        optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps)
        for _ in range(steps):
            rows = torch.randint(len(labels), (_BATCH,))
            loss = F.cross_entropy(model(_disturbed(inputs[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _disturbed(batch: Tensor) -> Tensor:
    """Windows with small random changes that keep the digit."""
    count, side = len(batch), batch.shape[-1]
    turn = (2 * torch.rand(count) - 1) * _TURN
    stretch = 1 + (2 * torch.rand(count, 2) - 1) * _STRETCH
    shift = (2 * torch.rand(count, 2) - 1) * _SHIFT * 2 / side
    cosine, sine = turn.cos(), turn.sin()
    rows = torch.stack([cosine * stretch[:, 0], -sine * stretch[:, 1], shift[:, 0]], -1)
    columns = torch.stack([sine * stretch[:, 0], cosine * stretch[:, 1], shift[:, 1]], -1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [count, 1, side, side], False)
    moved = F.grid_sample(batch.unsqueeze(1), grid, align_corners=False)
    # A tokenizer's reconstruction is a little blurred.
    blurred = F.avg_pool2d(moved, 3, stride=1, padding=1)
    moved = moved.lerp(blurred, _BLUR * torch.rand(count, 1, 1, 1)).squeeze(1)
    contrast = 1 + (2 * torch.rand(count, 1, 1) - 1) * _CONTRAST
    noisy = moved * contrast + _NOISE * torch.randn_like(moved)
    return noisy.clamp(0, 1)
