"""A trained run, the command that generates from it, and media that it starts from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import CAPTIONS, SmallWorld, lone_process
from PIL import Image

from megatron_nuwa.data.text import train_bpe
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.generation.trained import Generator, make_generator
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe


@pytest.fixture(scope="session")
def generator() -> Generator:
    """A small random model that reads texts and sketches: pictures of 16², clips of 3 frames."""
    torch.manual_seed(0)
    bpe = train_bpe(CAPTIONS * 4, 540)
    common = {"image_size": 16, "downsampling": 4, "base_channels": 8, "residual_blocks": 1}
    common |= {"attention": False, "codebook_size": 40, "code_dim": 8, "lookup_dim": 4}
    model = Nuwa(
        NuwaConfig(
            width=32,
            heads=2,
            encoder_layers=1,
            decoder_layers=2,
            codebook_size=40,
            code_dim=8,
            text_vocabulary=bpe.vocabulary_size,
            position_grid=(4, 4, 3),
            sketch_codebook_size=40,
            sketch_code_dim=8,
        )
    )
    with torch.no_grad():
        # Initial weights are so small that every context would give nearly the same logits.
        for parameter in model.parameters():
            parameter.mul_(4)
    vqgan = Vqgan(VqganConfig(**common))
    grids, rates = {"t2i": Grid(4, 4, 1), "t2v": Grid(4, 4, 3)}, {"t2i": None, "t2v": 8.0}
    made = make_generator(model.eval(), vqgan.eval(), bpe, grids, rates)
    return replace(made, sketch_vqgan=Vqgan(VqganConfig(**common, classes=5)).eval())


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
    command = [ffmpeg_program(), "-v", "error", "-f", "lavfi", "-i", source]
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


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", "launch/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generate(command: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process; gives the lines of samples.json."""

    def call(*arguments: object) -> list[dict]:
        words = [str(argument) for argument in arguments]
        source = [] if "--run" in words else ["--run", str(run)]
        output = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["generate", *words, *source, "--output", str(output)])
        command.main()
        return json.loads((output / "samples.json").read_text())

    return call


@pytest.fixture
def call(command: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, on a run of the caller's."""

    def call(*arguments: object, run: Path = run) -> None:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["generate", *words, "--run", str(run)])
        command.main()

    return call
