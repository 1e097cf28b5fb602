"""Train a VQ-GAN, the visual tokenizer, from the `vqgan` section of a recipe. Examples:

deepspeed --num_accelerators 2 launch/train_vqgan.py launch/recipes/demo.yaml
python launch/train_vqgan.py launch/recipes/vqgan_f16.yaml vqgan.run=runs/f16 vqgan.steps=1000

With vqgan.model.classes it is VQ-GAN-Seg, trained on the 'sketch' of each item, a map of classes:

deepspeed launch/train_vqgan.py launch/recipes/vqgan_seg.yaml

A recipe that has both has VQ-GAN-Seg in its section 'sketch_vqgan':

python launch/train_vqgan.py launch/recipes/demo.yaml --section sketch_vqgan

On a machine without GPUs set DS_ACCELERATOR=cpu for the deepspeed launcher. A run that was stopped
continues from its newest checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_nuwa.command_line import CommandParser, add_local_rank, add_recipe, example_in
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.frames import MediaFrames
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import Recipe, load_recipe
from megatron_nuwa.training.vqgan_recipe import VqganRecipe
from megatron_nuwa.training.vqgan_trainer import train_vqgan
from preprocessing.decoders import (
    DecodeSettings,
    decode_clip,
    decode_image,
    decode_sketch,
    media_kind,
)
from preprocessing.sources import SourceItem, local_copy, read_manifest
from preprocessing.sources.items import Media


def main() -> None:
    """Read the arguments, join the other processes and train."""
    arguments = _arguments()
    with join_processes() as processes:
        inputs = processes.first_then_all(lambda: read_inputs(arguments))
        recipe, train, held_out = inputs.recipe, inputs.train, inputs.held_out
        train_vqgan(inputs.section, recipe, recipe.seed, processes, train, held_out)


class Inputs(NamedTuple):
    """The recipe, its section of the VQ-GAN that is trained, and the media of that."""

    recipe: Recipe
    section: VqganRecipe
    train: MediaFrames
    held_out: MediaFrames | None


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """The recipe and the media of its manifests; `UserError` for what is missing or misspelt."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.require(arguments.section)
    section: VqganRecipe = getattr(recipe, arguments.section)
    train = media_frames(section, section.data.train, "training frames")
    held_out = None
    if section.data.held_out:
        held_out = media_frames(section, section.data.held_out, "held-out frames")
    return Inputs(recipe, section, train, held_out)


class FrameDecoder:
    """Decodes manifest items, images and clips alike, to their real frames."""

    def __init__(self, recipe: VqganRecipe) -> None:
        self.clips = DecodeSettings(
            image_size=recipe.decode_size,
            frames=recipe.data.frames,
            frames_per_second=recipe.data.frames_per_second,
            short_clips="pad",
        )
        self.images = DecodeSettings(image_size=recipe.decode_size)

    def __call__(self, item: object) -> np.ndarray:
        """Frames uint8 (frames, size, size, 3); `UserError` naming a file that is broken."""
        assert isinstance(item, SourceItem)
        if media_kind(item.media) == "image":
            return decode_image(item.media, self.images)
        frames, real = decode_clip(item.media, self.clips, item.start, item.end)
        return frames[:real]


class MapDecoder:
    """Decodes the sketches of manifest items to their real maps."""

    def __init__(self, recipe: VqganRecipe) -> None:
        assert recipe.model.classes is not None
        self.classes, self.unlabelled = recipe.model.classes, recipe.data.unlabelled
        self.settings = DecodeSettings(
            image_size=recipe.decode_size,
            frames=recipe.data.frames,
            frames_per_second=recipe.data.frames_per_second,
            short_clips="pad",
        )

    def __call__(self, item: object) -> np.ndarray:
        """Maps uint8 (frames, size, size); `UserError` naming a file that is broken."""
        assert isinstance(item, SourceItem)
        assert item.sketch is not None
        with local_copy(item.sketch) as path:
            maps, real = decode_sketch(
                path, self.settings, self.classes, unlabelled=self.unlabelled
            )
        return maps[:real]


def media_frames(recipe: VqganRecipe, manifests: tuple[Path, ...], name: str) -> MediaFrames:
    """The items of several manifests with their decoder; `UserError` for a bad manifest."""
    items = [item for manifest in manifests for item in read_manifest(manifest)]
    if recipe.model.classes is not None:
        return _maps(recipe, items, manifests, name)
    decoder = FrameDecoder(recipe)
    described = [
        # A file that is replaced under the same name must be decoded again.
        (str(item.media), _size_and_time(item.media), item.start, item.end)
        for item in items
    ]
    key = f"{decoder.clips.fingerprint()} {decoder.images.fingerprint()} {described}"
    return MediaFrames(items, decoder, recipe.decode_size, key, name)


def _maps(
    recipe: VqganRecipe, items: list[SourceItem], manifests: tuple[Path, ...], name: str
) -> MediaFrames:
    """The sketches of those items that have one."""
    sketched = [item for item in items if item.sketch is not None]
    if not sketched:
        names = ", ".join(str(manifest) for manifest in manifests)
        raise UserError(
            f"{names}: no item has a 'sketch', the map of classes that a VQ-GAN with model.classes "
            "is trained on"
        )
    decoder = MapDecoder(recipe)
    described = [(str(item.sketch), _size_and_time(item.sketch)) for item in sketched]
    rules = f"{decoder.settings.fingerprint()} {decoder.classes} {decoder.unlabelled}"
    return MediaFrames(
        sketched, decoder, recipe.decode_size, f"{rules} {described}", name, are_maps=True
    )


def _size_and_time(media: Media) -> tuple[int, int] | None:
    if not isinstance(media, Path):
        return None
    try:
        status = media.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="deepspeed [launcher options] launch/train_vqgan.py",
        description="Train a VQ-GAN, the visual tokenizer, from a section of a recipe; continues "
        "from the run's newest checkpoint.",
        example=example_in(__doc__),
    )
    add_recipe(parser, "vqgan_f16.yaml", "vqgan.optimizer.learning_rate=1e-4")
    parser.add_argument(
        "--section",
        choices=("vqgan", "sketch_vqgan"),
        default="vqgan",
        help="which of the recipe's two VQ-GANs to train (default: %(default)s)",
    )
    add_local_rank(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_process(main)
