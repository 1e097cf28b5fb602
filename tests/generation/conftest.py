"""A trained run, and media that generation starts from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from helpers import SmallWorld, lone_process
from PIL import Image

from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe


def train(world: SmallWorld, folder: Path, *overrides: str) -> Path:
    """A run of two steps."""
    changes = [f"run={folder}", "schedule.steps=2", "evaluation=null", *overrides]
    recipe = load_recipe(world.recipe, changes)
    pretrain(recipe, recipe.training.deepspeed_config, lone_process())
    return folder


@pytest.fixture(scope="session")
def run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all kinds of context: pictures and sketches of 16², clips of three frames."""
    folder = tmp_path_factory.mktemp("generation") / "run"
    return train(small_world, folder, *small_world.sketch_overrides("s2i", "s2v"))


@pytest.fixture(scope="session")
def run_without_sketches(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of text and pictures only."""
    return train(small_world, tmp_path_factory.mktemp("generation") / "plain")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clip.mp4 (32²), photo.png (24 × 20), masks of both and sketches."""
    folder = tmp_path_factory.mktemp("media")
    source = "testsrc=size=32x32:rate=8:duration=1"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source]
    subprocess.run([*command, folder / "clip.mp4"], check=True)
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    for name, shape, region in (
        ("photo-mask.png", (20, 24), np.s_[:, 12:]),
        ("clip-mask.png", (32, 32), np.s_[8:24, 8:24]),
        ("all.png", (20, 24), np.s_[:, :]),
        ("nothing.png", (20, 24), np.s_[:0]),
        ("small-mask.png", (10, 12), np.s_[:, 6:]),
    ):
        mask = np.zeros(shape, np.uint8)
        mask[region] = 255
        Image.fromarray(mask).save(folder / name)
    map_ = np.zeros((20, 24), np.uint8)
    map_[5:15, 5:15] = 1
    Image.fromarray(map_).save(folder / "sketch.png")
    np.save(folder / "sketch.npy", np.stack([map_, 2 - map_, map_]))
    moving = np.zeros((3, 32, 32), np.uint8)
    for frame in range(3):
        moving[frame, :, 8 * frame : 8 * frame + 8] = 1
    np.save(folder / "moving-mask.npy", moving)
    frames = [Image.fromarray(255 * frame) for frame in moving]
    frames[0].save(folder / "moving-mask.gif", save_all=True, append_images=frames[1:])
    return folder
