"""The stages of the demo: their exact commands, what they read and what they leave behind."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_nuwa.errors import UserError

DEFAULT_OUTPUT = Path("runs/demo")
RECIPE = Path("launch/recipes/demo.yaml")
PROCESSES = 2
BPE_VOCABULARY = 1024
CLIP_FRAMES = 8
CLIP_FRAMES_PER_SECOND = 8

# Items per shard, small enough that both MPI ranks get work from every corpus.
CORPORA = {"train-clips": 32, "train-images": 64, "heldout-clips": 12, "heldout-images": 32}

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


@dataclass(frozen=True)
class Stage:
    """One step of the demo: commands that run one after the other, each as its own process.

    A finished stage is repeated when its commands, the bytes of `inputs`, or a new run of a stage
    in `after` differ from those of its record, or when one of `outputs` is missing. Then `clears`
    is removed first, so that nothing of an older attempt is taken up.
    """

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    clears: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def demo_stages(output: Path, accelerators: int = 0, recipe: Path = RECIPE) -> list[Stage]:
    """All stages of the demo in order, writing into `output`.

    `accelerators` is the number of GPUs of this machine; below two, everything runs on CPU cores.
    Raises `UserError` where the recipe cannot say how long pretraining is.
    """
    media, corpus = output / "media", output / "corpus"
    vqgan, sketch_vqgan = output / "vqgan", output / "sketch_vqgan"
    pretrain, samples = output / "pretrain", output / "samples"
    bpe, page = output / "bpe.json", output / "report.html"
    manifests = {name: media / f"{name}.jsonl" for name in CORPORA}
    provenance = media / "provenance.jsonl"
    corpora = tuple(corpus / name / "corpus.json" for name in CORPORA)
    overrides = recipe_overrides(output)
    processes = process_environment(accelerators)
    stop = halfway(recipe)

    def deepspeed(script: str, *extra: str) -> tuple[str, ...]:
        launcher = ("deepspeed", "--num_accelerators", str(PROCESSES))
        return (*launcher, script, str(recipe), *overrides, *extra)

    def generate(task: str, *extra: str) -> tuple[str, ...]:
        head = ("python", "launch/generate.py", task, "--run", str(pretrain))
        return (*head, *extra, *SAMPLING, "--output", str(samples / task))

    return [
        Stage(
            "media",
            "Cut captioned clips and images out of installed packages, and draw their sketches",
            (("python", "-m", "launch.demo.media", "--output", str(media)),),
            inputs=(Path("launch/demo/catalogue.yaml"), Path("demo-media.txt")),
            outputs=(provenance, media / "sketches", *manifests.values()),
        ),
        Stage(
            "vqgan",
            "Train the VQ-GAN that turns frames into tokens",
            (deepspeed("launch/train_vqgan.py"),),
            inputs=(recipe, provenance),
            outputs=(vqgan / "vqgan.safetensors", vqgan / "evaluation.json"),
            clears=(vqgan,),
            environment=processes,
        ),
        Stage(
            "sketch-vqgan",
            "Train the VQ-GAN that turns sketches into tokens",
            (deepspeed("launch/train_vqgan.py", "--section", "sketch_vqgan"),),
            inputs=(recipe, provenance),
            outputs=(sketch_vqgan / "vqgan.safetensors", sketch_vqgan / "evaluation.json"),
            clears=(sketch_vqgan,),
            environment=processes,
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
            "Turn clips, images, sketches and captions into token shards with two MPI ranks",
            tuple(
                _tokenize(name, manifests[name], corpus / name, (vqgan, sketch_vqgan, bpe))
                for name in CORPORA
            ),
            inputs=(
                provenance,
                *manifests.values(),
                vqgan / "vqgan.safetensors",
                sketch_vqgan / "vqgan.safetensors",
                bpe,
            ),
            outputs=corpora,
            clears=(corpus,),
            environment={**processes, **mpi_environment()},
        ),
        Stage(
            "pretrain",
            f"Pretrain with two processes and stop on purpose at step {stop}",
            (deepspeed("launch/pretrain.py", f"training.stop_at_step={stop}"),),
            inputs=(recipe, *corpora),
            outputs=(pretrain / "recipe.yaml", pretrain / "log.jsonl"),
            clears=(pretrain,),
            environment=processes,
        ),
        Stage(
            "resume",
            "Resume from the checkpoint and train to the end",
            (deepspeed("launch/pretrain.py"),),
            inputs=(recipe, *corpora),
            outputs=(pretrain / "evaluation.json",),
            after=("pretrain",),
            environment=processes,
        ),
        Stage(
            "generate",
            "Generate with all eight tasks, from texts and from what was held out",
            tuple(generate(task, *_starts(task, media)) for task in TASKS),
            inputs=(provenance, *corpora),
            outputs=tuple(samples / task / "samples.json" for task in TASKS),
            clears=(samples,),
            after=("resume",),
            environment=processes,
        ),
        Stage(
            "report",
            "Write the report page",
            (("python", "-m", "launch.demo.report", str(output)),),
            inputs=(
                vqgan / "evaluation.json",
                pretrain / "evaluation.json",
                *(samples / task / "samples.json" for task in TASKS),
                Path("launch/demo/report.html.j2"),
            ),
            outputs=(page,),
            after=(
                *("media", "vqgan", "sketch-vqgan", "bpe", "tokenize"),
                *("pretrain", "resume", "generate"),
            ),
            environment=processes,
        ),
    ]


def recipe_overrides(output: Path) -> tuple[str, ...]:
    """Recipe fields that move the demo from `runs/demo` to another folder."""
    if output == DEFAULT_OUTPUT:
        return ()
    media, corpus = output / "media", output / "corpus"

    def listed(*paths: Path) -> str:
        return "[" + ", ".join(str(path) for path in paths) + "]"

    train = {"images": corpus / "train-images", "clips": corpus / "train-clips"}
    heldout = {"images": corpus / "heldout-images", "clips": corpus / "heldout-clips"}
    kinds = {"t2i": "images", "v2v": "clips", "t2v": "clips", "s2i": "images", "s2v": "clips"}
    manifests = {
        "train": listed(media / "train-clips.jsonl", media / "train-images.jsonl"),
        "held_out": listed(media / "heldout-clips.jsonl", media / "heldout-images.jsonl"),
    }
    return (
        f"run={output / 'pretrain'}",
        *(f"{section}.run={output / section}" for section in ("vqgan", "sketch_vqgan")),
        *(
            f"{section}.data.{side}={paths}"
            for section in ("vqgan", "sketch_vqgan")
            for side, paths in manifests.items()
        ),
        f"tokenizers.vqgan={output / 'vqgan'}",
        f"tokenizers.sketch_vqgan={output / 'sketch_vqgan'}",
        f"tokenizers.bpe={output / 'bpe.json'}",
        *(f"data.tasks.{task}.corpora={listed(train[kind])}" for task, kind in kinds.items()),
        *(f"evaluation.corpora.{task}={listed(heldout[kind])}" for task, kind in kinds.items()),
    )


def halfway(recipe: Path) -> int:
    """The step at which pretraining is stopped on purpose: half of the recipe's steps."""
    try:
        steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["schedule"]["steps"]
        return max(1, int(steps) // 2)
    except OSError as error:
        raise UserError(f"recipe {recipe} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"recipe {recipe} must set schedule.steps to a number") from error


def _train_bpe(manifests: dict[str, Path], bpe: Path) -> tuple[str, ...]:
    sources = (str(manifests["train-clips"]), str(manifests["train-images"]))
    size = ("--vocabulary-size", str(BPE_VOCABULARY))
    return ("python", "-m", "preprocessing", "train-bpe", *sources, "--output", str(bpe), *size)


def _tokenize(
    name: str, manifest: Path, corpus: Path, tokenizers: tuple[Path, Path, Path]
) -> tuple[str, ...]:
    # Open MPI pins each of two ranks to one core unless told otherwise, which throttles ffmpeg.
    launcher = ("mpirun", "-n", str(PROCESSES), "--bind-to", "none", "--oversubscribe")
    command = ("python", "-m", "preprocessing", "tokenize", str(manifest), "--output", str(corpus))
    options = ("--vqgan", "--sketch-vqgan", "--bpe")
    named = tuple(part for pair in zip(options, map(str, tokenizers), strict=True) for part in pair)
    shards = ("--items-per-shard", str(CORPORA[name]))
    frames = ("--frames", str(CLIP_FRAMES), "--fps", str(CLIP_FRAMES_PER_SECOND))
    return (*launcher, *command, *named, *shards, *(frames if "clips" in name else ()))


def _starts(task: str, media: Path) -> tuple[str, ...]:
    """What `launch/generate.py` is given for a task of the demo."""

    def files(flag: str, folder: str, names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
        return _repeat(flag, [str(media / folder / f"{name}{suffix}") for name in names])

    changes = (*_repeat("--prompt", CHANGES), "--region", HALF, *GUIDANCE)
    starts = {
        "t2i": (*_repeat("--prompt", IMAGE_PROMPTS), *GUIDANCE),
        "t2v": (*_repeat("--prompt", CLIP_PROMPTS), *GUIDANCE),
        "s2i": files("--sketch", "sketches", SKETCHED_IMAGES, ".png"),
        "s2v": files("--sketch", "sketches", CONTINUED_CLIPS, ".gif"),
        "i2i": (*files("--image", "images", HALVED_IMAGES, ".jpg"), "--region", HALF),
        "v2v": (*files("--clip", "clips", CONTINUED_CLIPS, ".mp4"), "--keep-frames", "1"),
        "ti2i": (*files("--image", "images", CHANGED_IMAGES, ".jpg"), *changes),
        "tv2v": (*files("--clip", "clips", CHANGED_CLIPS, ".mp4"), *changes),
    }
    return starts[task]


def _repeat(flag: str, values: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (flag, value))


def process_environment(accelerators: int) -> dict[str, str]:
    """Variables of a command that starts two processes on a machine with so many GPUs."""
    if accelerators >= PROCESSES:
        return {}
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if accelerators:
        # One GPU cannot serve two processes of an NCCL group.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def mpi_environment() -> dict[str, str]:
    """Variables of a command that starts with mpirun."""
    # Open MPI refuses to start as root, the usual user of a container, without these two.
    if os.geteuid() != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def count_accelerators() -> int:
    """Number of NVIDIA GPUs, asked of torch only where a driver is installed."""
    if shutil.which("nvidia-smi") is None:
        return 0
    import torch

    return torch.cuda.device_count()
