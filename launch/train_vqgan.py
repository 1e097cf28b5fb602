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
import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_nuwa.command_line import CommandParser, add_local_rank, add_recipe, example_in
from megatron_nuwa.decoders import (
    DecodeSettings,
    decode_clip,
    decode_image,
    media_kind,
)
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.stopping import StopSignals
from preprocessing.sources import (
    SourceItem,
    decode_item_sketch,
    local_copy,
    named_as_source,
    read_manifest,
)
from preprocessing.sources.items import Media, Texts
from preprocessing.sources.locations import locate, suffix

if TYPE_CHECKING:
    # Importing torch takes seconds, in which signals are taken already.
    from megatron_nuwa.training.frames import MediaFrames
    from megatron_nuwa.training.recipe import Recipe
    from megatron_nuwa.training.vqgan_recipe import VqganRecipe


def main() -> None:
    """Run one process of the training; a stop signal at any time ends it in order."""
    with StopSignals() as stop:
        _train(_arguments(), stop)


def _train(arguments: argparse.Namespace, stop: StopSignals) -> None:
    from megatron_nuwa.training.processes import join_processes
    from megatron_nuwa.training.recipe import TrainingSettings, load_recipe
    from megatron_nuwa.training.vqgan_trainer import train_vqgan
    from megatron_nuwa.training.watchdog import backend_timeout

    try:
        training = load_recipe(arguments.recipe, arguments.overrides).training
    except UserError:
        # It is told once, when the processes have met.
        training = TrainingSettings()
    with join_processes(timeout=backend_timeout(training.hang_seconds)) as processes:
        if processes.is_first:
            print(processes, flush=True)
        inputs = processes.first_then_all(lambda: read_inputs(arguments))
        recipe, train, held_out = inputs.recipe, inputs.train, inputs.held_out
        train_vqgan(inputs.section, recipe, processes, train, held_out, stop)


class Inputs(NamedTuple):
    """The recipe, its section of the VQ-GAN that is trained, and the media of that."""

    recipe: Recipe
    section: VqganRecipe
    train: MediaFrames
    held_out: MediaFrames | None


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """The recipe and the media of its manifests; `UserError` for what is missing or misspelt."""
    from megatron_nuwa.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.require(arguments.section)
    section: VqganRecipe = getattr(recipe, arguments.section)
    train = media_frames(section, section.data.train, "training frames")
    held_out = None
    if section.data.held_out:
        held_out = media_frames(section, section.data.held_out, "held-out frames")
    return Inputs(recipe, section, train, held_out)


class ManifestItems(Sequence[SourceItem]):
    """The items of manifests, one after another, read when they are asked for.

    Every process of a run and every worker of its loaders holds them, so they are small: 24
    bytes an item of a JSON-lines or CSV manifest, its paths and times of a parquet one.
    """

    def __init__(self, manifests: Sequence[Path]) -> None:
        self._parts = [_light_items(manifest) for manifest in manifests]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self._rows: Sequence[int] = range(self._ends[-1])

    def keep(self, wanted: Callable[[SourceItem], bool]) -> None:
        """Leave out all other items."""
        pairs = zip(self._rows, self, strict=True)
        self._rows = array("q", (row for row, item in pairs if wanted(item)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> SourceItem:  # type: ignore[override]
        row = self._rows[place]
        number = bisect_right(self._ends, row)
        return self._parts[number][row - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[SourceItem]:
        if len(self) == self._ends[-1]:
            # Much faster than row by row.
            return chain.from_iterable(self._parts)
        return (self[place] for place in range(len(self)))


class PackedItems(Sequence[SourceItem]):
    """Media, sketches and times of items, without their captions, in one buffer."""

    def __init__(self, items: Iterable[SourceItem]) -> None:
        self._rows = Texts(
            json.dumps([str(item.media), item.start, item.end, item.sketch and str(item.sketch)])
            for item in items
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> SourceItem:  # type: ignore[override]
        if row >= len(self):
            raise IndexError(row)
        media, start, end, sketch = json.loads(self._rows[row])
        return SourceItem("", locate(media), (), start, end, sketch and locate(sketch))


def _light_items(manifest: Path) -> Sequence[SourceItem]:
    source = read_manifest(manifest)
    # Of a row in the middle, parquet reads the whole group.
    return PackedItems(source) if suffix(manifest) == ".parquet" else source


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
        with local_copy(item.media) as path, named_as_source(item.media, path):
            if media_kind(path) == "image":
                return decode_image(path, self.images)
            frames, real = decode_clip(path, self.clips, item.start, item.end)
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
        maps, real = decode_item_sketch(item, self.settings, self.classes, self.unlabelled)
        return maps[:real]


def media_frames(recipe: VqganRecipe, manifests: tuple[Path, ...], name: str) -> MediaFrames:
    """The items of several manifests with their decoder; `UserError` for a bad manifest."""
    from megatron_nuwa.training.frames import MediaFrames

    items = ManifestItems(manifests)
    if recipe.model.classes is None:
        decoder = FrameDecoder(recipe)
        rules = f"{decoder.clips.fingerprint()} {decoder.images.fingerprint()}"
        key = partial(_key, rules, items, _describe_media)
        return MediaFrames(items, decoder, recipe.decode_size, key, name)
    items.keep(_has_sketch)
    if not len(items):
        names = ", ".join(str(manifest) for manifest in manifests)
        raise UserError(
            f"{names}: no item has a 'sketch', the map of classes that a VQ-GAN with model.classes "
            "is trained on"
        )
    maps = MapDecoder(recipe)
    rules = f"{maps.settings.fingerprint()} {maps.classes} {maps.unlabelled}"
    key = partial(_key, rules, items, _describe_sketch)
    return MediaFrames(items, maps, recipe.decode_size, key, name, are_maps=True)


def _key(
    rules: str,
    items: Iterable[SourceItem],
    describe: Callable[[SourceItem], object],
    go_on: Callable[[], None],
) -> str:
    """What changes with the rules of decoding, and with any of the items' files."""
    digest = hashlib.sha256(rules.encode())
    for item in items:
        digest.update(repr(describe(item)).encode())
        go_on()
    return digest.hexdigest()


def _has_sketch(item: SourceItem) -> bool:
    return item.sketch is not None


def _describe_media(item: SourceItem) -> object:
    # A file that is replaced under the same name must be decoded again.
    return str(item.media), _size_and_time(item.media), item.start, item.end


def _describe_sketch(item: SourceItem) -> object:
    assert item.sketch is not None
    return str(item.sketch), _size_and_time(item.sketch)


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
