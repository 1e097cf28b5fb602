"""Write the demo's page: one file that shows what a run did, from the run's own files.

python -m launch.demo.report runs/demo
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from markupsafe import Markup

from launch.demo import showcase
from launch.demo.catalogue import load_catalogue
from launch.demo.results import corpus_counts, read_goals, skipped_items
from launch.demo.stages import BEFORE_PAGE, CLIP_FRAMES, CLIP_FRAMES_PER_SECOND
from launch.workflow.charts import line_chart, loss_chart
from launch.workflow.display import duration
from launch.workflow.results import (
    read_json,
    read_json_lines,
    read_log,
    series,
    stage_records,
    typical,
)
from launch.workflow.runner import StageRecord
from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.generation.tasks import TASKS
from megatron_nuwa.pages import render_page

_LARGEST_PAGE_BYTES = 12 * 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = CommandParser(
        prog="python -m launch.demo.report",
        description="Write report.html into the folder of a demo whose other stages are done.",
        example="python -m launch.demo.report runs/demo",
    )
    parser.add_argument("output", type=Path, help="the demo's folder, such as runs/demo")
    output = parser.parse_args(arguments).output
    page = render_report(output)
    write_text_atomically(output / "report.html", page)
    print(f"{output / 'report.html'}: {len(page.encode()) / 2**20:.1f} MiB")
    return 0


def render_report(output: Path) -> str:
    """The page's HTML; `UserError` names the first file that is absent or broken."""
    if not output.is_dir():
        raise UserError(f"{output} is not a folder; run the demo first: python -m launch.demo")
    records = stage_records(output, BEFORE_PAGE)
    page = render_page(
        Path(__file__).with_name("report.html.j2"),
        {"duration": duration},
        output=output,
        goals=read_goals(output),
        story=_story(output, records),
        images=showcase.generated_images(output),
        clips=showcase.generated_clips(output),
        continuations=showcase.continuations(output),
        completions=showcase.completions(output),
        manipulations=showcase.manipulations(output),
        from_sketches=showcase.from_sketches(output),
        reconstructions=showcase.reconstructions(output),
        charts=_charts(output, records),
        stages=_stage_rows(output, records),
        skipped=skipped_items(output),
        sources=_sources(output),
        machine=_machine(output),
    )
    if len(page.encode()) > _LARGEST_PAGE_BYTES:
        raise UserError(f"the page of {output} would exceed 12 MiB; generate fewer samples")
    return page


def _story(output: Path, records: Sequence[StageRecord]) -> dict[str, Any]:
    """The numbers of the paragraph that says what was done."""
    counts = corpus_counts(output)
    evaluation = read_json(output / "pretrain" / "evaluation.json")
    vqgan_log, pretrain_log = read_log(output / "vqgan"), read_log(output / "pretrain")
    provenance = read_json_lines(output / "media" / "provenance.jsonl")
    return {
        "clips": sum(c["items"] for name, c in counts.items() if "clips" in name),
        "images": sum(c["items"] for name, c in counts.items() if "images" in name),
        "heldout_clips": counts.get("heldout-clips", {}).get("items", 0),
        "heldout_images": counts.get("heldout-images", {}).get("items", 0),
        "sources": len({(row["package"], row["path"]) for row in provenance}),
        "frames": CLIP_FRAMES,
        "frames_per_second": CLIP_FRAMES_PER_SECOND,
        "vqgan_steps": max(vqgan_log, default=0),
        "pretrain_steps": max(pretrain_log, default=0),
        "stop": _stop_step(records),
        "tasks": {
            TASKS[name].title: figures
            for name, figures in evaluation["heldout"].get("tasks", {}).items()
        },
    }


def _stop_step(records: Sequence[StageRecord]) -> int | None:
    """The step at which pretraining was stopped on purpose, as its command says."""
    for record in records:
        for word in " ".join(record.commands).split():
            if word.startswith("training.stop_at_step="):
                return int(word.partition("=")[2])
    return None


def _charts(output: Path, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    vqgan, stop = read_log(output / "vqgan"), _stop_step(records)
    drawings = [
        (
            "Pretraining: cross-entropy of each task",
            loss_chart(
                read_log(output / "pretrain"), (stop, "stopped and resumed") if stop else None
            ),
        ),
        (
            "VQ-GAN: terms of the loss",
            line_chart(
                _present(vqgan, "train/loss/{}", "reconstruction", "perceptual", "codebook"),
                x_label="step",
                y_label="loss",
                logarithmic=True,
            ),
        ),
        (
            "VQ-GAN: reconstruction of held-out frames",
            line_chart(_present(vqgan, "eval/{}", "psnr"), x_label="step", y_label="PSNR in dB"),
        ),
    ]
    return [{"title": title, "svg": Markup(svg)} for title, svg in drawings]


def _present(
    log: dict[int, dict[str, float]], pattern: str, *names: str
) -> dict[str, tuple[list[int], list[float]]]:
    lines = {name: series(log, pattern.format(name)) for name in names}
    return {name: line for name, line in lines.items() if line[0]}


def _stage_rows(output: Path, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    speeds = _speeds(output, {record.name: record.seconds for record in records})
    return [
        {
            "name": record.name,
            "title": record.title,
            "seconds": record.seconds,
            "memory": f"{record.peak_memory_bytes / 2**30:.1f} GiB",
            "speed": speeds.get(record.name, ""),
            "commands": record.commands,
        }
        for record in records
    ]


def _speeds(output: Path, seconds: dict[str, float]) -> dict[str, str]:
    """What each stage achieved a second, where that says something."""
    speeds = {}
    counts = corpus_counts(output).values()
    if seconds.get("media"):
        cut = len(read_json_lines(output / "media" / "provenance.jsonl"))
        speeds["media"] = f"{cut / seconds['media']:.0f} cuts/s"
    if seconds.get("tokenize"):
        items = sum(count["items"] for count in counts)
        speeds["tokenize"] = f"{items / seconds['tokenize']:.1f} clips and images/s with start-up"
    log = read_log(output / "vqgan")
    steps, times = series(log, "seconds")
    if len(steps) > 1 and times[-1] > times[0]:
        rate = (steps[-1] - steps[0]) / (times[-1] - times[0])
        speeds["vqgan"] = f"{rate:.1f} steps/s"
    tokens = typical(read_log(output / "pretrain"), "speed/tokens_per_second")
    if tokens:
        speeds["pretrain"] = speeds["resume"] = f"{tokens:,.0f} tokens/s"
    return speeds


def _sources(output: Path) -> list[dict[str, Any]]:
    """The packages whose media were used, with their licences."""
    licences = load_catalogue().licences
    files: dict[tuple[str, str], set[str]] = {}
    for row in read_json_lines(output / "media" / "provenance.jsonl"):
        files.setdefault((row["package"], row["version"]), set()).add(Path(row["path"]).name)
    return [
        {
            "package": package,
            "version": version,
            "licence": licences.get(package, "see the package"),
            "files": sorted(names),
        }
        for (package, version), names in sorted(files.items())
    ]


def _machine(output: Path) -> dict[str, str]:
    run = read_json(output / "pretrain" / "environment.json")
    memory = psutil.virtual_memory().total / 2**30
    rows = {
        "Device": f"{run['device']}, {run['world_size']} processes",
        "Processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "Memory": f"{memory:.0f} GiB",
        "System": str(run["platform"]),
        "Python": str(run["python"]),
    }
    return {**rows, **{name: str(version) for name, version in run["packages"].items()}}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(run_command(main))
