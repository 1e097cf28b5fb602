"""Show samples/s of the token loader beside other loaders on the same tokens. Example:

OMP_NUM_THREADS=1 python -m benchmarks.loader --output benchmarks/results
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.loaders import (
    LITDATA,
    LOADERS,
    NAIVE,
    OURS,
    PACKED,
    STREAMING,
    Batch,
    Tokens,
)
from benchmarks.harness.options import CPU, add_output, benchmark_parser, positive
from benchmarks.harness.report import device_name, write_json
from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.command_line import number
from megatron_nuwa.errors import run_command
from megatron_nuwa.grid import Grid

_KINDS = {"images": Grid(21, 21, 1), "videos": Grid(21, 21, 10)}
_WARM_UP_BATCHES = 8


@dataclass(frozen=True)
class Rate:
    """What one loader does with one kind of item; `reason` says why it has no figures."""

    loader: str
    samples_per_second: float | None = None
    repeats: tuple[float, ...] = ()
    reason: str | None = None


def measure(name: str, tokens: Tokens, batch: int, seconds: float, repeats: int) -> Rate:
    """Median samples/s of batches as int64 tensors, of visual tokens and of text tokens."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            stream = LOADERS[name](Path(folder), tokens, batch)()
        except UnavailableError as error:
            return Rate(name, reason=str(error))
        with closing(stream):
            check(next(stream), tokens, batch)
            for _ in range(_WARM_UP_BATCHES):
                next(stream)
            rates = tuple(_rate(stream, seconds) for _ in range(repeats))
    return Rate(name, statistics.median(rates), rates)


def check(batch: Batch, tokens: Tokens, size: int) -> None:
    """`RuntimeError` where a loader gives something other than the tokens that were written."""
    visual, text = batch
    if visual.dtype != torch.int64 or visual.shape != (size, tokens.grid.cells):
        raise RuntimeError(f"visual tokens came as {visual.dtype} {tuple(visual.shape)}")
    # The first token of an item is its number, so that the rest can be held against it.
    for row, words in zip(visual, text, strict=True):
        number = int(words[0]) + (int(words[1]) << 8)
        if row.tolist() != tokens.visual[number].tolist():
            raise RuntimeError(f"item {number} came back with other tokens")


def _rate(stream: Generator[Batch, None, None], seconds: float) -> float:
    samples, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        visual, _ = next(stream)
        samples += len(visual)
    return samples / (time.perf_counter() - started)


def show(console: Console, kind: str, tokens: Tokens, rates: Sequence[Rate]) -> None:
    """One table of a kind of item."""
    title = f"{kind}: {tokens.grid.cells:,} tokens an item, {len(tokens.visual):,} items"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("samples/s", "ours ÷ it"):
        table.add_column(heading, justify="right")
    ours = next(rate.samples_per_second for rate in rates if rate.loader == OURS)
    for rate in rates:
        speed = rate.samples_per_second
        cells = ("–", rate.reason or "")
        if speed:
            cells = (f"{speed:,.0f}", f"{(ours or 0) / speed:.2f}")
        style = "bold green" if rate.loader == OURS else None
        table.add_row(rate.loader, *cells, style=style)
    console.print(table)


def verdicts(rates: Sequence[Rate], limit: float) -> Generator[tuple[str, bool], None, None]:
    """For each loader with an aim, a sentence and whether nothing is wrong with it."""
    ours = next(rate.samples_per_second for rate in rates if rate.loader == OURS) or 0.0
    for rate in rates:
        aim = {NAIVE: limit, STREAMING: 1.0, LITDATA: 1.0}.get(rate.loader)
        if aim is None:
            continue
        if rate.samples_per_second is None:
            yield f"{rate.loader}: not compared", True
            continue
        ratio = ours / rate.samples_per_second
        verdict = "reached" if ratio >= aim else "missed"
        yield f"{rate.loader}: the aim of {aim:g} times is {verdict}: {ratio:.2f}", ratio >= aim


def kind_json(kind: str, tokens: Tokens, rates: Sequence[Rate]) -> dict[str, object]:
    """One kind of item in the file."""
    ours = next(rate.samples_per_second for rate in rates if rate.loader == OURS) or 0.0
    return {
        "kind": kind,
        "tokens_an_item": tokens.grid.cells,
        "items": len(tokens.visual),
        "loaders": [
            {
                "loader": rate.loader,
                "samples_per_second": rate.samples_per_second,
                "repeats": list(rate.repeats),
                "ours_over_it": ours / rate.samples_per_second if rate.samples_per_second else None,
                "unavailable": rate.reason,
            }
            for rate in rates
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where an aim is missed."""
    options = _options(arguments)
    # Loaders that copy with several threads would be compared by their threads.
    torch.set_num_threads(1)
    random.seed(0)
    console, kinds, good = Console(), [], True
    for kind in options.kinds:
        grid = _KINDS[kind]
        tokens = Tokens.random(grid, max(options.items // grid.s, 2 * options.batch))
        rates = []
        for name in options.loaders:
            rates.append(measure(name, tokens, options.batch, options.seconds, options.repeats))
        show(console, kind, tokens, rates)
        for sentence, is_good in verdicts(rates, options.limit):
            console.print(sentence, highlight=False)
            good &= is_good
        kinds.append(kind_json(kind, tokens, rates))
    if options.output:
        cpu = torch.device("cpu")
        report = {
            "device": device_name(cpu),
            "torch": torch.__version__,
            "batch": options.batch,
            "seconds_a_repeat": options.seconds,
            "kinds": kinds,
        }
        write_json(options.output, report)
        console.print(f"written to {options.output}")
    return 0 if good else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("loader", __doc__)
    parser.add_argument(
        "--items",
        type=positive,
        default=40_000,
        help="of images; a tenth of videos (default: 40000)",
    )
    parser.add_argument("--batch", type=positive, default=64, help="samples a batch (default: 64)")
    parser.add_argument(
        "--seconds", type=number(above=0), default=2.0, help="of a repeat (default: 2)"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="default: 3")
    parser.add_argument("--kinds", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    parser.add_argument(
        "--loaders",
        nargs="+",
        choices=list(LOADERS),
        default=list(LOADERS),
        help=f"{OURS!r} is always among them; default: all, {NAIVE!r} and {PACKED!r} too",
    )
    parser.add_argument(
        "--limit",
        type=number(least=0),
        default=20.0,
        metavar="TIMES",
        help=f"exit with 1 where {OURS!r} is not as many times as fast as {NAIVE!r} (default: 20), "
        f"or slower than {STREAMING!r} or {LITDATA!r}",
    )
    add_output(parser, CPU)
    options = parser.parse_args(arguments)
    if OURS not in options.loaders:
        options.loaders.insert(0, OURS)
    return options


if __name__ == "__main__":
    sys.exit(run_command(main))
