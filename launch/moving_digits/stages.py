"""The stages of moving digits: their exact commands, what they read and what they leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launch.demo.stages import PROCESSES, Stage, mpi_environment, process_environment
from launch.moving_digits.media import WORLD_FILE
from launch.moving_digits.motions import Scene, image_caption, scenes
from launch.moving_digits.sizes import Size
from launch.moving_digits.world import World, world_of
from megatron_nuwa.training.recipe import load_recipe

BPE_VOCABULARY = 1024
# The stages whose times and commands the page shows.
BEFORE_PAGE = (
    *("media", "vqgan", "sketch-vqgan", "bpe", "tokenize"),
    *("pretrain", "generate", "tasks", "score"),
)


CORPORA = ("train-clips", "train-images", "heldout-clips", "heldout-images")
# Sets of samples: the task, and the list of captions that the media's folder holds.
SAMPLES = {
    "held-out captions": ("t2v", "heldout-captions.txt"),
    "trained captions": ("t2v", "train-captions.txt"),
    "images": ("t2i", "image-captions.txt"),
}
# The other tasks, shown on held-out items: what each starts from, and what is made new.
SHOWN_ITEMS = 8
LOWER_HALF = ("--region", "0,0.5,1,1")
TASKS = ("s2i", "i2i", "ti2i", "s2v", "v2v", "tv2v")
CHANGED = Scene(3, "up", "right")


def folder_of(samples: str) -> str:
    """The folder's name of a set of samples."""
    return samples.replace(" ", "_")


def digit_stages(size: Size, output: Path, accelerators: int = 0) -> list[Stage]:
    """All stages in order, writing into `output`.

    `accelerators` is the number of GPUs of this machine. Raises `UserError` for a recipe that
    does not describe moving digits.
    """
    recipe = load_recipe(size.recipe)
    world = world_of(recipe, size.digit, size.step, size.raster)
    media, corpus = output / "media", output / "corpus"
    vqgan, sketch_vqgan = output / "vqgan", output / "sketch_vqgan"
    pretrain, samples = output / "pretrain", output / "samples"
    tokenizers = (vqgan / "vqgan.safetensors", sketch_vqgan / "vqgan.safetensors")
    bpe, scores, page = output / "bpe.json", output / "scores.json", output / "report.html"
    manifests = {name: media / f"{name}.jsonl" for name in CORPORA}
    frames = tuple(media / f"{name}.jsonl" for name in ("train-frames", "heldout-frames"))
    corpora = tuple(corpus / name / "corpus.json" for name in CORPORA)
    processes = accelerators or PROCESSES
    environment = {} if accelerators else process_environment(0)
    overrides = tuple(moved(size, output))

    def deepspeed(script: str, *extra: str) -> tuple[str, ...]:
        launcher = ("deepspeed", "--num_accelerators", str(processes))
        return (*launcher, script, str(size.recipe), *overrides, *extra)

    def generate(name: str, count: int) -> tuple[str, ...]:
        task, captions = SAMPLES[name]
        return (
            *("python", "launch/generate.py", task, "--run", str(pretrain)),
            *("--prompts", str(media / captions), "--samples", str(count), *size.sampling),
            *("--batch-size", str(size.batch_size), "--output", str(samples / folder_of(name))),
        )

    def show(task: str) -> tuple[str, ...]:
        return (
            *("python", "launch/generate.py", task, "--run", str(pretrain)),
            *_given(size, task, media),
            *without_guidance(size.sampling, task),
            *("--batch-size", str(size.batch_size), "--output", str(samples / task)),
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
            outputs=(media / WORLD_FILE, *manifests.values(), *frames),
        ),
        Stage(
            "vqgan",
            "Train the VQ-GAN that turns frames into tokens",
            (deepspeed("launch/train_vqgan.py"),),
            inputs=(size.recipe, *frames),
            outputs=(vqgan / "vqgan.safetensors", vqgan / "evaluation.json"),
            clears=(vqgan,),
            after=("media",),
            environment=environment,
        ),
        Stage(
            "sketch-vqgan",
            "Train the VQ-GAN that turns sketches into tokens",
            (deepspeed("launch/train_vqgan.py", "--section", "sketch_vqgan"),),
            inputs=(size.recipe, *frames),
            outputs=(sketch_vqgan / "vqgan.safetensors", sketch_vqgan / "evaluation.json"),
            clears=(sketch_vqgan,),
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
            f"Turn clips, images, sketches and captions into tokens with {PROCESSES} MPI ranks",
            tuple(
                _tokenize(world, manifests[name], corpus / name, (vqgan, sketch_vqgan, bpe))
                for name in CORPORA
            ),
            inputs=(*manifests.values(), *tokenizers, bpe),
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
            "tasks",
            "Generate by the other six tasks, on held-out items",
            tuple(show(task) for task in TASKS),
            inputs=corpora,
            outputs=tuple(samples / task / "samples.json" for task in TASKS),
            after=("pretrain", "generate"),
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
            inputs=(
                scores,
                *(samples / task / "samples.json" for task in TASKS),
                Path("launch/moving_digits/report.html.j2"),
            ),
            outputs=(page,),
            after=BEFORE_PAGE,
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


def without_guidance(sampling: tuple[str, ...], task: str) -> tuple[str, ...]:
    """The sampling options of a task: guidance belongs to those that read a text."""
    if task.startswith("t"):
        return sampling
    place = sampling.index("--guidance")
    return sampling[:place] + sampling[place + 2 :]


def _given(size: Size, task: str, media: Path) -> tuple[str, ...]:
    """What the command of a task starts from."""
    images = [str(media / f"heldout-images/{number:06d}") for number in range(SHOWN_ITEMS)]
    if task == "s2i":
        return _repeat("--sketch", [f"{image}-sketch.png" for image in images])
    if task in ("i2i", "ti2i"):
        prompt = ("--prompt", image_caption(CHANGED.digit)) if task == "ti2i" else ()
        return (*_repeat("--image", [f"{image}.png" for image in images]), *LOWER_HALF, *prompt)
    clips = _held_out_clips(size, media, CHANGED.digit if task == "tv2v" else None)
    if task == "s2v":
        return _repeat("--sketch", [f"{clip}.npy" for clip in clips])
    given = _repeat("--clip", [f"{clip}.mp4" for clip in clips])
    if task == "v2v":
        return (*given, "--keep-frames", "2")
    # The first frame stays, the rest is made new after another caption.
    return (*given, "--prompt", CHANGED.caption, "--region-frames", "1:")


def _held_out_clips(size: Size, media: Path, digit: int | None) -> list[str]:
    """Held-out clips without their endings, of one digit or of as many as there are."""
    among = scenes(held_out=True)
    numbers = [
        number
        for number in range(size.held_out)
        if digit is None or among[number % len(among)].digit == digit
    ]
    # Scenes come digit by digit.
    step = len(among) // SHOWN_ITEMS if digit is None else 1
    return [str(media / f"heldout-clips/{number:06d}") for number in numbers[::step][:SHOWN_ITEMS]]


def _repeat(flag: str, values: list[str]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (flag, value))


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
    world: World, manifest: Path, corpus: Path, tokenizers: tuple[Path, Path, Path]
) -> tuple[str, ...]:
    launcher = ("mpirun", "-n", str(PROCESSES), "--bind-to", "none", "--oversubscribe")
    command = ("python", "-m", "preprocessing", "tokenize", str(manifest), "--output", str(corpus))
    flags = ("--vqgan", "--sketch-vqgan", "--bpe")
    readers = tuple(
        w for flag, path in zip(flags, tokenizers, strict=True) for w in (flag, str(path))
    )
    # Small enough that both MPI ranks get work from every corpus.
    shards = ("--items-per-shard", "240")
    frames = ("--frames", str(world.frames), "--fps", str(world.frames_per_second))
    decoder = ("--decoder", "pyav")
    is_clips = manifest.stem.endswith("clips")
    return (*launcher, *command, *readers, *shards, *((*frames, *decoder) if is_clips else ()))
