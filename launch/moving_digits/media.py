"""Write the clips, images and sketches of moving digits, with their manifests.

python -m launch.moving_digits.media --output runs/moving_digits/media
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from launch.moving_digits.handwriting import Handwriting, read_handwriting
from launch.moving_digits.motions import DIGITS, image_caption, scenes
from launch.moving_digits.world import World, anywhere, draw, path, sketch, start
from launch.workflow.media import replaced_folder
from megatron_nuwa.command_line import CommandParser, whole_number
from megatron_nuwa.config import parse_settings
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError, run_command

WORLD_FILE = "world.json"
# Clips that one ffmpeg writes, so that no command line grows too long.
_CLIPS_A_BATCH = 1000
_ENCODE_SECONDS = 600
# Lossless, one file a clip, the same bytes from the same input.
_ENCODER = (
    *("-an", "-c:v", "libx264", "-preset", "veryfast", "-qp", "0", "-pix_fmt", "yuv420p"),
    *("-threads", "1", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = CommandParser(
        prog="python -m launch.moving_digits.media",
        description="Write clips, images and sketches of handwritten digits that move.",
        example="python -m launch.moving_digits.media --output runs/moving_digits/media",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; replaced as a whole"
    )
    parser.add_argument(
        "--clips", type=whole_number(1), default=6000, help="to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=whole_number(1), default=6000, help="the same (default: %(default)s)"
    )
    parser.add_argument(
        "--held-out-clips", type=whole_number(1), default=480, help="default: %(default)s"
    )
    parser.add_argument(
        "--held-out-images", type=whole_number(1), default=480, help="default: %(default)s"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="default: %(default)s")
    for name, field in World.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=field.default, help="default: %(default)s")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    sizes = {name: getattr(options, name) for name in World.model_fields}
    world = parse_settings(World, sizes, "the options", parser.flags())
    counts = {
        "train-clips": options.clips,
        "train-images": options.images,
        "train-frames": options.images,
        "heldout-clips": options.held_out_clips,
        "heldout-images": options.held_out_images,
        "heldout-frames": options.held_out_images,
    }
    write_media(options.output, world, counts, options.seed)
    made = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{options.output}: {made}, in {time.monotonic() - begin:.1f} s")
    return 0


def write_media(output: Path, world: World, counts: Mapping[str, int], seed: int) -> None:
    """Write media, `NAME.jsonl` for each name of `counts`, lists of captions, and `world.json`.

    The folder appears as a whole or not at all. Raises `UserError` where the package with the
    digits is missing, or where `output` holds other files.
    """
    for name, count in counts.items():
        if count < 1:
            raise UserError(
                f"{name.replace('heldout', 'held-out')} must be at least 1, not {count}"
            )
    with replaced_folder(output, WORLD_FILE) as folder:
        for stream, (name, count) in enumerate(counts.items()):
            part = _Part(folder, name, count, world)
            (folder / name).mkdir()
            # A stream of its own each: more clips leave the images as they are.
            random = np.random.default_rng([seed, stream])
            write = _write_scenes if name.endswith("clips") else _write_images
            rows = write(part, random)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        for name, captions in prompt_lists().items():
            (folder / f"{name}.txt").write_text("".join(f"{caption}\n" for caption in captions))
        (folder / WORLD_FILE).write_text(world.model_dump_json(indent=2) + "\n")


def prompt_lists() -> dict[str, list[str]]:
    """The captions to generate from: of clips, held out and trained on, and of images."""
    return {
        "heldout-captions": [scene.caption for scene in scenes(held_out=True)],
        "train-captions": [scene.caption for scene in scenes(held_out=False)],
        "image-captions": [image_caption(digit) for digit in range(DIGITS)],
    }


@dataclass(frozen=True)
class _Part:
    """Items of one kind in the folder `name`, to train on or held out."""

    folder: Path
    name: str
    count: int
    world: World

    @property
    def is_held_out(self) -> bool:
        return self.name.startswith("heldout")

    def digits(self) -> Handwriting:
        """The handwriting that this part draws from."""
        return read_handwriting(self.world.digit, held_out=self.is_held_out)

    def path(self, number: int, end: str) -> Path:
        """The file of an item, such as `NAME/000007.png`."""
        return self.folder / self.name / f"{number:06d}{end}"

    def row(self, number: int, end: str, sketch_end: str, caption: str) -> dict[str, object]:
        """An item's line of the manifest."""
        return {
            "id": f"{self.name}-{number:06d}",
            "media": str(self.path(number, end).relative_to(self.folder)),
            "captions": [caption],
            "sketch": str(self.path(number, sketch_end).relative_to(self.folder)),
        }


def _write_scenes(part: _Part, random: np.random.Generator) -> list[dict[str, object]]:
    """Clips of all scenes in turn that are (not) held out, each with its sketch."""
    digits, among, world = part.digits(), scenes(held_out=part.is_held_out), part.world
    rows: list[dict[str, object]] = []
    for first in range(0, part.count, _CLIPS_A_BATCH):
        numbers = range(first, min(first + _CLIPS_A_BATCH, part.count))
        clips = []
        for number in numbers:
            scene = among[number % len(among)]
            ink = digits.random_sample(scene.digit, random)
            clips.append(draw(world, ink, path(world, scene.motion, random)))
            np.save(part.path(number, ".npy"), sketch(clips[-1], scene.digit))
            rows.append(part.row(number, ".mp4", ".npy", scene.caption))
        names = [f"{number:06d}" for number in numbers]
        write_clips(part.folder / part.name, names, np.stack(clips), world)
    return rows


def _write_images(part: _Part, random: np.random.Generator) -> list[dict[str, object]]:
    """Stills of all digits in turn, each with its sketch.

    Images are first frames of clips; "frames", for the tokenizers, show digits anywhere.
    """
    digits, world = part.digits(), part.world
    place = anywhere if part.name.endswith("frames") else start
    rows = []
    for number in range(part.count):
        digit = number % DIGITS
        [frame] = draw(world, digits.random_sample(digit, random), place(world, random)[None])
        Image.fromarray(frame).save(part.path(number, ".png"))
        Image.fromarray(sketch(frame, digit)).save(part.path(number, "-sketch.png"))
        rows.append(part.row(number, ".png", "-sketch.png", image_caption(digit)))
    return rows


def write_clips(folder: Path, names: Sequence[str], clips: np.ndarray, world: World) -> None:
    """Write grey clips uint8 (clips, frames, side, side) as NAME.mp4, by one ffmpeg."""
    frames = clips.shape[1]
    cuts = ",".join(str(frames * number) for number in range(1, len(names)))
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        command = [ffmpeg_program(), "-nostdin", "-v", "error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{world.side}x{world.side}"]
        command += ["-framerate", str(world.frames_per_second), "-i", "pipe:0", *_ENCODER]
        # Every clip begins with a key frame, where the stream is cut.
        command += ["-g", str(frames), "-keyint_min", str(frames), "-sc_threshold", "0"]
        command += ["-bf", "0", "-f", "segment", "-reset_timestamps", "1"]
        command += ["-segment_format_options", "fflags=+bitexact"]
        command += ["-segment_frames", cuts] if cuts else ["-segment_time", "1000000"]
        command += [str(Path(workplace) / "%06d.mp4")]
        done = subprocess.run(
            command,
            input=clips.tobytes(),
            capture_output=True,
            timeout=_ENCODE_SECONDS,
            check=False,
        )
        written = sorted(Path(workplace).iterdir())
        if done.returncode or len(written) != len(names):
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"ffmpeg could not write the clips: {' '.join(reason)}")
        for source, name in zip(written, names, strict=True):
            os.replace(source, folder / f"{name}.mp4")


if __name__ == "__main__":
    sys.exit(run_command(main))
