"""Frames a second and MFU of turning frames into tokens, as the farm's encode ranks do. Example:

python -m benchmarks.encoding --batch-sizes 64 128 16
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch._inductor import config as inductor

from benchmarks.harness.options import add_output, add_recipe, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from megatron_nuwa.command_line import number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.models.flops import encoding_flops
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.plan.devices import DEVICES
from megatron_nuwa.training.recipe import load_recipe
from preprocessing.encoder import EncoderSettings, FrameEncoder, Precision

_MOST_COMPARED = 8
_BATCHES_AT_ONCE = 2


@dataclass(frozen=True)
class Way:
    """One way to encode.

    `free` may time its kernels and take the fastest, which the farm forbids both: their sums have
    different orders, and so a corpus would depend on the moment.
    """

    batch: int
    compiled: bool
    precision: Precision
    channels_last: bool
    free: Literal["", "cuDNN", "Inductor"] = ""

    def __str__(self) -> str:
        return ", ".join(
            (
                "compiled" if self.compiled else "eager",
                self.precision,
                "channels last" if self.channels_last else "channels first",
                *([f"{self.free} searches"] if self.free else []),
            )
        )


@dataclass(frozen=True)
class Speed:
    """What a way reached, or why it was not timed; no `mfu` where no peak is published.

    `start_seconds` is the first batch, compilation included; `alike` the share of tokens that
    eager float32 gives too.
    """

    way: Way
    reason: str | None = None
    frames_per_second: float = 0.0
    flops: float = 0.0
    mfu: float | None = None
    start_seconds: float = 0.0
    peak_gib: float = 0.0
    alike: float = 0.0


def ways(batches: Sequence[int], cuda: bool, compiled: bool) -> Iterator[Way]:
    """The farm's own way at every batch size, and one thing at a time changed at the first.

    What needs no compiler comes first: a run that is cut short has figures all the same.
    """
    first = Way(batches[0], compiled, "bfloat16" if cuda else "float32", cuda)
    if compiled:
        yield replace(first, compiled=False)
        yield Way(batches[0], False, "float32", False)
    yield first
    if not compiled:
        yield Way(batches[0], False, "float32", False)
    if cuda:
        yield replace(first, free="cuDNN")
    if cuda and compiled:
        yield replace(first, free="Inductor")
    for batch in batches[1:]:
        yield replace(first, batch=batch)
    yield replace(first, channels_last=not first.channels_last)
    yield replace(first, precision="float32" if cuda else "bfloat16")


class Stand:
    """One VQ-GAN with random weights, and the frames that every way encodes."""

    def __init__(
        self, recipe: Path, device: torch.device, batches: Sequence[int], seconds: float
    ) -> None:
        section = load_recipe(recipe).vqgan
        if section is None:
            raise UserError(f"recipe {recipe} needs the section vqgan for this")
        self.config = section.model
        torch.manual_seed(0)
        self._vqgan = Vqgan(self.config).eval()
        self._device = device
        self._seconds = seconds
        self.flops = encoding_flops(self.config)
        self.peaks = _peaks(device)
        side = self.config.image_size
        rng = np.random.default_rng(0)
        self._frames = rng.integers(0, 256, (max(batches), side, side, 3), np.uint8)
        self._compared = min(*batches, _MOST_COMPARED)
        exact = self._encoder(Way(self._compared, False, "float32", False))
        self._expected = exact.start(self._frames[: self._compared]).tokens()

    def speed(self, way: Way) -> Speed:
        """Encode batch after batch, the next on its way while one is under work."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        frames = self._frames[: way.batch]
        try:
            began = time.perf_counter()
            encoder = self._encoder(way)
            tokens = encoder.start(frames).tokens()
            start = time.perf_counter() - began
            encoder.start(frames).tokens()
            reached = self._frames_per_second(encoder, frames)
        except torch.OutOfMemoryError:
            return Speed(way, "out of memory")
        # A compiler fails in ways of its own; the other ways' figures are wanted all the same.
        except Exception as error:
            first, *_ = [*str(error).splitlines(), ""]
            return Speed(way, f"{type(error).__name__}: {first[:100]}")
        return Speed(
            way,
            frames_per_second=reached,
            flops=self.flops * reached,
            mfu=self.flops * reached / self.peaks[way.precision] if self.peaks else None,
            start_seconds=start,
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            alike=float((tokens[: self._compared] == self._expected).mean()),
        )

    def _frames_per_second(self, encoder: FrameEncoder, frames: np.ndarray) -> float:
        under_work = deque([encoder.start(frames)])
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < self._seconds:
            if len(under_work) < _BATCHES_AT_ONCE:
                under_work.append(encoder.start(frames))
            under_work.popleft().tokens()
            done += 1
        for batch in under_work:
            batch.tokens()
            done += 1
        return done * len(frames) / (time.perf_counter() - began)

    def _encoder(self, way: Way) -> FrameEncoder:
        torch.compiler.reset()
        settings = EncoderSettings(
            device="cuda" if self._device.type == "cuda" else "cpu",
            precision=way.precision,
            compiled=way.compiled,
        )
        encoder = FrameEncoder(self._vqgan, settings, way.batch, 0, way.channels_last)
        torch.backends.cudnn.deterministic = way.free != "cuDNN"
        torch.backends.cudnn.benchmark = way.free == "cuDNN"
        if hasattr(inductor, "deterministic"):
            inductor.deterministic = way.free != "Inductor"
        return encoder


def _peaks(device: torch.device) -> dict[Precision, float]:
    """Published FLOP/s of the device by precision; empty where they are not known."""
    name = device_name(device).upper()
    for known in DEVICES.values():
        if device.type == "cuda" and known.name.split("-")[0].upper() in name:
            return {"float32": known.peak("fp32"), "bfloat16": known.peak("bf16")}
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    began = time.perf_counter()
    device = default_device()
    cuda = device.type == "cuda"
    batches = options.batch_sizes or ([64, 128, 16] if cuda else [2])
    stand = Stand(options.recipe, device, batches, options.window)
    speeds: list[Speed] = []
    longest = 0.0
    for way in dict.fromkeys(
        ways(batches, cuda, cuda if options.compile is None else options.compile)
    ):
        at = time.perf_counter()
        if speeds and at - began + longest > options.seconds:
            speeds.append(Speed(way, f"the {options.seconds:g} s were used up"))
        else:
            speeds.append(stand.speed(way))
        longest = max(longest, time.perf_counter() - at)
        result = speeds[-1].reason or f"{speeds[-1].frames_per_second:,.1f} frames/s"
        print(f"{way.batch} frames, {way}: {result}", flush=True)
        # Whoever lends a GPU may take it back before the end.
        if options.output is not None:
            write_json(options.output, _report(options.recipe, stand, speeds, device))
    _show(stand, speeds, device)
    return 0


def _report(
    recipe: Path, stand: Stand, speeds: Sequence[Speed], device: torch.device
) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "recipe": recipe.stem,
        "flops_a_frame": stand.flops,
        "peak_flops": stand.peaks,
        "ways": [asdict(speed) for speed in speeds],
    }


def _show(stand: Stand, speeds: Sequence[Speed], device: torch.device) -> None:
    config = stand.config
    table = Table(
        title=f"Encoding, F{config.downsampling} of {config.image_size}² · "
        f"{stand.flops / 1e9:,.1f} GFLOP a frame · {device_name(device)}"
    )
    for column in (
        "",
        "batch",
        "frames/s",
        "TFLOP/s",
        "MFU",
        "first batch",
        "peak memory",
        "as float32",
    ):
        table.add_column(column, justify="right" if column else "left")
    for speed in speeds:
        cells = [str(speed.way), str(speed.way.batch)]
        if speed.reason is not None:
            table.add_row(*cells, speed.reason)
            continue
        memory = f"{speed.peak_gib:.1f} GiB" if speed.peak_gib else "–"
        table.add_row(
            *cells,
            f"{speed.frames_per_second:,.1f}",
            f"{speed.flops / 1e12:,.2f}",
            "–" if speed.mfu is None else f"{speed.mfu:.1%}",
            f"{speed.start_seconds:.1f} s",
            memory,
            f"{speed.alike:.1%}",
        )
    Console(width=max(120, Console().width)).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("encoding", __doc__)
    add_recipe(parser, "vqgan_f16", "VQ-GAN, with random weights")
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help="frames at once; everything is measured at the first (default: 64 128 16, on CPUs 2)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also with torch.compile (default: on GPUs)",
    )
    parser.add_argument(
        "--window",
        type=number(above=0),
        default=1.5,
        metavar="S",
        help="seconds that a way is timed for (default: 1.5)",
    )
    parser.add_argument(
        "--seconds",
        type=number(least=0),
        default=80,
        metavar="S",
        help="begin nothing that would end later, by the longest so far (default: 80)",
    )
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
