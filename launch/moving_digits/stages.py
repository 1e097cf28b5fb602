"""The stages of moving digits: their exact commands, what they read and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launch.moving_digits.media import WORLD_FILE
from launch.moving_digits.motions import Scene, image_caption, scenes
from launch.moving_digits.sizes import Size
from launch.moving_digits.world import World, world_of
from launch.workflow.plan import TOKEN_STAGES, Plan, moved, repeated
from launch.workflow.stage import PROCESSES, Stage, process_environment
from megatron_nuwa.training.recipe import load_recipe

# The stages whose times and commands the page shows.
BEFORE_PAGE = ("media", *TOKEN_STAGES, "pretrain", "generate", "tasks", "score")
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


def digit_stages(size: Size, output: Path, accelerators: int = 0, seed: int = 0) -> list[Stage]:
    """All stages in order, writing into `output`.

    `accelerators` is the number of GPUs of this machine. `seed` is everybody's: of the media, of
    the trainings, of the samples. Raises `UserError` for a recipe that
    does not describe moving digits.
    """
    recipe = load_recipe(size.recipe)
    world = world_of(recipe, size.digit, size.step, size.raster)
    plan = Plan(
        size.recipe,
        output,
        (*moved(size.recipe, size.output, output), f"seed={seed}"),
        accelerators or PROCESSES,
        {} if accelerators else process_environment(0),
    )
    frames = tuple(plan.media / f"{name}.jsonl" for name in ("train-frames", "heldout-frames"))
    scores = output / "scores.json"
    scored = tuple(plan.samples / folder_of(name) / "samples.json" for name in SAMPLES)
    seeded = ("--seed", str(seed))
    shown = tuple(plan.samples / task / "samples.json" for task in TASKS)
    return [
        Stage(
            "media",
            "Draw handwritten digits that move over a frame",
            ((*_media(size, world, plan.media), *seeded),),
            outputs=(plan.media / WORLD_FILE, *plan.manifests.values(), *frames),
        ),
        *plan.token_stages(frames, _farm_options(world), after=("media",)),
        plan.stage(
            "pretrain",
            "Pretrain from random weights",
            plan.deepspeed("launch/pretrain.py"),
            inputs=(size.recipe, *plan.corpora),
            outputs=(plan.pretrain / "evaluation.json",),
            clears=(plan.pretrain,),
        ),
        plan.stage(
            "generate",
            "Generate clips from captions, held out and trained on, and images",
            *(
                (*_sample(plan, size, name, count), *seeded)
                for name, count in zip(SAMPLES, size.samples, strict=True)
            ),
            inputs=plan.corpora,
            outputs=scored,
            clears=(plan.samples,),
            after=("pretrain",),
        ),
        plan.stage(
            "tasks",
            "Generate by the other six tasks, on held-out items",
            *((*_show(plan, size, task), *seeded) for task in TASKS),
            inputs=plan.corpora,
            outputs=shown,
            after=("pretrain", "generate"),
        ),
        plan.stage(
            "score",
            "Read which digits appear and how they move",
            _score(plan, scores),
            inputs=(*scored, plan.manifests["heldout-clips"], plan.vqgan / "vqgan.safetensors"),
            outputs=(scores,),
            after=("generate",),
        ),
        plan.stage(
            "report",
            "Write the report page",
            ("python", "-m", "launch.moving_digits.report", str(output), "--size", size.name),
            inputs=(scores, *shown, Path("launch/moving_digits/report.html.j2")),
            outputs=(plan.page, output / "poster.gif"),
            after=BEFORE_PAGE,
        ),
    ]


def _sample(plan: Plan, size: Size, name: str, count: int) -> tuple[str, ...]:
    task, captions = SAMPLES[name]
    prompts = ("--prompts", str(plan.media / captions), "--samples", str(count))
    batch = ("--batch-size", str(size.batch_size))
    return plan.generate(task, *prompts, *size.sampling, *batch, name=folder_of(name))


def _show(plan: Plan, size: Size, task: str) -> tuple[str, ...]:
    sampling = without_guidance(size.sampling, task)
    batch = ("--batch-size", str(size.batch_size))
    return plan.generate(task, *_given(size, task, plan.media), *sampling, *batch)


def _score(plan: Plan, scores: Path) -> tuple[str, ...]:
    head = ("python", "-m", "launch.moving_digits.scorer", "--media", str(plan.media))
    sets = [f"{name}={plan.samples / folder_of(name)}" for name in SAMPLES]
    tokenizer = ("--vqgan", str(plan.vqgan), "--output", str(scores))
    return (*head, *tokenizer, *repeated("--samples", sets))


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
        return repeated("--sketch", [f"{image}-sketch.png" for image in images])
    if task in ("i2i", "ti2i"):
        prompt = ("--prompt", image_caption(CHANGED.digit)) if task == "ti2i" else ()
        return (*repeated("--image", [f"{image}.png" for image in images]), *LOWER_HALF, *prompt)
    clips = _held_out_clips(size, media, CHANGED.digit if task == "tv2v" else None)
    if task == "s2v":
        return repeated("--sketch", [f"{clip}.npy" for clip in clips])
    given = repeated("--clip", [f"{clip}.mp4" for clip in clips])
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


def _media(size: Size, world: World, media: Path) -> tuple[str, ...]:
    counts = ("--clips", str(size.train), "--images", str(size.train))
    held_out = ("--held-out-clips", str(size.held_out), "--held-out-images", str(size.held_out))
    sizes = world.model_dump().items()
    flags = tuple(
        word for name, value in sizes for word in (f"--{name.replace('_', '-')}", str(value))
    )
    head = ("python", "-m", "launch.moving_digits.media", "--output", str(media))
    return (*head, *counts, *held_out, *flags)


def _farm_options(world: World) -> Callable[[str], tuple[str, ...]]:
    def options(corpus: str) -> tuple[str, ...]:
        # Small enough that both MPI ranks get work from every corpus.
        shards = ("--items-per-shard", "240")
        frames = ("--frames", str(world.frames), "--fps", str(world.frames_per_second))
        return (*shards, *((*frames, "--decoder", "pyav") if corpus.endswith("clips") else ()))

    return options
