"""Score generated clips of moving digits: is the asked digit there, does it move as asked? Example:

python -m launch.moving_digits.scorer --media runs/moving_digits/media \\
    --vqgan runs/moving_digits/vqgan --samples held_out=runs/moving_digits/samples/held_out \\
    --output runs/moving_digits/scores.json

The digit is read by a network that was trained on the train digits, the motion from the centre of
the ink. How well the scorer itself reads is measured on real held-out clips, as they are and as the
VQ-GAN reconstructs them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from launch.moving_digits.classifier import DigitClassifier, train_classifier
from launch.moving_digits.handwriting import read_handwriting
from launch.moving_digits.media import WORLD_FILE
from launch.moving_digits.motion_reading import read_motion
from launch.moving_digits.motions import DIGITS, MOTIONS, Scene, digit_of, scene_of
from launch.moving_digits.world import World
from launch.workflow.results import read_json, read_json_lines
from megatron_nuwa.command_line import CommandParser, example_in, output_file
from megatron_nuwa.config import Settings, parse_settings
from megatron_nuwa.decoders import DecodeSettings, decode
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan

# The quantile of the normal distribution for intervals of 95 %.
_QUANTILE = 1.96
_RECONSTRUCTED_AT_ONCE = 256


class Share(Settings):
    """How many of how many were right."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """The share, 0 where nothing was asked."""
        return self.right / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 % for the share."""
        if not self.of:
            return 0.0, 1.0
        square = _QUANTILE**2 / self.of
        middle = (self.value + square / 2) / (1 + square)
        width = math.sqrt(self.value * (1 - self.value) * square + square**2 / 4) / (1 + square)
        return max(0.0, middle - width), min(1.0, middle + width)


class Reading(Settings):
    """What was asked of one sample and what was read there; images have no motion."""

    file: str
    caption: str
    digit: int
    motion: tuple[str, str] | None
    read_digit: int
    # The share of the sample's frames in which that digit is read from the frame alone.
    agreement: float
    read_motion: tuple[str, str] | None

    @property
    def digit_is_right(self) -> bool:
        """Whether the asked digit was read."""
        return self.read_digit == self.digit

    @property
    def motion_is_right(self) -> bool:
        """Whether every step went the asked way."""
        return self.motion is not None and self.read_motion == self.motion


class Score(Settings):
    """All readings of one set of samples."""

    name: str
    readings: list[Reading]

    @property
    def digit(self) -> Share:
        """Samples with the right digit."""
        return self._share([reading.digit_is_right for reading in self.readings])

    @property
    def motion(self) -> Share:
        """Clips with the right motion."""
        return self._share([r.motion_is_right for r in self.readings if r.motion is not None])

    @property
    def both(self) -> Share:
        """Clips with the right digit and the right motion."""
        right = [r.digit_is_right and r.motion_is_right for r in self.readings if r.motion]
        return self._share(right)

    def _share(self, right: list[bool]) -> Share:
        return Share(right=sum(right), of=len(right))


class Scores(Settings):
    """The scorer's own reading of real clips, and the samples'."""

    real: Score
    reconstructed: Score
    samples: list[Score]


@dataclass(frozen=True)
class Scorer:
    """Reads clips and images of one world."""

    world: World
    classifier: DigitClassifier

    def read(self, file: str, frames: np.ndarray, caption: str) -> Reading:
        """Read a sample's frames uint8 (frames, side, side, 3); one frame is an image."""
        scene: Scene | None = None if len(frames) == 1 else scene_of(caption)
        digit = digit_of(caption) if scene is None else scene.digit
        chances = self.classifier.read(frames)
        read_digit = int(chances.sum(0).argmax())
        return Reading(
            file=file,
            caption=caption,
            digit=digit,
            motion=None if scene is None else scene.motion,
            read_digit=read_digit,
            agreement=float((chances.argmax(1) == read_digit).mean()),
            read_motion=None if scene is None else read_motion(frames, self.world).motion,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = CommandParser(
        prog="python -m launch.moving_digits.scorer",
        description="Score generated clips and images of moving digits.",
        example=example_in(__doc__),
    )
    parser.add_argument("--media", type=Path, required=True, help="folder of launch/…/media.py")
    parser.add_argument("--vqgan", type=Path, required=True, help="run folder or file")
    parser.add_argument(
        "--samples",
        action="append",
        required=True,
        metavar="NAME=FOLDER",
        help="a folder of launch/generate.py; may be repeated",
    )
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    folders = dict(_named(text) for text in options.samples)
    world = read_world(options.media)
    vqgan = load_vqgan(options.vqgan)
    scorer = Scorer(world, train_classifier(read_handwriting(world.digit, held_out=False), world))
    scores = score_all(scorer, options.media, vqgan, folders)
    write_text_atomically(options.output, scores.model_dump_json(indent=1) + "\n")
    Console(soft_wrap=True).print(table(scores))
    return 0


def read_world(media: Path) -> World:
    """The sizes of the media in a folder; `UserError` where it holds none."""
    path = media / WORLD_FILE
    return parse_settings(World, read_json(path), str(path))


def score_all(scorer: Scorer, media: Path, vqgan: Vqgan, folders: dict[str, Path]) -> Scores:
    """Read real held-out clips, their reconstructions, and every folder of samples."""
    real, reconstructed = [], []
    for name, frames, caption in decoded(scorer.world, _real_clips(media)):
        real.append(scorer.read(name, frames, caption))
        reconstructed.append(scorer.read(name, reconstruct(vqgan, frames), caption))
    samples = [
        Score(
            name=name,
            readings=[scorer.read(*one) for one in decoded(scorer.world, _sampled(folder))],
        )
        for name, folder in folders.items()
    ]
    return Scores(
        real=Score(name="real", readings=real),
        reconstructed=Score(name="reconstructed", readings=reconstructed),
        samples=samples,
    )


def settings_of(world: World, frames: int) -> DecodeSettings:
    """How images (one frame) and clips of the world are decoded."""
    rate = world.frames_per_second
    return DecodeSettings(image_size=world.side, frames=frames, frames_per_second=rate)


def decoded(
    world: World, items: Sequence[tuple[Path, str]]
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Path, frames uint8 (frames, side, side, 3) and caption of media, as the farm reads them."""

    def frames_of(item: tuple[Path, str]) -> np.ndarray:
        path, _ = item
        return decode(path, settings_of(world, 1 if path.suffix == ".png" else world.frames))[0]

    # Decoding is another program's work, so threads do it side by side.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (path, caption), frames in zip(items, pool.map(frames_of, items), strict=True):
            yield str(path), frames, caption


@torch.no_grad()
def reconstruct(vqgan: Vqgan, frames: np.ndarray) -> np.ndarray:
    """What the VQ-GAN makes of frames uint8 (frames, side, side, 3): the same shape."""
    parts = []
    for part in np.array_split(frames, -(-len(frames) // _RECONSTRUCTED_AT_ONCE)):
        pixels = torch.tensor(part).float().permute(0, 3, 1, 2) / 127.5 - 1
        levels = (vqgan.decode(vqgan.encode(pixels)) + 1) * 127.5
        parts.append(levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def table(scores: Scores) -> Table:
    """The shares of all sets, with their intervals of 95 % and the level of chance."""
    result = Table("", "clips", "digit right", "motion right", "both right")
    own = {"real held-out clips": scores.real, "… as reconstructed": scores.reconstructed}
    for name, score in {**own, **{score.name: score for score in scores.samples}}.items():
        shares = [score.digit, score.motion, score.both]
        result.add_row(name, str(len(score.readings)), *map(share_text, shares))
    chances = (1 / DIGITS, 1 / len(MOTIONS), 1 / DIGITS / len(MOTIONS))
    result.add_row("chance", "", *(f"{chance:.1%}" for chance in chances))
    return result


def share_text(share: Share) -> str:
    """A share with its interval, as people write it."""
    if not share.of:
        return "–"
    low, high = share.interval
    return f"{share.value:.1%} ({low:.0%} to {high:.0%})"


def _named(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise UserError(f"--samples {text} must have the form NAME=FOLDER")
    return name, Path(folder)


def _real_clips(media: Path) -> list[tuple[Path, str]]:
    rows = read_json_lines(media / "heldout-clips.jsonl")
    return [(media / row["media"], row["captions"][0]) for row in rows]


def _sampled(folder: Path) -> list[tuple[Path, str]]:
    """The files and prompts of a folder of samples."""
    entries = read_json(folder / "samples.json")
    return [(folder / scored_file(folder, entry["files"]), entry["prompt"]) for entry in entries]


def scored_file(folder: Path, names: Sequence[str]) -> str:
    """The MP4 of a clip, or the PNG of an image; `UserError` where a sample has neither."""
    for ending in (".mp4", ".png"):
        for name in names:
            if name.endswith(ending):
                return name
    raise UserError(f"{folder / 'samples.json'}: a sample has neither an MP4 nor a PNG")


if __name__ == "__main__":
    sys.exit(run_command(main))
