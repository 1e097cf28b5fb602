"""The farm's page, `CORPUS.farm/report.html`: what went in, what came out, what failed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.generation.palette import coloured
from megatron_nuwa.models.segmentation import class_map
from megatron_nuwa.pages import render_page
from preprocessing.encoder import Encoders, FrameEncoder
from preprocessing.histograms import Counted, failure_bars, histogram, outcome_bars, shot_bars
from preprocessing.plan import PlanStamp
from preprocessing.shown_samples import Sample
from preprocessing.stats import codebook_use
from preprocessing.watch import Watch


def write_report(
    path: Path,
    corpus_folder: Path,
    samples: Sequence[Sample],
    encoders: Encoders,
    watch: Watch,
    engines: Sequence[str],
    plan: PlanStamp | None = None,
) -> str:
    """Write the page and say where it is, or why there is none.

    `plan` says what the source's items are, where it is still there.
    """
    corpus = Corpus(corpus_folder)
    manifest, counted = corpus.manifest, Counted.of(corpus)
    perplexity, used = codebook_use(counted.codes)
    frames = corpus.grid.s
    page = render_page(
        Path(__file__).with_name("report.html.j2"),
        corpus=corpus_folder,
        manifest=manifest,
        cards=_cards(watch),
        roles=watch.roles,
        engines=engines,
        samples=[_pictures(sample, encoders) for sample in samples],
        outcome=outcome_bars(manifest),
        shots=shot_bars(plan),
        sampled=counted.items,
        captions=histogram(counted.lengths),
        clips=histogram(counted.real_frames(frames), first=1) if frames > 1 else [],
        padded=counted.facts.padded(frames),
        faster=counted.facts.faster,
        codes=histogram(np.sort(counted.codes)[::-1]),
        perplexity=perplexity,
        used=used,
        failures=failure_bars(corpus_folder),
    )
    try:
        write_text_atomically(path, page)
    except OSError as error:
        return f"no report: {path} cannot be written: {error.strerror or error}"
    return f"report {path}"


def _cards(watch: Watch) -> list[tuple[str, str, str]]:
    figures, seconds = watch.figures, max(watch.seconds, 1e-9)
    items = max(1, figures.items)
    return [
        ("items a second", f"{figures.items / seconds:,.1f}", f"{figures.items:,} in this run"),
        ("frames a second", f"{figures.frames / seconds:,.1f}", "encoded"),
        ("duration", str(timedelta(seconds=round(seconds))), f"{figures.shards:,} shards written"),
        ("decoding", f"{figures.decode_seconds / items * 1e3:,.1f} ms", "an item"),
        ("encoding", f"{figures.encode_seconds / items * 1e3:,.1f} ms", "an item"),
        (
            "encoders starved",
            f"{figures.starved:.0%}",
            f"queue {figures.fill:.0%} full on average",
        ),
    ]


def _pictures(sample: Sample, encoders: Encoders) -> dict[str, Any]:
    """A sample's frames and sketch, and what their tokens are decoded to."""
    images = _decoded(sample.frames, encoders.frames)
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    reconstructed = pixels.permute(0, 2, 3, 1).numpy()
    error = np.mean((reconstructed.astype(np.float64) - sample.frames) ** 2)
    shown = {
        "id": sample.item.id,
        "caption": sample.item.captions[0],
        "original": _side_by_side(sample.frames),
        "reconstruction": _side_by_side(reconstructed),
        "psnr": 10 * np.log10(255**2 / max(float(error), 1e-9)),
        "sketch": None,
    }
    if sample.maps is None or encoders.sketches is None:
        return shown
    found = class_map(_decoded(sample.maps, encoders.sketches)).numpy()
    classes = encoders.sketches.vqgan.config.classes
    assert classes is not None
    shown["sketch"] = {
        "original": _side_by_side(coloured(sample.maps, classes)),
        "reconstruction": _side_by_side(coloured(found, classes)),
        "accuracy": float(np.mean(found == sample.maps)),
    }
    return shown


def _decoded(frames: np.ndarray, encoder: FrameEncoder) -> Tensor:
    """What the tokens of frames or maps stand for: pictures, or logits of classes."""
    tokens = torch.from_numpy(encoder.start(frames).tokens().astype(np.int64))
    device = next(encoder.vqgan.parameters()).device
    with torch.inference_mode():
        return encoder.vqgan.decode(tokens.to(device)).float().cpu()


def _side_by_side(frames: np.ndarray) -> str:
    return _address(np.concatenate(list(frames), axis=1))


def _address(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
