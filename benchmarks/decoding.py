"""CPU time of the decoders against that of bare ffmpeg, for the same clips and frames. Example:

python -m benchmarks.decoding --rounds 5
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.harness.options import CPU, add_output, benchmark_parser, positive
from benchmarks.harness.report import write_json
from launch.demo.catalogue import load_catalogue
from launch.workflow.media import find_package_file
from megatron_nuwa.command_line import number
from megatron_nuwa.config import parse_settings
from megatron_nuwa.decoders import DecodeSettings, decode, guard
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import run_command

BARE, PLAIN, PROJECT, PYAV = "bare ffmpeg", "its own scaling", "ffmpeg-python", "PyAV"
# What makes the same pixels on every processor, and in PyAV as well.
EXACT = "bicubic+accurate_rnd+full_chroma_int+bitexact"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 where ffmpeg-python takes more than the limit."""
    parser = benchmark_parser("decoding", __doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="times each clip is decoded")
    parser.add_argument("--image-size", type=int, default=336, help="side of a frame in pixels")
    parser.add_argument("--frames", type=int, default=10, help="frames of a clip")
    parser.add_argument(
        "--limit",
        type=number(least=0),
        default=1.1,
        metavar="TIMES",
        help=f"exit with 1 where {PROJECT} takes more than this times bare ffmpeg's CPU time for "
        "the same pixels (default: 1.1)",
    )
    add_output(parser, CPU)
    options = parser.parse_args(arguments)
    asked = {name: getattr(options, name) for name in ("image_size", "frames")}
    settings = parse_settings(
        DecodeSettings, {**asked, "short_clips": "pad"}, "the arguments", parser.flags()
    )
    rows = {path.name: measure(path, settings, options.rounds) for path in demo_videos()}
    ratios = {name: overall(rows, name) for name in next(iter(rows.values()))}
    Console().print(table(rows, ratios))
    good = ratios[PROJECT] <= options.limit
    verdict = "reached" if good else "missed"
    print(f"the aim of {options.limit:g} times bare ffmpeg is {verdict}: {ratios[PROJECT]:.3f}")
    write_json(options.output, {"milliseconds": rows, "ratios": ratios, "aim": options.limit})
    return 0 if good else 1


def demo_videos() -> list[Path]:
    """The real videos that the demo is cut from; `UserError` where a package is missing."""
    return [find_package_file(video.package, video.path) for video in load_catalogue().videos]


def measure(path: Path, settings: DecodeSettings, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds, children's included, of each way to decode a clip."""
    pyav = settings.model_copy(update={"backend": "pyav"})
    ways: dict[str, Callable[[], object]] = {
        BARE: lambda: bare_ffmpeg(path, settings, EXACT),
        PLAIN: lambda: bare_ffmpeg(path, settings, "bicubic"),
        PROJECT: lambda: decode(path, settings),
    }
    if find_spec("av") is not None:
        ways[PYAV] = lambda: decode(path, pyav)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(rounds + 1):
        for name, way in ways.items():
            seconds = cpu_seconds(way)
            if trial:
                # The first round warms the disk cache and starts PyAV's worker.
                times[name].append(seconds)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def bare_ffmpeg(path: Path, settings: DecodeSettings, scaling: str) -> np.ndarray:
    """The same frames by a command typed by hand, without limits or checks.

    With ffmpeg's own flags for `scaling` their pixels may differ in the last bits.
    """
    side = settings.image_size
    graph = (
        f"fps={settings.frames_per_second:g}:round=up:start_time=0,"
        f"scale=w='max({side},round({side}*dar))':h='max({side},round({side}/dar))'"
        f":flags={scaling},crop={side}:{side}"
    )
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-threads", "1"]
    command += ["-i", str(path), "-an", "-vf", graph, "-filter_threads", "1"]
    command += ["-frames:v", str(settings.frames), "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, side, side, 3)


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU time that an action takes here, in children that end, and in waiting workers."""
    before = used()
    action()
    return used() - before


def used() -> float:
    """CPU seconds of this process, of its ended children and of PyAV's workers."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for process in guard.worker_processes():
        # Fields 14 and 15 of the line, counted behind the name, which may hold blanks.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def overall(rows: dict[str, dict[str, float]], name: str) -> float:
    """CPU time over all clips, in units of bare ffmpeg's."""
    return sum(row[name] for row in rows.values()) / sum(row[BARE] for row in rows.values())


def table(rows: dict[str, dict[str, float]], ratios: dict[str, float]) -> Table:
    """The numbers for people."""
    made = Table(title="CPU milliseconds a clip")
    made.add_column("clip")
    for name in ratios:
        made.add_column(name, justify="right")
    for clip, row in rows.items():
        made.add_row(clip, *(f"{value:.1f}" for value in row.values()))
    made.add_section()
    made.add_row("all, as a ratio", *(f"{ratio:.3f}" for ratio in ratios.values()))
    return made


if __name__ == "__main__":
    sys.exit(run_command(main))
