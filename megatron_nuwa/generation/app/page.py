"""The page itself: its parts, and what its buttons do."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.app import drawing
from megatron_nuwa.generation.app.pictures import Arriving, finished_pictures
from megatron_nuwa.generation.app.stream import Progress, stream
from megatron_nuwa.generation.outputs import origin_of, write_media
from megatron_nuwa.generation.palette import colour_names, colours
from megatron_nuwa.generation.regions import composite
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import TASKS, Request, task_named
from megatron_nuwa.generation.trained import Generator

_PAINT = "#ff2d78"
_MOST_SAMPLES = 8
# How many times the model's own length a video may have.
_LONGEST = 6
# Pairs, since the page shows them in two columns: what is read, for an image and for a video.
_PAIRS = (("t2i", "t2v"), ("s2i", "s2v"), ("i2i", "v2v"), ("ti2i", "tv2v"))
# A file that is older than a day is deleted, within an hour.
_DELETE_CACHE = (3_600, 86_400)
_EMPTY = '<div class="empty">What is generated appears here.</div>'
_HINTS = {
    "t2i": "Describe an image.",
    "s2i": "Draw a map: each colour is a class that the model has learnt.",
    "i2i": "Upload a picture and paint over what is to be made new. No text is read.",
    "ti2i": "Upload a picture, paint over what is to change, and describe the result.",
    "t2v": "Describe a video.",
    "s2v": "Draw a map that holds for the whole video: each colour is a class.",
    "v2v": "Upload a video; the model continues its first frames.",
    "tv2v": "Upload a video, paint over what is to change in all frames, and describe the result.",
}


def serving() -> dict[str, Any]:
    """How `launch` is to serve the page: here only, with nothing from elsewhere."""
    return {
        # The fonts of this machine; gradio's other themes fetch theirs from Google.
        "theme": gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css_paths": Path(__file__).with_name("page.css"),
        "share": False,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "mcp_server": False,
    }


def build_page(generator: Generator, folder: Path) -> gr.Blocks:
    """The page for a generator; finished pictures are written below `folder`."""
    tasks = [TASKS[name] for pair in _PAIRS for name in pair]
    if generator.sketch_vqgan is None:
        tasks = [task for task in tasks if task.reads != "sketch"]
    classes = _classes(generator)
    with gr.Blocks(
        analytics_enabled=False, title="megatron_nuwa", delete_cache=_DELETE_CACHE
    ) as page:
        gr.Markdown(f"# megatron_nuwa\n{_about(generator)}")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                task = gr.Radio(
                    [(each.title.capitalize(), each.name) for each in tasks],
                    value="t2i",
                    label="Task",
                    elem_id="task",
                )
                hint = gr.Markdown(_HINTS["t2i"])
                prompt = gr.Textbox(label="Text", lines=2, elem_id="prompt")
                clip = gr.File(
                    label="Video", file_types=["video", ".gif"], visible=False, elem_id="clip"
                )
                picture = _region_editor("Picture", "picture", ("upload", "clipboard"))
                # What is painted on for a video is its first frame.
                frame = _region_editor("First frame", "frame", ())
                sketch, legend = _sketch_editor(generator, classes)
                keep = gr.Slider(
                    *(1, max(2, generator.clip_grid.s - 1)),
                    value=1,
                    step=1,
                    label="Frames taken from the video",
                    visible=False,
                )
                keep_pixels = gr.Checkbox(
                    label="Put the original pixels back outside the painted region", visible=False
                )
                frames = gr.Slider(
                    *(2, _LONGEST * generator.clip_grid.s),
                    value=generator.clip_grid.s,
                    step=1,
                    label="Frames of the video; beyond the model's own, a window slides on",
                    visible=False,
                )
                with gr.Accordion("How tokens are drawn", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                    samples = gr.Slider(1, _MOST_SAMPLES, value=1, step=1, label="Samples")
                    temperature = gr.Slider(0, 2, value=1.0, step=0.05, label="Temperature")
                    top_k = gr.Slider(
                        *(0, generator.model.config.codebook_size),
                        value=0,
                        step=1,
                        label="Top-k (0 is off)",
                    )
                    top_p = gr.Slider(0.05, 1, value=1.0, step=0.05, label="Top-p (1 is off)")
                    guidance = gr.Slider(
                        0,
                        10,
                        value=1.0,
                        step=0.5,
                        label="Guidance towards what is read (1 is none)",
                    )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=6, min_width=320):
                status = gr.HTML(_status(""), elem_id="status")
                result = gr.HTML(_EMPTY, elem_id="result")
                files = gr.File(label="Files", visible=False, elem_id="files")

        def choose(name: str) -> tuple[Any, ...]:
            chosen = task_named(name)
            is_region = chosen.given == "region"
            longest = generator.for_task(name).clip_grid.s
            return (
                _HINTS[name],
                gr.update(visible=chosen.reads == "text"),
                gr.update(visible=chosen.media == "clip", value=None),
                gr.update(visible=is_region and chosen.media == "image"),
                gr.update(visible=is_region and chosen.media == "clip", value=None),
                gr.update(visible=chosen.reads == "sketch"),
                gr.update(visible=chosen.reads == "sketch"),
                # The others have lengths of their own, and a value beyond them would be refused.
                gr.update(visible=True, maximum=max(2, longest - 1), value=1)
                if chosen.given == "frames"
                else gr.update(visible=False),
                gr.update(visible=is_region),
                gr.update(
                    visible=chosen.target == "clip", maximum=_LONGEST * longest, value=longest
                ),
                gr.update(visible=chosen.reads != "none"),
            )

        def show_first_frame(path: str | None, name: str) -> tuple[Any, str]:
            if path is None or task_named(name).given != "region":
                return gr.update(), _status("")
            try:
                shown = drawing.first_frame(generator.for_task(name), Path(path))
            except UserError as error:
                return gr.update(value=None), _status(_sentence(error), wrong=True)
            return {"background": shown, "layers": [], "composite": shown}, _status("")

        def run(
            name: str,
            text: str,
            path: str | None,
            painted: drawing.Drawing | None,
            painted_frame: drawing.Drawing | None,
            drawn: drawing.Drawing | None,
            frames_kept: float,
            pixels_kept: bool,
            length: float,
            first_seed: float | None,
            count: float,
            *drawing_settings: float,
        ) -> Iterator[tuple[str, Any, Any]]:
            yield _status("Reading …"), _EMPTY, gr.update(visible=False, value=None)
            own = generator.for_task(name)
            try:
                settings = _settings(*drawing_settings)
                request = drawing.read_request(
                    own,
                    task_named(name),
                    int(first_seed or 0),
                    prompt=text,
                    picture=painted if task_named(name).media == "image" else painted_frame,
                    clip=None if path is None else Path(path),
                    sketch=drawn,
                    keep_frames=int(frames_kept),
                    frames=int(length),
                )
                requests = [replace(request, seed=request.seed + n) for n in range(int(count))]
                if request.task.reads == "none":
                    settings = replace(settings, guidance=1.0)
                asked = int(length) if request.task.target == "clip" else None
                arriving = Arriving(requests, own.frames_per_second)
                for progress in stream(own, requests, settings, asked):
                    shown = arriving.show(progress)
                    yield _counted(progress), shown or gr.update(), gr.update()
                clips = progress.frames
                if pixels_kept and request.region is not None and request.pixels is not None:
                    clips = composite(clips, request.pixels, request.region)
                written = _write(own, requests, clips, settings, folder)
                finished = finished_pictures(requests, clips, own.frames_per_second)
                yield _status("Done."), finished, gr.update(visible=True, value=written)
            except UserError as error:
                yield _status(_sentence(error), wrong=True), _EMPTY, gr.update()

        parts = [prompt, clip, picture, frame, sketch, legend, keep, keep_pixels, frames, guidance]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        task.change(choose, task, [hint, *parts], **quiet)
        clip.change(show_first_frame, [clip, task], [frame, status], **quiet)
        given = [
            task,
            prompt,
            clip,
            picture,
            frame,
            sketch,
            keep,
            keep_pixels,
            frames,
            seed,
            samples,
        ]
        begins = [start.click, prompt.submit]
        # Said by the browser itself: others' runs come first.
        waiting = json.dumps(_status("Waiting for its turn …"))
        gr.on(begins, None, None, status, js=f"() => {waiting}", **quiet)
        running = gr.on(
            begins,
            run,
            [*given, temperature, top_k, top_p, guidance],
            [status, result, files],
            concurrency_limit=1,
            **quiet,
        )
        stop.click(lambda: _status("Stopped."), None, status, cancels=[running], **quiet)
    return page


def _region_editor(label: str, name: str, sources: tuple[Any, ...]) -> gr.ImageEditor:
    return gr.ImageEditor(
        label=f"{label}: paint over what is to be made new",
        sources=sources,
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=[_PAINT], color_mode="fixed"),
        visible=False,
        elem_id=name,
    )


def _sketch_editor(generator: Generator, classes: int) -> tuple[gr.ImageEditor, gr.HTML]:
    blank = None
    # Gradio wants some even where there is nothing to draw.
    brushes = colours(max(classes, 2))
    if generator.sketch_vqgan is not None:
        blank = drawing.blank_sketch(generator.sketch_vqgan.config.image_size)
    editor = gr.ImageEditor(
        value=None if blank is None else {"background": blank, "layers": [], "composite": blank},
        label="Sketch",
        sources=("upload", "clipboard"),
        transforms=(),
        layers=False,
        brush=gr.Brush(
            default_size=60,
            colors=list(brushes),
            default_color=brushes[1],
            color_mode="fixed",
        ),
        visible=False,
        elem_id="sketch",
    )
    items = "".join(
        f'<span><i style="background:{colour}"></i>{number}: {name}</span>'
        for number, (colour, name) in enumerate(
            zip(colours(classes), colour_names(classes), strict=True)
        )
    )
    return editor, gr.HTML(f'<div class="legend">{items}</div>', visible=False)


def _classes(generator: Generator) -> int:
    return 0 if generator.sketch_vqgan is None else generator.sketch_vqgan.config.classes or 0


def _about(generator: Generator) -> str:
    rows, columns = generator.picture_size
    text = f"Pictures of {columns} × {rows} pixels, videos of {generator.clip_grid.s} frames"
    if generator.checkpoint is None:
        return f"{text}."
    return f"{text}, from `{generator.checkpoint.path}`, step {generator.checkpoint.step:,}."


def _settings(temperature: float, top_k: float, top_p: float, guidance: float) -> SamplingSettings:
    return SamplingSettings(
        temperature, int(top_k) or None, None if top_p >= 1 else top_p, guidance
    )


def _sentence(error: UserError) -> str:
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _status(text: str, wrong: bool = False) -> str:
    kind, role = ("status wrong", "alert") if wrong else ("status", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def _counted(progress: Progress) -> str:
    frames = progress.frames.shape[1]
    what = f"{frames} of {progress.wanted_frames} frames, " if progress.wanted_frames > 1 else ""
    return _status(f"{what}{progress.cells:,} of {progress.wanted_cells:,} tokens")


def _write(
    generator: Generator,
    requests: list[Request],
    clips: np.ndarray,
    settings: SamplingSettings,
    folder: Path,
) -> list[str]:
    place = Path(tempfile.mkdtemp(dir=folder))
    written = []
    for request, clip in zip(requests, clips, strict=True):
        stem = place / f"{request.task.name}-{request.seed}"
        origin = origin_of(generator, request, settings)
        written += write_media(stem, clip, generator.frames_per_second, origin)
    return [str(path) for path in written]
