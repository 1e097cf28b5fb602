"""Show what the farm costs beside decoding and encoding, and what a second rank brings. Example:

OMP_NUM_THREADS=1 python -m benchmarks.farm --clips 400 --images 2000
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import (
    CPU,
    add_limit,
    add_output,
    add_recipe,
    benchmark_parser,
    positive,
)
from benchmarks.harness.report import device_name, write_json
from megatron_nuwa.command_line import number, whole_number
from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.models.vqgan import Vqgan, save_vqgan
from megatron_nuwa.training.recipe import load_recipe
from preprocessing import decode_worker, farm
from preprocessing.__main__ import main as preprocessing_main
from preprocessing.encoder import FrameEncoder

_CAPTIONS = ["a ginger cat looks to the right", "the lights shine on the dark globe"]
# Different files, which the manifest names over and over.
_FILES = 8
_CLIP_SECONDS = 4
_IMAGE_SIDE = 512


@dataclass(frozen=True)
class Cost:
    """Processor seconds of one farm in one process, and the items that they were spent on."""

    items: int
    decode: float
    encode: float
    captions: float
    whole: float

    @property
    def overhead(self) -> float:
        """Share of the processor time that is neither decoding nor encoding; captions count."""
        return (self.captions + self.rest) / self.whole

    @property
    def rest(self) -> float:
        """Processor seconds that go neither into decoding, nor encoding, nor captions."""
        return self.whole - self.decode - self.encode - self.captions


class _Clock:
    """Processor seconds of the threads that run the watched functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - began

        return wrapper


def farm_cost(arguments: Sequence[str], items: int) -> Cost:
    """Run a farm in this process and see where its processor time goes.

    Loading Python, the VQ-GAN and the BPE is left out: it does not grow with the corpus.
    """
    loading, decoding, encoding, captions = _Clock(), _Clock(), _Clock(), _Clock()
    with (
        patch.object(farm, "load_tools", loading.timed(farm.load_tools)),
        patch.object(decode_worker, "decode_item", decoding.timed(decode_worker.decode_item)),
        patch.object(FrameEncoder, "start", encoding.timed(FrameEncoder.start)),
        patch.object(TextTokenizer, "encode", captions.timed(TextTokenizer.encode)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        own, children = time.process_time(), _children_seconds()
        if preprocessing_main([*arguments, "--no-report"]):
            raise UserError("the farm of the benchmark failed; its error stands above")
        own, children = time.process_time() - own, _children_seconds() - children
    # Children do nothing but decode: ffmpeg, and the worker that reads pictures.
    whole = own + children - loading.seconds
    decode = decoding.seconds + children
    return Cost(items, decode, encoding.seconds, captions.seconds, whole)


def ranks_speed(ranks: int, arguments: Sequence[str]) -> float:
    """Items a second of a farm under mpirun, one core a rank, without its start."""
    launcher = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)]
    done = subprocess.run(
        [
            *launcher,
            *("--map-by", "core", "--bind-to", "core"),
            *(sys.executable, "-m", "preprocessing", *arguments, "--no-report"),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"([\d.]+) items/s$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise UserError(f"{ranks} ranks failed: {done.stderr.strip()}")
    # The last such line is that of the whole run.
    return float(re.findall(r"([\d.]+) items/s$", done.stdout, re.MULTILINE)[-1])


class World:
    """Media, manifests and tools in a folder; every farm of it gets a folder of its own."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self._folder = folder
        config = load_recipe(recipe).vqgan
        if config is None:
            raise UserError(f"recipe {recipe} needs the section vqgan for this")
        torch.manual_seed(0)
        save_vqgan(Vqgan(config.model), folder / "vqgan.safetensors")
        train_bpe(_CAPTIONS, 600).save(folder / "bpe.json")
        for file in range(_FILES):
            _write_clip(folder / f"clip{file}.mp4", file)
            _write_image(folder / f"image{file}.jpg", file)
        self._farms = 0

    def arguments(self, kind: str, items: int) -> list[str]:
        """A farm over so many clips or images."""
        suffix, frames = {"clip": ("mp4", 10), "image": ("jpg", 1)}[kind]
        manifest = self._folder / f"{kind}s.jsonl"
        rows = [
            {"id": n, "media": f"{kind}{n % _FILES}.{suffix}", "captions": _CAPTIONS}
            for n in range(items)
        ]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._farms += 1
        return [
            *("tokenize", str(manifest), "--output", str(self._folder / f"farm{self._farms}")),
            *("--vqgan", str(self._folder / "vqgan.safetensors")),
            *("--bpe", str(self._folder / "bpe.json"), "--frames", str(frames)),
            *("--items-per-shard", str(max(1, items // 8))),
        ]


def _write_clip(path: Path, number: int) -> None:
    source = f"testsrc2=size=320x240:rate=25:duration={_CLIP_SECONDS}"
    command = [ffmpeg_program(), "-v", "error", "-nostdin", "-f", "lavfi"]
    command += ["-i", f"{source},hue=h={40 * number}", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)


def _write_image(path: Path, number: int) -> None:
    small = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(small).resize((_IMAGE_SIDE, _IMAGE_SIDE)).save(path)


def _children_seconds() -> float:
    """Processor seconds of all child processes, those that are still there among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = [child.cpu_times() for child in psutil.Process().children()]
    return usage.ru_utime + usage.ru_stime + sum(sum(times[:4]) for times in alive)


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where the overhead is above the limit, or two ranks are too slow."""
    options = _parser().parse_args(arguments)
    with _temporary() as folder:
        # Imported by a farm when it ends.
        from torch.utils import tensorboard  # noqa: F401

        world = World(folder, options.recipe)
        costs = {
            f"{kind}s": farm_cost(world.arguments(kind, items), items)
            for kind, items in (("clip", options.clips), ("image", options.images))
        }
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for ranks, found in speeds.items():
                found.append(ranks_speed(ranks, world.arguments("clip", options.clips)))
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    _show(costs, speeds, ratios)
    if options.output is not None:
        report = {
            "device": device_name(torch.device("cpu")),
            "torch": torch.__version__,
            "overhead": {
                kind: {
                    "items": cost.items,
                    "decode_ms": cost.decode / cost.items * 1e3,
                    "encode_ms": cost.encode / cost.items * 1e3,
                    "captions_ms": cost.captions / cost.items * 1e3,
                    "whole_ms": cost.whole / cost.items * 1e3,
                    "overhead": cost.overhead,
                }
                for kind, cost in costs.items()
            },
            "items_per_second": {str(ranks): found for ranks, found in speeds.items()},
            "two_ranks_to_one": ratios,
        }
        write_json(options.output, report)
    light = max(cost.overhead for cost in costs.values()) <= options.limit
    fast = not ratios or statistics.median(ratios) >= options.speedup
    return 0 if light and fast else 1


def _show(costs: dict[str, Cost], speeds: dict[int, list[float]], ratios: list[float]) -> None:
    table = Table(title="Where the farm's processor time goes, ms an item")
    for column in ("items", "decode", "encode", "captions", "all else", "share"):
        table.add_column(column, justify="left" if column == "items" else "right")
    for kind, cost in costs.items():
        parts = (cost.decode, cost.encode, cost.captions, cost.rest)
        table.add_row(
            f"{cost.items:,} {kind}",
            *(f"{part / cost.items * 1e3:.2f}" for part in parts),
            f"{cost.overhead:.2%}",
        )
    console = Console()
    console.print(table)
    if ratios:
        one, two = (statistics.median(speeds[ranks]) for ranks in (1, 2))
        console.print(
            f"clips: one rank on one core {one:.1f} items/s, two ranks on two cores {two:.1f}; "
            f"{statistics.median(ratios):.2f}× (median of {len(ratios)} pairs)",
            highlight=False,
        )


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("farm", __doc__)
    add_recipe(parser, "demo", "VQ-GAN")
    parser.add_argument("--clips", type=positive, default=200, metavar="N", help="default: 200")
    parser.add_argument("--images", type=positive, default=2000, metavar="N", help="default: 2000")
    parser.add_argument(
        "--repeats",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="pairs of farms of one and of two ranks; 0 for none (default: 3)",
    )
    add_limit(parser, 0.05, "beside decoding and encoding")
    parser.add_argument(
        "--speedup",
        type=number(least=0),
        default=1.8,
        metavar="TIMES",
        help="exit with 1 where two ranks are not as many times as fast as one (default: 1.8)",
    )
    add_output(parser, CPU)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
