"""How large a proof that pretraining learns is: for a laptop's CPU, and for a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """How large a proof is: its recipe, its media, its samples, and what it is to reach."""

    name: str
    recipe: Path
    # The folder that the recipe names.
    output: Path
    # Pixels: a digit's side, its step from frame to frame, the raster of its places.
    digit: int
    step: int
    raster: int
    # Items to train on and held out, clips and images each.
    train: int
    held_out: int
    # Samples a caption: held out, trained on, images.
    samples: tuple[int, int, int]
    sampling: tuple[str, ...]
    batch_size: int
    goal: float
    # None where nobody has measured it yet.
    minutes: int | None


SIZES = {
    "cpu": Size(
        name="cpu",
        recipe=Path("launch/recipes/moving_digits_cpu.yaml"),
        output=Path("runs/moving_digits"),
        digit=16,
        step=4,
        raster=4,
        train=6000,
        held_out=480,
        samples=(8, 1, 10),
        sampling=("--temperature", "0.6", "--top-k", "32", "--guidance", "1.5"),
        batch_size=32,
        goal=0.8,
        minutes=30,
    ),
    "gpu": Size(
        name="gpu",
        recipe=Path("launch/recipes/moving_digits_gpu.yaml"),
        output=Path("runs/moving_digits_gpu"),
        digit=24,
        step=4,
        raster=1,
        train=40_000,
        held_out=960,
        samples=(16, 2, 20),
        sampling=("--temperature", "0.8", "--top-k", "64", "--guidance", "2"),
        batch_size=128,
        goal=0.95,
        minutes=None,
    ),
}
