"""Tokens a second of sampling, beside nuwa-pytorch and the time to read the weights. Example:

OMP_NUM_THREADS=2 python -m benchmarks.generation
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.foreign_sampler import ForeignSampler
from benchmarks.harness.options import add_output, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from benchmarks.harness.timing import clock_of, copy_bandwidth
from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import SamplingSettings, uniform_numbers
from megatron_nuwa.generation.sampling import Sampler
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SMALL = NuwaConfig(width=256, heads=4, encoder_layers=6, decoder_layers=6, codebook_size=8192)
_QUICK = NuwaConfig(
    width=64, heads=2, encoder_layers=1, decoder_layers=2, codebook_size=64, text_vocabulary=64
)
_BATCHES = {"cpu": (1, 8), "cuda": (1, 16)}
_WORDS = 12
_SETTINGS = SamplingSettings(top_k=100)
# The integral over a whole video of what one of nuwa-pytorch's steps costs.
_FOREIGN_PLACES = (0.01, 0.25, 0.5, 0.75, 0.99)
FRAMES = ("first", "middle", "last")


@dataclass(frozen=True)
class Speed:
    """Of one batch: tokens a second, and milliseconds a step in some frames of the video."""

    batch: int
    tokens_per_second: float
    frame_ms: dict[str, float]

    @property
    def spread(self) -> float:
        """How much more the dearest frame's step costs than the cheapest's."""
        return max(self.frame_ms.values()) / min(self.frame_ms.values()) - 1


class Measure:
    """Seconds on one device, with what was asked for as a clock."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self._device = device
        self._now = time.process_time if clock == "cpu" else time.perf_counter

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, to the end of the device's work."""
        self._wait()
        begin = self._now()
        call()
        self._wait()
        return self._now() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_args(arguments)
    device = default_device()
    if options.clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() > 1):
        raise UserError("--clock cpu is for one thread of a CPU: set OMP_NUM_THREADS=1")
    config, grid = _model(options, device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = Nuwa(config).to(dtype).eval()
    measure = Measure(device, options.clock)
    rounds, steps = (2, 3) if options.quick else (options.rounds, options.steps)
    samplers = [_sampler(model, grid, batch, device) for batch in _BATCHES[device.type]]
    speeds = _speeds(samplers, measure, rounds, steps)
    foreign, reason = None, "runs on a CPU here" if device.type == "cuda" else ""
    if device.type == "cpu":
        try:
            foreign = _foreign(config, grid, measure)
        except UnavailableError as error:
            reason = str(error)
    bandwidth = copy_bandwidth(clock_of(device), device, options.quick)
    floor_ms = weight_bytes(model) / bandwidth * 1e3 if device.type == "cuda" else None
    _show(device, config, grid, speeds, foreign, reason, floor_ms)
    if options.output is not None:
        report = {
            "device": device_name(device),
            "torch": torch.__version__,
            "clock": options.clock,
            "dtype": str(dtype).removeprefix("torch."),
            "grid": list(grid),
            "model": config.model_dump(mode="json"),
            "ours": [
                {
                    "batch": speed.batch,
                    "tokens_per_second": speed.tokens_per_second,
                    "step_ms": speed.frame_ms,
                    "spread_over_frames": speed.spread,
                }
                for speed in speeds
            ],
            "nuwa_pytorch": foreign if foreign is not None else {"reason": reason},
            "copy_gigabytes_a_second": bandwidth / 1e9,
            "weight_bytes_a_step": weight_bytes(model),
            "weight_floor_ms": floor_ms,
        }
        write_json(options.output, report)
    return 0


def weight_bytes(model: Nuwa) -> int:
    """What a decoding step has to read of the model: the layers' weights, and the head's.

    Keys and values of the context are computed once, so the matrices that make them are not read.
    """
    weights = [weight for layer in model.decoder for weight in layer.parameters()]
    once = [
        weight
        for layer in model.decoder
        for projection in (layer.cross_attention.key, layer.cross_attention.value)  # type: ignore[union-attr]
        for weight in projection.parameters()  # type: ignore[union-attr]
    ]
    size = sum(w.numel() for w in weights) - sum(w.numel() for w in once)
    size += model.config.codebook_size * model.config.width
    return size * weights[0].element_size()


def _model(options: argparse.Namespace, device: torch.device) -> tuple[NuwaConfig, Grid]:
    if options.quick:
        return _QUICK, Grid(4, 4, 3)
    config = SMALL
    if options.recipe is not None or device.type == "cuda":
        path = options.recipe or ROOT / "launch/recipes/nuwa_870m.yaml"
        recipe = load_recipe(path)
        recipe.require("model")
        assert recipe.model is not None
        config = recipe.model
    return config, Grid(*config.position_grid)


@torch.no_grad()
def _sampler(model: Nuwa, grid: Grid, batch: int, device: torch.device) -> Sampler:
    words = torch.randint(model.config.text_vocabulary, (batch, TEXT_GRID.cells), device=device)
    mask = (torch.arange(TEXT_GRID.cells, device=device) < _WORDS).expand(batch, -1)
    decoder = CachedDecoder(model, [Context("text", words, TEXT_GRID, mask)], grid)
    return Sampler(decoder, _SETTINGS, uniform_numbers(range(batch), 0, grid.cells))


@torch.no_grad()
def _speeds(samplers: Sequence[Sampler], measure: Measure, rounds: int, steps: int) -> list[Speed]:
    """The best round of each sampler and frame, all taken in turns."""
    grid = samplers[0].decoder.grid
    frame = grid.h * grid.w
    steps = min(steps, frame)
    starts = dict(zip(FRAMES, (0, grid.s // 2, grid.s - 1), strict=True))
    best = [dict.fromkeys(FRAMES, float("inf")) for _ in samplers]
    for _ in range(rounds + 1):
        for times, sampler in zip(best, samplers, strict=True):
            for name, number in starts.items():
                sampler.decoder.position = number * frame

                def some(advance: Callable[[], None] = sampler.advance) -> None:
                    for _ in range(steps):
                        advance()

                times[name] = min(times[name], measure.seconds(some) / steps)
    speeds = []
    for times, sampler in zip(best, samplers, strict=True):
        # Frames between the first and the last cost what the middle one does.
        inner = max(grid.s - 2, 0) * times["middle"]
        mean = (times["first"] + inner + times["last"]) / (2 + max(grid.s - 2, 0))
        milliseconds = {name: seconds * 1e3 for name, seconds in times.items()}
        speeds.append(Speed(sampler.decoder.batch, sampler.decoder.batch / mean, milliseconds))
    return speeds


def _foreign(config: NuwaConfig, grid: Grid, measure: Measure) -> dict[str, object]:
    """nuwa-pytorch's tokens a second at batch 1: its steps at some places, integrated."""
    sampler = ForeignSampler(config, grid, 1)
    places = [round(share * grid.cells) for share in _FOREIGN_PLACES]
    sampler.step(places[0])
    seconds = [measure.seconds(lambda made=made: sampler.step(made)) for made in places]  # type: ignore[misc]
    edges = [0.0, *_FOREIGN_PLACES, 1.0]
    values = [seconds[0], *seconds, seconds[-1]]
    mean = sum(
        (right - left) * (a + b) / 2
        for left, right, a, b in zip(edges, edges[1:], values, values[1:], strict=False)
    )
    return {
        "tokens_per_second": 1 / mean,
        "step_ms": {str(made): s * 1e3 for made, s in zip(places, seconds, strict=True)},
        "decoder_parameters": sampler.decoder_parameters,
    }


def _show(
    device: torch.device,
    config: NuwaConfig,
    grid: Grid,
    speeds: Sequence[Speed],
    foreign: dict[str, object] | None,
    reason: str,
    floor_ms: float | None,
) -> None:
    console = Console()
    table = Table(
        title=f"Sampling {grid.h}×{grid.w}×{grid.s} tokens, width {config.width}, "
        f"{config.decoder_layers} decoder layers · {device_name(device)}"
    )
    table.add_column("")
    for column in ("tokens/s", *(f"{name} frame, ms" for name in FRAMES), "spread"):
        table.add_column(column, justify="right")
    for speed in speeds:
        times = [f"{milliseconds:.3g}" for milliseconds in speed.frame_ms.values()]
        rate = f"{speed.tokens_per_second:,.0f}"
        table.add_row(f"ours, batch {speed.batch}", rate, *times, f"{speed.spread:.1%}")
    if foreign is not None:
        step_ms = foreign["step_ms"]
        assert isinstance(step_ms, dict)
        times = [f"{step_ms[key]:,.0f}" for key in (list(step_ms)[n] for n in (0, 2, 4))]
        table.add_row("nuwa-pytorch, batch 1", f"{foreign['tokens_per_second']:.3g}", *times, "")
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    one, many = speeds
    gain = many.tokens_per_second / one.tokens_per_second
    say(f"batch {many.batch} makes {gain:.2f}× the tokens of batch {one.batch} in the same time")
    if foreign is None:
        say(f"nuwa-pytorch: not timed: {reason}")
    else:
        theirs = foreign["tokens_per_second"]
        assert isinstance(theirs, float)
        say(
            f"{one.tokens_per_second / theirs:,.0f}× nuwa-pytorch's sampler, whose steps were "
            f"timed at {len(_FOREIGN_PLACES)} places and integrated over the video"
        )
    if floor_ms is not None:
        for speed in speeds:
            share = floor_ms / max(speed.frame_ms.values())
            say(
                f"batch {speed.batch}: {share:.0%} of the weight-reading floor of {floor_ms:.3g} ms"
            )


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("generation", __doc__)
    parser.add_argument(
        "--recipe",
        type=Path,
        help="whose model (default: width 256 with 6 + 6 layers; on a GPU nuwa_870m)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=7, metavar="N", help="the best of N counts (default: 7)"
    )
    parser.add_argument(
        "--steps", type=positive, default=60, metavar="N", help="steps a round (default: 60)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: this process's CPU time, for a machine that others use, too (default: wall)",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    add_output(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
