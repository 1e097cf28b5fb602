"""The stages of moving digits: their exact commands, what they read and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.demo.stages import PROCESSES, Stage, mpi_environment, process_environment
from launch.moving_digits.media import WORLD_FILE
from launch.moving_digits.world import World, world_of
from megatron_nuwa.training.recipe import load_recipe

BPE_VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """How large a proof is: its recipe, its media, its samples, and what it is to reach."""

    name: str
    recipe: Path
    # The folder that the recipe names.
    output: Path
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
        train=6000,
        held_out=480,
        samples=(8, 1, 10),
        sampling=("--temperature", "0.7", "--top-k", "32", "--guidance", "2"),
        batch_size=32,
        goal=0.8,
        minutes=30,
    ),
    "gpu": Size(
        name="gpu",
        recipe=Path("launch/recipes/moving_digits_gpu.yaml"),
        output=Path("runs/moving_digits_gpu"),
        train=40_000,
        held_out=960,
        samples=(16, 2, 20),
        sampling=("--temperature", "0.8", "--top-k", "64", "--guidance", "2"),
        batch_size=128,
        goal=0.95,
        minutes=None,
    ),
}
CORPORA = ("train-clips", "train-images", "heldout-clips", "heldout-images")
# Sets of samples: the task, and the list of captions that the media's folder holds.
SAMPLES = {
    "held-out captions": ("t2v", "heldout-captions.txt"),
    "trained captions": ("t2v", "train-captions.txt"),
    "images": ("t2i", "image-captions.txt"),
}


def folder_of(samples: str) -> str:
    """The folder's name of a set of samples."""
    return samples.replace(" ", "_")


def digit_stages(size: Size, output: Path, accelerators: int = 0) -> list[Stage]:
    """All stages in order, writing into `output`.

    `accelerators` is the number of GPUs of this machine. Raises `UserError` for a recipe that
    does not describe moving digits.
    """
    recipe = load_recipe(size.recipe)
    world = world_of(recipe)
    media, corpus = output / "media", output / "corpus"
    vqgan, pretrain, samples = output / "vqgan", output / "pretrain", output / "samples"
    bpe, scores, page = output / "bpe.json", output / "scores.json", output / "report.html"
    manifests = {name: media / f"{name}.jsonl" for name in CORPORA}
    corpora = tuple(corpus / name / "corpus.json" for name in CORPORA)
    processes = accelerators or PROCESSES
    environment = {} if accelerators else process_environment(0)
    overrides = tuple(moved(size, output))

    def deepspeed(script: str) -> tuple[str, ...]:
        launcher = ("deepspeed", "--num_accelerators", str(processes))
        return (*launcher, script, str(size.recipe), *overrides)

    def generate(name: str, count: int) -> tuple[str, ...]:
        task, captions = SAMPLES[name]
        return (
            *("python", "launch/generate.py", task, "--run", str(pretrain)),
            *("--prompts", str(media / captions), "--samples", str(count), *size.sampling),
            *("--batch-size", str(size.batch_size), "--output", str(samples / folder_of(name))),
        )

    sampled = tuple(samples / folder_of(name) / "samples.json" for name in SAMPLES)
    score = ["python", "-m", "launch.moving_digits.scorer", "--media", str(media)]
    score += ["--vqgan", str(vqgan), "--output", str(scores)]
    for name in SAMPLES:
        score += ["--samples", f"{name}={samples / folder_of(name)}"]
    return [
        Stage(
            "media",
            "Draw handwritten digits that move over a frame",
            (_media(size, world, media),),
            outputs=(media / WORLD_FILE, *manifests.values()),
        ),
        Stage(
            "vqgan",
            "Train the VQ-GAN that turns frames into tokens",
            (deepspeed("launch/train_vqgan.py"),),
            inputs=(size.recipe, *manifests.values()),
            outputs=(vqgan / "vqgan.safetensors", vqgan / "evaluation.json"),
            clears=(vqgan,),
            after=("media",),
            environment=environment,
        ),
        Stage(
            "bpe",
            "Learn the text vocabulary from the captions",
            (_train_bpe(manifests, bpe),),
            inputs=(manifests["train-clips"], manifests["train-images"]),
            outputs=(bpe,),
            clears=(bpe,),
        ),
        Stage(
            "tokenize",
            f"Turn clips, images and captions into token shards with {PROCESSES} MPI ranks",
            tuple(_tokenize(world, manifests[name], corpus / name, vqgan, bpe) for name in CORPORA),
            inputs=(*manifests.values(), vqgan / "vqgan.safetensors", bpe),
            outputs=corpora,
            clears=(corpus,),
            after=("media",),
            environment={**environment, **mpi_environment()},
        ),
        Stage(
            "pretrain",
            "Pretrain from random weights",
            (deepspeed("launch/pretrain.py"),),
            inputs=(size.recipe, *corpora),
            outputs=(pretrain / "evaluation.json",),
            clears=(pretrain,),
            environment=environment,
        ),
        Stage(
            "generate",
            "Generate clips from captions, held out and trained on, and images",
            tuple(generate(name, count) for name, count in zip(SAMPLES, size.samples, strict=True)),
            inputs=corpora,
            outputs=sampled,
            clears=(samples,),
            after=("pretrain",),
            environment=environment,
        ),
        Stage(
            "score",
            "Read which digits appear and how they move",
            (tuple(score),),
            inputs=(*sampled, manifests["heldout-clips"], vqgan / "vqgan.safetensors"),
            outputs=(scores,),
            after=("generate",),
            environment=environment,
        ),
        Stage(
            "report",
            "Write the report page",
            (
                (
                    *("python", "-m", "launch.moving_digits.report", str(output)),
                    *("--size", size.name),
                ),
            ),
            inputs=(scores, Path("launch/moving_digits/report.html.j2")),
            outputs=(page,),
            after=("media", "vqgan", "bpe", "tokenize", "pretrain", "generate", "score"),
            environment=environment,
        ),
    ]


def moved(size: Size, output: Path) -> Iterator[str]:
    """Recipe fields that move a run to another folder than the recipe's own."""
    if output == size.output:
        return
    tree = yaml.safe_load(size.recipe.read_text(encoding="utf-8"))
    for field, value in _leaves(tree):
        changed = _replaced(value, size.output, output)
        if changed != value:
            yield f"{field}={yaml.safe_dump(changed, default_flow_style=True, width=10**6).strip()}"


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _replaced(value: Any, old: Path, new: Path) -> Any:
    if isinstance(value, list):
        return [_replaced(one, old, new) for one in value]
    if isinstance(value, str) and Path(value).is_relative_to(old):
        return str(new / Path(value).relative_to(old))
    return value


def _media(size: Size, world: World, media: Path) -> tuple[str, ...]:
    counts = ("--clips", str(size.train), "--images", str(size.train))
    held_out = ("--held-out-clips", str(size.held_out), "--held-out-images", str(size.held_out))
    sizes = world.model_dump().items()
    flags = tuple(
        word for name, value in sizes for word in (f"--{name.replace('_', '-')}", str(value))
    )
    head = ("python", "-m", "launch.moving_digits.media", "--output", str(media))
    return (*head, *counts, *held_out, *flags)


def _train_bpe(manifests: dict[str, Path], bpe: Path) -> tuple[str, ...]:
    sources = (str(manifests["train-clips"]), str(manifests["train-images"]))
    size = ("--vocabulary-size", str(BPE_VOCABULARY))
    return ("python", "-m", "preprocessing", "train-bpe", *sources, "--output", str(bpe), *size)


def _tokenize(
    world: World, manifest: Path, corpus: Path, vqgan: Path, bpe: Path
) -> tuple[str, ...]:
    launcher = ("mpirun", "-n", str(PROCESSES), "--bind-to", "none", "--oversubscribe")
    command = ("python", "-m", "preprocessing", "tokenize", str(manifest), "--output", str(corpus))
    tokenizers = ("--vqgan", str(vqgan), "--bpe", str(bpe))
    # Small enough that both MPI ranks get work from every corpus.
    shards = ("--items-per-shard", "240")
    frames = ("--frames", str(world.frames), "--fps", str(world.frames_per_second))
    decoder = ("--decoder", "pyav")
    is_clips = manifest.stem.endswith("clips")
    return (*launcher, *command, *tokenizers, *shards, *((*frames, *decoder) if is_clips else ()))
