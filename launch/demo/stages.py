"""The stages of the demo: their exact commands, what they read and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import yaml

from launch.workflow.plan import CORPORA, TOKEN_STAGES, Plan, moved, repeated
from launch.workflow.stage import Stage, process_environment
from megatron_nuwa.errors import UserError

DEFAULT_OUTPUT = Path("runs/demo")
RECIPE = Path("launch/recipes/demo.yaml")
CLIP_FRAMES = 8
CLIP_FRAMES_PER_SECOND = 8

# Items per shard, small enough that both MPI ranks get work from every corpus.
ITEMS_PER_SHARD = dict(zip(CORPORA, (32, 64, 12, 32), strict=True))

SAMPLING = ("--temperature", "0.8", "--top-k", "32", "--seed", "1")
GUIDANCE = ("--guidance", "3")
IMAGE_PROMPTS = (
    "a ginger cat looks to the right",
    "an orange dahlia in front of dark green leaves",
    "a red motorcycle stands in a garage",
    "the golden eiffel tower against a blue evening sky",
    "a white rocket stands on its launch pad at dusk",
    "a lion with a dark mane lies on a rock",
)
CLIP_PROMPTS = (
    "a big grey rabbit stretches its arms and yawns in front of its burrow",
    "the lights of the united states shine on the dark globe",
    "a young man in a suit with a red bow tie talks in a car",
    "cars drive past a green railing in a city street",
)
# Held-out clips whose first frame is given to the model.
CONTINUED_CLIPS = (
    "rabbit-scene-04080",
    "globe-whole-27000",
    "passenger-man-02870",
    "street-centre-08600",
)
# Held-out images and clips of which half is made new, the same text or another one in its place.
HALVED_IMAGES = (
    "globe-whole-27000-still",
    "rabbit-scene-04080-still",
    "cheetah-0-0-256",
    "street-centre-08600-still",
)
HALF = "0.5,0,1,1"
CHANGED_IMAGES = ("rabbit-scene-04080-still", "street-centre-08600-still")
CHANGED_CLIPS = ("rabbit-scene-04080", "street-centre-08600")
CHANGES = (
    "the lights of the united states shine on the dark globe",
    "a young man in a suit with a red bow tie talks in a car",
)
SKETCHED_IMAGES = (
    "globe-whole-27000-still",
    "rabbit-scene-04080-still",
    "passenger-man-02870-still",
    "cheetah-0-0-256",
)
TASKS = ("t2i", "t2v", "s2i", "s2v", "i2i", "v2v", "ti2i", "tv2v")
# The stages whose times and commands the page shows.
BEFORE_PAGE = ("media", *TOKEN_STAGES, "pretrain", "resume", "generate")


def demo_stages(output: Path, accelerators: int = 0, recipe: Path = RECIPE) -> list[Stage]:
    """All stages of the demo in order, writing into `output`.

    `accelerators` is the number of GPUs of this machine; below two, everything runs on CPU cores.
    Raises `UserError` where the recipe cannot say how long pretraining is.
    """
    stop = halfway(recipe)
    plan = Plan(
        recipe,
        output,
        tuple(moved(recipe, DEFAULT_OUTPUT, output)),
        environment=process_environment(accelerators),
    )
    provenance = plan.media / "provenance.jsonl"
    samples = tuple(plan.samples / task / "samples.json" for task in TASKS)
    return [
        Stage(
            "media",
            "Cut captioned clips and images out of installed packages, and draw their sketches",
            (("python", "-m", "launch.demo.media", "--output", str(plan.media)),),
            inputs=(Path("launch/demo/catalogue.yaml"), Path("demo-media.txt")),
            outputs=(provenance, plan.media / "sketches", *plan.manifests.values()),
        ),
        *plan.token_stages((provenance,), _farm_options),
        plan.stage(
            "pretrain",
            f"Pretrain with two processes and stop on purpose at step {stop}",
            plan.deepspeed("launch/pretrain.py", f"training.stop_at_step={stop}"),
            inputs=(recipe, *plan.corpora),
            outputs=(plan.pretrain / "recipe.yaml", plan.pretrain / "log.jsonl"),
            clears=(plan.pretrain,),
        ),
        plan.stage(
            "resume",
            "Resume from the checkpoint and train to the end",
            plan.deepspeed("launch/pretrain.py"),
            inputs=(recipe, *plan.corpora),
            outputs=(plan.pretrain / "evaluation.json",),
            after=("pretrain",),
        ),
        plan.stage(
            "generate",
            "Generate with all eight tasks, from texts and from what was held out",
            *(plan.generate(task, *_starts(task, plan.media), *SAMPLING) for task in TASKS),
            inputs=(provenance, *plan.corpora),
            outputs=samples,
            clears=(plan.samples,),
            after=("resume",),
        ),
        plan.stage(
            "report",
            "Write the report page",
            ("python", "-m", "launch.demo.report", str(output)),
            inputs=(
                plan.vqgan / "evaluation.json",
                plan.pretrain / "evaluation.json",
                *samples,
                Path("launch/demo/report.html.j2"),
            ),
            outputs=(plan.page,),
            after=BEFORE_PAGE,
        ),
    ]


def halfway(recipe: Path) -> int:
    """The step at which pretraining is stopped on purpose: half of the recipe's steps."""
    try:
        steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["schedule"]["steps"]
        return max(1, int(steps) // 2)
    except OSError as error:
        raise UserError(f"recipe {recipe} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"recipe {recipe} must set schedule.steps to a number") from error


def _farm_options(corpus: str) -> tuple[str, ...]:
    shards = ("--items-per-shard", str(ITEMS_PER_SHARD[corpus]))
    frames = ("--frames", str(CLIP_FRAMES), "--fps", str(CLIP_FRAMES_PER_SECOND))
    return (*shards, *(frames if corpus.endswith("clips") else ()))


def _starts(task: str, media: Path) -> tuple[str, ...]:
    """What `launch/generate.py` is given for a task of the demo."""

    def files(flag: str, folder: str, names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
        return repeated(flag, [str(media / folder / f"{name}{suffix}") for name in names])

    changes = (*repeated("--prompt", CHANGES), "--region", HALF, *GUIDANCE)
    starts = {
        "t2i": (*repeated("--prompt", IMAGE_PROMPTS), *GUIDANCE),
        "t2v": (*repeated("--prompt", CLIP_PROMPTS), *GUIDANCE),
        "s2i": files("--sketch", "sketches", SKETCHED_IMAGES, ".png"),
        "s2v": files("--sketch", "sketches", CONTINUED_CLIPS, ".gif"),
        "i2i": (*files("--image", "images", HALVED_IMAGES, ".jpg"), "--region", HALF),
        "v2v": (*files("--clip", "clips", CONTINUED_CLIPS, ".mp4"), "--keep-frames", "1"),
        "ti2i": (*files("--image", "images", CHANGED_IMAGES, ".jpg"), *changes),
        "tv2v": (*files("--clip", "clips", CHANGED_CLIPS, ".mp4"), *changes),
    }
    return starts[task]
