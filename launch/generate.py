"""Generate images and clips from a trained run. Examples:

python launch/generate.py t2i --run runs/demo/pretrain --prompt "a rocket" --samples 4
python launch/generate.py v2v --run runs/demo/pretrain --clip my.mp4 --keep-frames 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from megatron_nuwa.data.text import NO_CAPTION
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.generation.media import contact_sheet, write_gif, write_mp4, write_png
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.trained import Generator, open_generator
from megatron_nuwa.grid import Grid
from preprocessing.decoders import DecodeSettings, decode_clip

TASKS = ("t2i", "s2i", "i2i", "ti2i", "t2v", "s2v", "v2v", "tv2v")
READY = ("t2i", "t2v", "v2v")


@dataclass(frozen=True)
class Request:
    """One thing to generate: its prompt, its seed, and the clip whose beginning is given."""

    prompt: str
    seed: int
    clip: Path | None = None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python launch/generate.py",
        description="Generate images (PNG) and clips (GIF, MP4) from a trained run.",
        epilog=f"examples:{__doc__.split(':', 1)[1]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", metavar="TASK", choices=TASKS, help=f"one of {', '.join(READY)} for now"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a pretraining run")
    source.add_argument("--model", type=Path, metavar="FILE", help="a file of launch/export.py")
    parser.add_argument("--prompt", action="append", default=[], help="text; may be repeated")
    parser.add_argument(
        "--clip", type=Path, action="append", default=[], help="v2v: video to continue; repeatable"
    )
    parser.add_argument(
        "--keep-frames", type=int, default=1, help="v2v: frames taken from the clip (default 1)"
    )
    parser.add_argument("--samples", type=int, default=1, help="samples a prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample (default 0)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest of this total mass")
    parser.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="samples at once (default 8)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the files (default RUN/generated/TASK; generated/TASK beside FILE)",
    )
    return parser.parse_args()


def main() -> None:
    """Generate what the command line asks for."""
    arguments = parse_arguments()
    requests = read_requests(arguments)
    try:
        settings = SamplingSettings(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.guidance
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    source, field = (
        (arguments.run, "--run") if arguments.model is None else (arguments.model, "--model")
    )
    generator = open_generator(source, field)
    grid = generator.image_grid if arguments.task == "t2i" else generator.clip_grid
    for request in requests:
        generator.bpe.encode(request.prompt)
    known, is_known = read_known(generator, grid, requests, arguments.keep_frames)
    clips = sample(generator, grid, requests, settings, known, is_known, arguments.batch_size)
    folder = source if source.is_dir() else source.parent
    output = arguments.output or folder / "generated" / arguments.task
    write_files(output, arguments, settings, requests, clips, generator.frames_per_second)
    print(f"wrote {len(clips)} {'images' if grid.s == 1 else 'clips'} to {output}")


def read_requests(arguments: argparse.Namespace) -> list[Request]:
    """One request a sample; `UserError` for arguments that do not belong to the task."""
    task = arguments.task
    if task not in READY:
        raise UserError(f"task {task} is not available yet; available are {', '.join(READY)}")
    for name in ("samples", "batch_size", "keep_frames"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")
    wanted, other = ("clip", "prompt") if task == "v2v" else ("prompt", "clip")
    if not getattr(arguments, wanted):
        raise UserError(f"task {task} needs --{wanted}")
    if getattr(arguments, other):
        raise UserError(f"task {task} takes --{wanted}, not --{other}")
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    if task == "v2v":
        return [Request(NO_CAPTION, seed, clip) for clip in arguments.clip for seed in seeds]
    return [Request(prompt, seed) for prompt in arguments.prompt for seed in seeds]


def read_known(
    generator: Generator, grid: Grid, requests: list[Request], keep_frames: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Tokens of the given frames, (requests, cells), and which cells they fill."""
    if requests[0].clip is None:
        return None, None
    if keep_frames >= grid.s:
        raise UserError(
            f"--keep-frames {keep_frames} leaves nothing to generate in a clip of {grid.s} frames"
        )
    settings = DecodeSettings(
        image_size=generator.vqgan.config.image_size,
        frames=keep_frames,
        frames_per_second=generator.frames_per_second,
    )
    cells = keep_frames * grid.h * grid.w
    known = torch.zeros(len(requests), grid.cells, dtype=torch.int64, device=generator.device)
    for row, request in enumerate(requests):
        assert request.clip is not None
        frames, _ = decode_clip(request.clip, settings)
        known[row, :cells] = generator.encode_frames(frames)
    return known, torch.arange(grid.cells) < cells


def sample(
    generator: Generator,
    grid: Grid,
    requests: list[Request],
    settings: SamplingSettings,
    known: torch.Tensor | None,
    is_known: torch.Tensor | None,
    batch_size: int,
) -> np.ndarray:
    """Pixels uint8 (requests, frames, rows, columns, 3)."""
    clips = []
    starts = range(0, len(requests), batch_size)
    with Progress() as progress:
        bar = progress.add_task("tokens", total=len(starts) * grid.cells)
        for start in starts:
            part = requests[start : start + batch_size]
            tokens = generator.generate(
                [request.prompt for request in part],
                grid,
                [request.seed for request in part],
                settings,
                known=None if known is None else known[start : start + batch_size],
                is_known=is_known,
                on_token=lambda: progress.advance(bar),
            )
            clips.append(generator.pixels(tokens, grid))
    return np.concatenate(clips)


def write_files(
    output: Path,
    arguments: argparse.Namespace,
    settings: SamplingSettings,
    requests: list[Request],
    clips: np.ndarray,
    frames_per_second: float,
) -> None:
    """Write every sample, a contact sheet and samples.json, aside first and then all at once."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".generate.") as name:
        folder = Path(name) / "files"
        folder.mkdir()
        entries = []
        for number, (request, clip) in enumerate(zip(requests, clips, strict=True)):
            origin: dict[str, object] = {
                "task": arguments.task,
                "prompt": request.prompt,
                "seed": request.seed,
                **asdict(settings),
                "run": str(arguments.run or arguments.model),
            }
            if request.clip is not None:
                origin |= {"given": str(request.clip), "keep_frames": arguments.keep_frames}
            stem = folder / f"{number:04d}"
            if len(clip) == 1:
                write_png(stem.with_suffix(".png"), clip[0], origin)
            else:
                write_gif(stem.with_suffix(".gif"), clip, frames_per_second, origin)
                write_mp4(stem.with_suffix(".mp4"), clip, frames_per_second, origin)
            files = sorted(path.name for path in folder.glob(f"{number:04d}.*"))
            entries.append({**origin, "files": files})
        write_png(folder / "sheet.png", contact_sheet(clips), {"task": arguments.task})
        (folder / "samples.json").write_text(json.dumps(entries, indent=2))
        output.mkdir(exist_ok=True)
        for path in folder.iterdir():
            shutil.move(path, output / path.name)


if __name__ == "__main__":
    sys.exit(run_command(main))
