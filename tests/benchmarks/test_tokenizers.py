"""The tokenizers' benchmark: what it counts, what it promises, and a small run of all of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from benchmarks import tokenizers
from benchmarks.harness.codebook_use import codebook_use
from benchmarks.harness.colour_maps import COLOURS, colour_map
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of coloured fields, under the names of the demo's manifests."""
    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    for manifest, count in (
        ("train-clips", 6),
        ("train-images", 10),
        ("heldout-clips", 1),
        ("heldout-images", 3),
    ):
        rows = []
        for number in range(count):
            fields = Image.fromarray(random.integers(0, 255, (3, 3, 3)).astype(np.uint8))
            name = f"{manifest}-{number}.png"
            fields.resize((96, 96), Image.Resampling.BICUBIC).save(folder / name)
            rows.append({"id": f"{manifest}-{number}", "media": name, "captions": ["fields"]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{manifest}.jsonl").write_text(text)
    return folder


def smaller(settings: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    """The same with a smaller model and fewer pictures a step."""

    def changed(steps: int, codes: int) -> dict[str, Any]:
        found = settings(steps, codes)
        sizes = {"base_channels": 16, "image_size": 32}
        return {**found, "model": {**found["model"], **sizes}, "batch_size": 8}

    return changed


def test_a_small_run_uses_its_codes_and_does_not_diverge(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from launch.train_vqgan import main

    def train_in_this_process(command: Sequence[str]) -> None:
        monkeypatch.setattr(sys, "argv", list(command[1:]))
        main()

    monkeypatch.setattr(tokenizers, "_run", train_in_this_process)
    for kind in ("picture_settings", "map_settings"):
        monkeypatch.setattr(tokenizers, kind, smaller(getattr(tokenizers, kind)))
    options = ("--codes", "24", "--steps", "80", "--map-steps", "80", "--seeds", "0")
    folders = ("--work", str(tmp_path), "--media", str(media), "--output", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tokenizers", *folders, *options])
    tokenizers.main()
    [result] = tmp_path.glob("tokenizers_*.json")
    report = json.loads(result.read_text())
    [pictures], [maps] = report["pictures"], report["maps"]
    assert pictures["vectors"] == 16 * 16
    assert 20 <= pictures["fillable"] <= 24
    assert pictures["used"] / pictures["fillable"] == pictures["use"] >= 0.9
    assert pictures["after_start"]["is_finite"]
    assert pictures["after_start"]["skipped_steps"] == 0
    assert pictures["after_start"]["reconstruction_rise"] < 1.5
    # Sixteen maps teach little about others.
    assert maps["pixel_accuracy"] > maps["chance"]


@torch.no_grad()
def test_use_is_held_against_what_kmeans_fills_on_the_same_vectors() -> None:
    torch.manual_seed(0)
    config = VqganConfig(
        image_size=16, downsampling=4, base_channels=8, residual_blocks=1, codebook_size=40
    )
    model = Vqgan(config).eval()
    frames = np.random.default_rng(0).integers(0, 255, (6, 20, 20, 3)).astype(np.uint8)
    # All codes but three lie where no vector is nearest to them.
    found = model.quantizer.to_lookup(
        model.encoder(torch.from_numpy(frames[:, 2:18, 2:18]).movedim(3, 1) / 127.5 - 1)
    )
    model.quantizer.table.copy_(-found.mean(0))
    model.quantizer.table[:3] = found[:3]
    use = codebook_use(model, frames)
    assert use.vectors == len(found) == 6 * 16
    assert 3 <= use.used <= 4
    assert use.fillable >= 38
    assert use.use == use.used / use.fillable
    model.quantizer.table.copy_(found[torch.linspace(0, len(found) - 1, 40).long()])
    assert codebook_use(model, frames).used == 40


def test_fewer_distinct_vectors_than_codes_can_fill_fewer() -> None:
    config = VqganConfig(
        image_size=16, downsampling=4, base_channels=8, residual_blocks=1, codebook_size=40
    )
    frames = np.zeros((6, 20, 20, 3), np.uint8)
    frames[:3] = 200
    # Borders differ from the inside, so a plain picture has a few kinds of vectors.
    assert codebook_use(Vqgan(config).eval(), frames).fillable < 40


def test_each_broken_promise_is_a_sentence() -> None:
    after = {
        "is_finite": True,
        "skipped_steps": 0,
        "adversarial_scale": 1,
        "reconstruction_rise": 1.1,
        "psnr_change_db": 0.3,
    }
    good = {"seed": 0, "use": 0.95, "after_start": after}
    assert tokenizers.broken_promises([good], [{"seed": 0, "pixel_accuracy": 0.96}]) == []
    bad = [
        {**good, "use": 0.89},
        {**good, "after_start": {**after, "is_finite": False}},
        {**good, "after_start": {**after, "skipped_steps": 1}},
        {**good, "after_start": {**after, "reconstruction_rise": 2.0}},
        {**good, "after_start": {**after, "psnr_change_db": -2.0}},
    ]
    assert len(tokenizers.broken_promises(bad, [{"seed": 1, "pixel_accuracy": 0.94}])) == 6


def test_maps_are_regions_of_named_colours_and_the_same_every_time() -> None:
    frames = np.zeros((2, 40, 40, 3), np.uint8)
    frames[:, :, 20:] = (255, 0, 0)
    frames[1, 20:, :20] = (255, 255, 255)
    maps = colour_map(frames)
    assert maps.shape == (2, 40, 40)
    assert np.array_equal(maps, colour_map(frames))
    named = {name: COLOURS.index(name) for name in ("black", "red", "white")}
    assert maps[0, 10, 5] == maps[1, 10, 5] == named["black"]
    assert maps[0, 10, 35] == maps[1, 35, 35] == named["red"]
    assert maps[1, 35, 5] == named["white"]
