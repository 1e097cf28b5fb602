"""Write the page of moving digits, from the run's own files.

python -m launch.moving_digits.report runs/moving_digits
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from launch.moving_digits.motions import DIGITS, MOTIONS, motion_text
from launch.moving_digits.poster import write_poster
from launch.moving_digits.results import held_out_score, read_goals, read_scores
from launch.moving_digits.scorer import (
    Reading,
    Scores,
    decoded,
    read_world,
    reconstruct,
    scored_file,
    settings_of,
    share_text,
)
from launch.moving_digits.sizes import SIZES, Size
from launch.moving_digits.stages import BEFORE_PAGE, TASKS
from launch.moving_digits.world import World
from launch.workflow.charts import loss_chart
from launch.workflow.display import duration
from launch.workflow.results import read_json, read_log, stage_records
from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.decoders import decode_sketch
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.generation.media import animation, still
from megatron_nuwa.generation.tasks import TASKS as EVERY_TASK
from megatron_nuwa.generation.tasks import task_named
from megatron_nuwa.models.segmentation import palette
from megatron_nuwa.models.vqgan import load_vqgan
from megatron_nuwa.pages import render_page

# Clips and images that the page shows of each set.
_SHOWN, _SHOWN_IMAGES, _RECONSTRUCTED = 64, 20, 8
_UNREAD = "unclear"
_HOW = {
    "s2i": "From a map that says where the ink of which digit is.",
    "i2i": "The upper half was given, without a text.",
    "ti2i": "The upper half was given, and a caption.",
    "s2v": "From a map for every frame.",
    "v2v": "The first two frames were given, without a text.",
    "tv2v": "The first frame was given, and a caption that asks for another motion.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = CommandParser(
        prog="python -m launch.moving_digits.report",
        description="Write report.html and poster.gif into the folder of a run whose other stages "
        "are done.",
        example="python -m launch.moving_digits.report runs/moving_digits",
    )
    parser.add_argument("output", type=Path, help="the run's folder, such as runs/moving_digits")
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    page = render_report(SIZES[options.size], options.output)
    write_text_atomically(options.output / "report.html", page)
    shown = held_out_score(read_scores(options.output)).readings
    write_poster(options.output / "poster.gif", read_world(options.output / "media"), shown)
    print(f"{options.output / 'report.html'}: {len(page.encode()) / 2**20:.1f} MiB")
    return 0


def render_report(size: Size, output: Path) -> str:
    """The page's HTML; `UserError` names the first file that is absent or broken."""
    if not output.is_dir():
        raise UserError(f"{output} is not a folder; run python -m launch.moving_digits first")
    scores, world = read_scores(output), read_world(output / "media")
    asked = held_out_score(scores).readings
    return render_page(
        Path(__file__).with_name("report.html.j2"),
        {"duration": duration},
        output=output,
        goals=read_goals(size, output),
        scores=_score_rows(scores),
        world=world,
        example=asked[len(asked) // 2].caption,
        clips=_shown(world, _spread(asked, _SHOWN)),
        images=_shown(world, _spread(_images(scores), _SHOWN_IMAGES)),
        others=[_other_task(world, output, task) for task in TASKS],
        reconstructions=_reconstructions(world, output, scores),
        digits=_digit_confusion(asked),
        motions=_motion_confusion(asked),
        chart=Markup(loss_chart(read_log(output / "pretrain"))),
        heldout=read_json(output / "pretrain" / "evaluation.json")["heldout"]["tasks"],
        titles={name: task.title for name, task in EVERY_TASK.items()},
        stages=stage_records(output, BEFORE_PAGE),
    )


def _score_rows(scores: Scores) -> list[dict[str, Any]]:
    own = {"real held-out clips": scores.real, "the same, reconstructed": scores.reconstructed}
    return [
        {
            "name": name,
            "count": len(score.readings),
            "shares": [share_text(share) for share in (score.digit, score.motion, score.both)],
        }
        for name, score in {**own, **{score.name: score for score in scores.samples}}.items()
    ]


def _images(scores: Scores) -> list[Reading]:
    return [r for score in scores.samples for r in score.readings if r.motion is None]


def _spread(readings: list[Reading], count: int) -> list[Reading]:
    """`count` readings at equal distances."""
    if len(readings) <= count:
        return readings
    return [readings[len(readings) * place // count] for place in range(count)]


def _shown(world: World, readings: list[Reading]) -> list[dict[str, Any]]:
    """Samples as pictures, with what was asked and what was read."""
    items = [(Path(reading.file), reading.caption) for reading in readings]
    return [
        {
            "source": _picture(world, frames),
            "caption": reading.caption,
            "digit": reading.read_digit,
            "digit_is_right": reading.digit_is_right,
            "motion": motion_text(reading.read_motion) if reading.read_motion else _UNREAD,
            "motion_is_right": reading.motion_is_right,
        }
        for reading, (_, frames, _) in zip(readings, decoded(world, items), strict=True)
    ]


def _other_task(world: World, output: Path, name: str) -> dict[str, Any]:
    """What one of the tasks that are not scored started from, and what it made of it."""
    folder = output / "samples" / name
    entries = read_json(folder / "samples.json")
    made = [(folder / scored_file(folder, entry["files"]), entry["prompt"]) for entry in entries]
    rows = []
    for entry, (_, frames, prompt) in zip(entries, decoded(world, made), strict=True):
        if "sketch" in entry:
            settings = settings_of(world, len(frames))
            maps, _ = decode_sketch(Path(entry["sketch"]), settings, DIGITS + 1)
            given = palette(DIGITS + 1)[maps]
        else:
            [(_, given, _)] = decoded(world, [(Path(entry["given"]), prompt)])
        rows.append({"given": _picture(world, given), "made": _picture(world, frames)})
    task = task_named(name)
    prompt = entries[0]["prompt"] if task.reads == "text" and name.startswith("t") else None
    return {"name": name, "title": task.title, "prompt": prompt, "how": _HOW[name], "rows": rows}


def _reconstructions(world: World, output: Path, scores: Scores) -> list[dict[str, Any]]:
    """Real held-out clips beside what the VQ-GAN makes of them."""
    vqgan = load_vqgan(output / "vqgan")
    readings = _spread(scores.reconstructed.readings, _RECONSTRUCTED)
    items = [(Path(reading.file), reading.caption) for reading in readings]
    return [
        {
            "caption": caption,
            "real": _picture(world, frames),
            "reconstructed": _picture(world, reconstruct(vqgan, frames)),
        }
        for _, frames, caption in decoded(world, items)
    ]


def _picture(world: World, frames: np.ndarray) -> str:
    """A data address of an image, or of a clip that plays."""
    return still(frames[0]) if len(frames) == 1 else animation(frames, world.frames_per_second)


def _digit_confusion(readings: list[Reading]) -> dict[str, Any]:
    names = [str(digit) for digit in range(DIGITS)]
    pairs = [(str(reading.digit), str(reading.read_digit)) for reading in readings]
    return _confusion(names, names, pairs)


def _motion_confusion(readings: list[Reading]) -> dict[str, Any]:
    names = [motion_text(motion) for motion in MOTIONS]
    pairs = [
        (
            motion_text(reading.motion),
            motion_text(reading.read_motion) if reading.read_motion else _UNREAD,
        )
        for reading in readings
        if reading.motion
    ]
    return _confusion(names, [*names, _UNREAD], pairs)


def _confusion(asked: list[str], read: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Counts of what was read for what was asked, and each count's share of its row."""
    counts = np.zeros((len(asked), len(read)), int)
    for wanted, found in pairs:
        counts[asked.index(wanted), read.index(found)] += 1
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    cells = [
        [{"count": int(n), "share": float(share)} for n, share in zip(*row, strict=True)]
        for row in zip(counts, shares, strict=True)
    ]
    return {"asked": asked, "read": read, "rows": list(zip(asked, cells, strict=True))}


if __name__ == "__main__":
    sys.exit(run_command(main))
