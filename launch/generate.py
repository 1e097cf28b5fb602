"""Generate images and clips from a trained run, by any of the eight tasks. Examples:

python launch/generate.py t2i --run RUN --prompt "a rocket" --samples 4 --guidance 3
python launch/generate.py s2i --run RUN --sketch map.png
python launch/generate.py i2i --run RUN --image photo.jpg --region 0.5,0,1,1
python launch/generate.py ti2i --run RUN --image photo.jpg --mask mask.png --prompt "a red door"
python launch/generate.py t2v --run RUN --prompt "a dog runs" --prompt "a cat sleeps" --frames 30
python launch/generate.py s2v --run RUN --sketch maps.npy
python launch/generate.py v2v --run RUN --clip my.mp4 --keep-frames 2
python launch/generate.py tv2v --run RUN --clip my.mp4 --region 0,0,0.5,1 --region-frames 3:8 \\
    --prompt "the boat turns red"

Regions and masks say what is made new, in the pixels of the given file; a token's cell is made new
if the region touches it, and every other token stays as it is. The folder that is written holds the
files, sheet.png, samples.json and index.html, a page to look at. Each batch is written when it is
done, so that a call that ends early leaves the samples it has finished.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_nuwa.command_line import CommandParser, example_in, whole_number
from megatron_nuwa.data.text import NO_CAPTION
from megatron_nuwa.decoders import MediaKind
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.generation.given import read_given, read_given_sketch, read_region, read_texts
from megatron_nuwa.generation.outputs import check_free, origin_of, sample_writer
from megatron_nuwa.generation.ranking import ClipRanker, best_samples
from megatron_nuwa.generation.regions import composite
from megatron_nuwa.generation.reserved import ReservedFolder, reserve, reserve_new
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import (
    TASKS,
    Request,
    Sample,
    Task,
    generate,
    grid_of,
    prepare,
    task_named,
)
from megatron_nuwa.generation.trained import Generator, open_generator
from megatron_nuwa.training.trained_model import home_of


@dataclass(frozen=True)
class Start:
    """What one row of the gallery starts from, and how it is named in the files."""

    origin: dict[str, object]
    pixels: np.ndarray | None = None
    region: np.ndarray | None = None
    sketch: np.ndarray | None = None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python launch/generate.py",
        description="Generate images (PNG) and clips (GIF, MP4) from a trained run.\n\ntasks:\n"
        f"{_task_list()}",
        example=example_in(__doc__),
    )
    parser.add_argument("task", metavar="TASK", help=f"one of {', '.join(TASKS)}")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a pretraining run, or a checkpoint")
    source.add_argument("--model", type=Path, metavar="FILE", help="a file of launch/export.py")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the files, where they take the place of an earlier call's when all are "
        "there (default: RUN/generated/TASK, or TASK-2 and so on where that is there already)",
    )

    given = parser.add_argument_group("what it starts from; texts and files may be repeated")
    text = {"action": "append", "default": []}
    files = {**text, "type": Path, "metavar": "FILE"}
    given.add_argument("--prompt", **text, help="text")
    given.add_argument("--prompts", **files, help="a file with one text a line")
    given.add_argument("--image", **files, help="to complete or change; the first frame for v2v")
    given.add_argument("--clip", **files, help="to continue or change")
    given.add_argument("--sketch", **files, help="PNG, GIF or .npy of class numbers")
    given.add_argument(
        "--sketch-unlabelled",
        type=whole_number(0),
        metavar="N",
        help="a sketch's pixels of this value become the last class, as in the corpus",
    )
    given.add_argument(
        "--fit",
        choices=("crop", "exact"),
        default="crop",
        help="a larger image or sketch is scaled and centre-cropped (crop, default) or refused "
        "(exact)",
    )

    new = parser.add_argument_group("what is made new")
    new.add_argument(
        "--region", metavar="X0,Y0,X1,Y1", help="a rectangle in pixels, or in fractions up to 1"
    )
    new.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white is made new: an image, or for a clip also an animation or .npy",
    )
    new.add_argument(
        "--region-frames", metavar="A:B", help="only in frames A to B − 1, counted from 0"
    )
    new.add_argument(
        "--keep-frames", type=whole_number(1), metavar="N", help="v2v: frames given (default 1)"
    )
    new.add_argument(
        "--keep-pixels",
        action="store_true",
        help="put the given file's own pixels back outside the region, in place of its tokens'",
    )

    how = parser.add_argument_group("how tokens are drawn")
    how.add_argument(
        "--samples", type=whole_number(1), default=1, help="samples of each (default 1)"
    )
    how.add_argument(
        "--seed",
        type=whole_number(0, 2**63 - 1),
        default=0,
        help="seed of the first sample (default 0)",
    )
    how.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)"
    )
    how.add_argument("--top-k", type=int, help="draw among the k likeliest tokens (default: all)")
    how.add_argument(
        "--top-p", type=float, help="draw among the likeliest of this total mass (default: all)"
    )
    how.add_argument(
        "--guidance", type=float, default=1.0, help="towards the text; 1 is none (default 1)"
    )
    how.add_argument(
        "--frames", type=whole_number(1), help="length of a clip (default: the model's own)"
    )
    how.add_argument(
        "--overlap",
        type=whole_number(1),
        help="frames that a sliding window takes along (default: half)",
    )
    how.add_argument(
        "--best-of",
        type=whole_number(1),
        metavar="N",
        help="draw N and keep the best --samples by CLIP",
    )
    how.add_argument("--clip-weights", type=Path, metavar="FILE", help="CLIP, for --best-of")
    how.add_argument(
        "--clip-architecture",
        default="ViT-B-32",
        help="open_clip's name of it; OpenAI's weights are meant for those that end in -quickgelu, "
        "such as ViT-B-32-quickgelu (default %(default)s)",
    )
    how.add_argument(
        "--batch-size", type=whole_number(1), default=8, help="samples at once (default 8)"
    )
    return parser.parse_args()


def main() -> None:
    """Generate what the command line asks for."""
    arguments = parse_arguments()
    task = task_named(arguments.task)
    prompts = list(arguments.prompt)
    for path in arguments.prompts:
        prompts += read_texts(path)
    check_arguments(arguments, task, prompts)
    try:
        settings = SamplingSettings(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.guidance
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    if arguments.output is not None:
        place = reserve(arguments.output)
    else:
        source = arguments.run or arguments.model
        if not source.exists():
            raise UserError(f"{'--run' if arguments.run else '--model'}: {source} does not exist")
        # Not in a checkpoint, which a training deletes when newer ones replace it.
        place = reserve_new(home_of(source) / "generated" / task.name)
    with place:
        check_free(place.folder, samples_asked(arguments, prompts))
        generate_into(place, arguments, task, prompts, settings)


def generate_into(
    place: ReservedFolder,
    arguments: argparse.Namespace,
    task: Task,
    prompts: Sequence[str],
    settings: SamplingSettings,
) -> None:
    """Sample, rank and write."""
    source = arguments.run or arguments.model
    generator = open_generator(source, "--run" if arguments.run else "--model").for_task(task.name)
    ranker = None
    if arguments.best_of is not None:
        weights, architecture = arguments.clip_weights, arguments.clip_architecture
        ranker = ClipRanker.load(weights, architecture, generator.device)
    drawn = arguments.best_of or arguments.samples
    requests, origins = [], []
    for start, prompt, number in itertools.product(
        read_starts(arguments, task, generator), prompts or [NO_CAPTION], range(drawn)
    ):
        seed = arguments.seed + number
        requests.append(Request(task, seed, prompt, start.pixels, start.region, start.sketch))
        origin = origin_of(generator, requests[-1], settings)
        origins.append(origin | length_of(arguments) | {"run": str(source)} | start.origin)
    asked = len(requests) // drawn * arguments.samples
    classes = 0 if generator.sketch_vqgan is None else generator.sketch_vqgan.config.classes or 0
    with sample_writer(place, asked, generator.frames_per_second, classes) as writer:
        rows = zip(requests, origins, strict=True)
        waiting: list[Sample] = []

        def keep(clips: Sequence[np.ndarray]) -> None:
            for clip, (request, origin) in zip(clips, rows, strict=False):
                if arguments.keep_pixels:
                    clip = composite(clip, request.pixels, request.region)
                waiting.append(Sample(request, clip, origin))
            # Those that compete for a place are ranked together.
            whole = len(waiting) if ranker is None else len(waiting) // drawn * drawn
            ready, waiting[:] = waiting[:whole], waiting[whole:]
            if ranker is not None:
                name = arguments.clip_architecture
                ready = best_samples(ready, drawn, arguments.samples, ranker, name)
            if ready:
                writer.add(ready)

        sample(generator, requests, settings, arguments, keep)
    noun = f"{task.target}{'' if asked == 1 else 's'}"
    output = place.folder
    print(f"wrote {asked} {noun} to {output}; look at {output / 'index.html'}")


def check_arguments(arguments: argparse.Namespace, task: Task, prompts: Sequence[str]) -> None:
    """`UserError` for arguments that do not belong to the task, and for those that are missing."""
    unlabelled = arguments.sketch_unlabelled
    media = {"image": bool(arguments.image), "clip": bool(arguments.clip)}
    # A picture is as good a first frame as a clip.
    wants = {task.media, "image" if task.given == "frames" else None} - {None}
    has_region = bool(arguments.region or arguments.mask or arguments.region_frames)
    is_video_region = task.given == "region" and task.target == "clip"
    for name, is_there, belongs, is_needed in (
        ("prompt", bool(prompts), task.reads == "text", True),
        ("sketch", bool(arguments.sketch), task.reads == "sketch", True),
        ("sketch-unlabelled", unlabelled is not None, task.reads == "sketch", False),
        ("image", media["image"], "image" in wants, wants == {"image"}),
        ("clip", media["clip"], "clip" in wants, not media["image"]),
        ("region", bool(arguments.region), task.given == "region", False),
        ("mask", bool(arguments.mask), task.given == "region", False),
        ("region-frames", bool(arguments.region_frames), is_video_region, False),
        ("keep-frames", arguments.keep_frames is not None, task.given == "frames", False),
        ("keep-pixels", arguments.keep_pixels, task.given == "region", False),
        ("guidance", arguments.guidance != 1, task.reads != "none", False),
        ("frames", arguments.frames is not None, task.target == "clip", False),
        ("overlap", arguments.overlap is not None, task.target == "clip", False),
        ("best-of", arguments.best_of is not None, task.reads == "text", False),
    ):
        if is_there and not belongs:
            raise UserError(f"task {task.name} ({task.title}) takes no --{name}")
        if belongs and is_needed and not is_there:
            raise UserError(f"task {task.name} ({task.title}) needs --{name}")
    if task.given == "region" and not has_region:
        raise UserError(f"task {task.name} needs --region or --mask, which say what is made new")
    if (arguments.best_of is None) != (arguments.clip_weights is None):
        raise UserError("--best-of ranks by CLIP: give it and --clip-weights together")
    if arguments.best_of is not None and arguments.best_of < arguments.samples:
        raise UserError(f"--best-of {arguments.best_of} cannot yield --samples {arguments.samples}")
    if arguments.region and arguments.mask:
        raise UserError("--region and --mask say the same: give one of them")


def samples_asked(arguments: argparse.Namespace, prompts: Sequence[str]) -> int:
    """How many samples there will be."""
    starts = len(arguments.sketch) + len(arguments.image) + len(arguments.clip)
    return max(1, starts) * max(1, len(prompts)) * arguments.samples


def read_starts(arguments: argparse.Namespace, task: Task, generator: Generator) -> list[Start]:
    """What each row of samples starts from; one that starts from nothing where nothing is given."""
    length = arguments.frames or grid_of(generator, task).s
    if task.reads == "sketch":
        return [_read_sketch(path, generator, length, arguments) for path in arguments.sketch]
    if task.given == "nothing":
        return [Start({})]
    keep = arguments.keep_frames or 1
    if task.given == "frames" and keep >= length:
        raise UserError(
            f"--keep-frames {keep} leaves nothing to generate in a clip of {length} frames"
        )
    if keep > 1 and arguments.image:
        raise UserError(f"--image is one frame, and --keep-frames {keep} wants more: give a --clip")
    frames = keep if task.given == "frames" else length
    starts = []
    media: list[tuple[Path, MediaKind, int]] = [
        *((path, "image", 1) for path in arguments.image),
        *((path, "clip", frames) for path in arguments.clip),
    ]
    for path, kind, count in media:
        size, rate = generator.picture_size, generator.frames_per_second
        given = read_given(path, kind, size, count, rate, arguments.fit)
        origin: dict[str, object] = {"given": str(path)}
        if task.given == "frames":
            starts.append(Start(origin | {"keep_frames": count}, given.frames))
            continue
        for name in ("region", "mask", "region_frames", "keep_pixels"):
            if getattr(arguments, name):
                value = getattr(arguments, name)
                origin[name] = str(value) if isinstance(value, Path) else value
        shape = arguments.region, arguments.mask, arguments.region_frames
        starts.append(Start(origin, given.frames, read_region(given, size, *shape)))
    return starts


def _read_sketch(
    path: Path, generator: Generator, frames: int, arguments: argparse.Namespace
) -> Start:
    if generator.sketch_vqgan is None:
        raise UserError(
            f"--sketch {path}: the model was not trained on sketches, so it cannot read one"
        )
    config, unlabelled = generator.sketch_vqgan.config, arguments.sketch_unlabelled
    maps = read_given_sketch(
        path,
        config.image_size,
        config.classes or 0,
        frames,
        arguments.fit,
        unlabelled,
        generator.frames_per_second,
    )
    origin: dict[str, object] = {"sketch": str(path)}
    if unlabelled is not None:
        origin["sketch_unlabelled"] = unlabelled
    return Start(origin, sketch=maps)


def sample(
    generator: Generator,
    requests: Sequence[Request],
    settings: SamplingSettings,
    arguments: argparse.Namespace,
    keep: Callable[[Sequence[np.ndarray]], None],
) -> None:
    """Have `keep` take the pixels, uint8 (frames, rows, columns, 3), of each batch of requests."""
    size, length = arguments.batch_size, (arguments.frames, arguments.overlap)
    # All of them are looked at before the first one is generated.
    batches = [
        prepare(generator, requests[start : start + size], *length)
        for start in range(0, len(requests), size)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("tokens"), TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=sum(batch.grid.cells for batch in batches))
        for number, batch in enumerate(batches, start=1):
            progress.update(bar, description=f"batch {number} of {len(batches)}")
            tokens = generate(generator, batch, settings, on_token=lambda: progress.advance(bar))
            keep(generator.pixels(tokens, batch.grid))


def length_of(arguments: argparse.Namespace) -> dict[str, object]:
    """What was asked of a clip's length, for the files."""
    asked = {"frames": arguments.frames, "overlap": arguments.overlap}
    return {name: value for name, value in asked.items() if value is not None}


def _task_list() -> str:
    return "\n".join(f"  {task.name:5} {task.title}" for task in TASKS.values())


if __name__ == "__main__":
    # Told to end, it puts in order what it leaves.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(run_command(main))
