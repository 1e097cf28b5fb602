"""A small world for tests: tokenizers, corpora with structure to learn, and a recipe over them."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.harness.corpora import write_corpus
from megatron_nuwa.data.shards import ShardItem
from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, save_vqgan
from megatron_nuwa.training.launcher import free_port
from megatron_nuwa.training.processes import Processes, join_processes

ROOT = Path(__file__).resolve().parents[1]
_NOBODY = 65534
CODES, SKETCH_CODES, CLASSES = 32, 16, 5
CAPTIONS = ["a red square moves left", "a blue circle stays", "none of them turns around"]


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Notes in `cells` how large the largest tensor is that any operation inside returns."""

    cells = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.cells = max(self.cells, result.numel())
        return result


@dataclass(frozen=True)
class SmallWorld:
    """Paths of the fixture's files."""

    folder: Path
    vqgan: Path
    bpe: Path
    images: Path
    clips: Path
    recipe: Path
    sketch_vqgan: Path
    sketched_images: Path
    sketched_clips: Path

    def sketch_overrides(self, *tasks: str) -> list[str]:
        """What makes the recipe's model read sketches, and gives it these tasks, too."""
        corpora = {"s2i": self.sketched_images, "s2v": self.sketched_clips}
        return [
            f"model.sketch_codebook_size={SKETCH_CODES}",
            "model.sketch_code_dim=6",
            f"tokenizers.sketch_vqgan={self.sketch_vqgan}",
            *(
                f"data.tasks.{task}={{corpora: ['{corpora[task]}'], batch_size: 2}}"
                for task in tasks
            ),
        ]


def make_corpus(
    folder: Path,
    grid: tuple[int, int, int],
    items: int,
    bpe: TextTokenizer,
    vqgan: Vqgan,
    sketch_vqgan: Vqgan | None = None,
) -> Path:
    """A corpus whose tokens follow from the caption and the place, with some noise.

    Sketches follow from the item's number alone.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(items)
    cells = int(np.prod(grid))
    shard = []
    for number in range(items):
        captions = tuple(CAPTIONS[(number + extra) % 3] for extra in range(1 + number % 2))
        tokens = (np.arange(cells) * 3 + (number % 3) * 7) % CODES
        noisy = random.random(cells) < 0.1
        tokens[noisy] = random.integers(0, CODES, int(noisy.sum()))
        shard.append(
            ShardItem(
                f"item-{number}",
                tokens.astype(np.uint16),
                np.stack([bpe.encode(caption) for caption in captions]),
                captions,
                grid[2],
                f"{number}.mp4",
                sketch=None
                if sketch_vqgan is None
                else ((np.arange(cells) + number) % SKETCH_CODES).astype(np.uint16),
            )
        )
    write_corpus(folder, grid, shard, bpe, vqgan, sketch_vqgan, group_items=4)
    return folder


def make_small_world(folder: Path) -> SmallWorld:
    """Tokenizers, an image corpus, a clip corpus and a recipe of seconds."""
    torch.manual_seed(0)
    config = VqganConfig(
        image_size=16,
        downsampling=4,
        base_channels=8,
        residual_blocks=1,
        attention=False,
        codebook_size=CODES,
        code_dim=8,
        lookup_dim=4,
    )
    vqgan = Vqgan(config)
    save_vqgan(vqgan, folder / "vqgan.safetensors")
    bpe = train_bpe(CAPTIONS * 4, 540)
    bpe.save(folder / "bpe.json")
    images = make_corpus(folder / "images", (4, 4, 1), 12, bpe, vqgan)
    clips = make_corpus(folder / "clips", (4, 4, 3), 10, bpe, vqgan)
    maps = {"classes": CLASSES, "codebook_size": SKETCH_CODES, "code_dim": 6, "lookup_dim": None}
    sketch_vqgan = Vqgan(config.model_copy(update=maps))
    save_vqgan(sketch_vqgan, folder / "sketch_vqgan.safetensors")
    sketched = [
        make_corpus(folder / f"sketched_{name}", grid, 6, bpe, vqgan, sketch_vqgan)
        for name, grid in (("images", (4, 4, 1)), ("clips", (4, 4, 3)))
    ]
    recipe = {
        "name": "small",
        "seed": 3,
        "run": str(folder / "run"),
        "model": {
            "width": 32,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "codebook_size": CODES,
            "code_dim": 8,
            "text_vocabulary": bpe.vocabulary_size,
            "position_grid": [4, 4, 3],
        },
        "tokenizers": {
            "vqgan": str(folder / "vqgan.safetensors"),
            "bpe": str(folder / "bpe.json"),
        },
        "data": {
            "tasks": {
                "t2i": {"corpora": [str(images)], "batch_size": 4},
                "v2v": {"corpora": [str(clips)], "batch_size": 2},
                "t2v": {"corpora": [str(clips)], "batch_size": 2},
            }
        },
        "schedule": {"steps": 20, "decay": "cosine"},
        "training": {
            "deepspeed_config": str(ROOT / "ds_configs/zero1_fp32.json"),
            "log_every": 1,
            "checkpoint_every": 1000,
        },
        "evaluation": {
            "every": 1000,
            "corpora": {"t2i": [str(images)], "v2v": [str(clips)], "t2v": [str(clips)]},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return SmallWorld(
        folder,
        folder / "vqgan.safetensors",
        folder / "bpe.json",
        images,
        clips,
        path,
        folder / "sketch_vqgan.safetensors",
        *sketched,
    )


@lru_cache
def lone_process() -> Processes:
    """The test process as a run of one; joined once, since DeepSpeed keeps the first group."""
    joined = join_processes()
    atexit.register(joined.__exit__, None, None, None)
    return joined.__enter__()


@contextmanager
def without_privileges() -> Iterator[None]:
    """Nobody's rights in place of root's, whom no file's mode keeps out; others keep their own."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def run_command_line(
    *command: str | Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project from the repository's root, its output captured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def deepspeed_command(processes: int, *arguments: str | Path) -> list[str | Path]:
    """The deepspeed launcher of this environment, on a port of its own."""
    launcher = Path(sys.executable).with_name("deepspeed")
    port = ("--master_port", str(free_port()))
    return [launcher, "--num_accelerators", str(processes), *port, *arguments]
