"""The farm's memory does not grow with the number of its items, in any of its processes.

What is known to grow is left out: the plan of the manifest, before the first item, and the hashes
of the filter `near_duplicates`, after the last one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, WriteClip, tokenize_command, write_manifest
from farm_memory import Reading, growth, step, watch_farm
from farm_runs import kill_farm, start_farm
from PIL import Image
from process_memory import MIB, forget_highest_memory, highest_memory, own_memory

from megatron_nuwa.data.shards import read_manifest
from megatron_nuwa.decoders import guard
from megatron_nuwa.decoders.pyav_backend import PyavBackend
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS, DecodeSettings
from preprocessing.__main__ import main

ITEMS_PER_SHARD = 100
FILES = {"images": 16, "clips": 6}
# Bytes an item. An hour is some 774,000 images of 4.65 ms, or 36,700 clips of 98 ms, so a process
# may grow by 77 or 6 MB in it. What comes once may come besides.
MOST_GROWTH = {"images": 100, "clips": 150}
MOST_STEP = 4 * MIB
# Three for each part that `growth` looks at.
FEWEST_READINGS = 15
WORDS = [first + last for first in ("ba", "ko", "ri", "tu", "le", "mo") for last in ("lam", "ron")]
FILTERS = {
    "images": "filters: [{name: caption_length, fewest: 2}, {name: minimum_size, pixels: 24}]",
    "clips": "filters: [{name: caption_length, fewest: 2}]",
}
# A second process of the group decodes.
UNDER_MPI = ("--decode-ranks-per-encoder", "1")
MPI_PROCESSES = {"launcher", "rank 0", "rank 1"}

LEAKS = """
import sys

held = []


def leaking(function):
    def leaks(*arguments):
        held.append(bytearray(b"x" * 1024))
        return function(*arguments)

    return leaks


if "preprocessing" in sys.orig_argv:
    from preprocessing.assembly import ShardAssembly
    from preprocessing.decode_worker import ItemDecoder

    ShardAssembly.take = leaking(ShardAssembly.take)
    ItemDecoder.decode = leaking(ItemDecoder.decode)
elif "megatron_nuwa.decoders.worker" in sys.orig_argv:
    from megatron_nuwa.decoders import images

    images.decode_image = leaking(images.decode_image)
"""


@pytest.fixture(scope="module")
def small_media(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> Path:
    """Images and clips of several sizes, an image that is too small, and a broken one of each."""
    folder = tmp_path_factory.mktemp("small_media")
    choose = np.random.default_rng(0)
    sizes = [(640, 480)] + [(33 + 5 * n, 90 - 3 * n) for n in range(1, FILES["images"])]
    for n, (width, height) in enumerate(sizes):
        noise = choose.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"images{n}", "PNG" if n % 2 else "JPEG")
    Image.new("RGB", (20, 16)).save(folder / "small", "PNG")
    for n in range(FILES["clips"]):
        levels = [30 * n + k for k in range(8)]
        write_clip(folder / f"{n}.mp4", levels, 10, (64 + 16 * n, 48)).rename(folder / f"clips{n}")
    for kind in FILES:
        whole = (folder / f"{kind}1").read_bytes()
        (folder / f"broken-{kind}").write_bytes(whole[: len(whole) // 2])
        (folder / f"{kind}.yaml").write_text(FILTERS[kind])
    return folder


def write_items(folder: Path, kind: str, items: int) -> Path:
    """Of forty items two fail and two, of images four, are left out."""
    choose = random.Random(0)
    path = folder / f"{kind}-{items}.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for n in range(items):
            media = f"{kind}{n % FILES[kind]}"
            if n % 20 == 7:
                media = f"lost-{n}" if n % 40 == 7 else f"broken-{kind}"
            elif n % 20 == 3 and kind == "images":
                media = "small"
            lengths = [1 if n % 20 == 11 else choose.randint(2, 12) for _ in range(1 + n % 3)]
            captions = [" ".join(choose.choices(WORDS, k=length)) for length in lengths]
            row = {"id": f"item-{n:08d}", "media": media, "captions": captions}
            stream.write(json.dumps(row) + "\n")
    return path


def farm_arguments(kind: str, media: Path, items: int, output: Path, tools: Path) -> list[str]:
    """Small batches, so that what is in use at a moment hides nothing."""
    options = ["--batch-size", "8", "--items-per-shard", str(ITEMS_PER_SHARD)]
    if kind == "clips":
        options += ["--frames", "2"]
    options += ["--filters", str(media / f"{kind}.yaml")]
    return tokenize_command(write_items(media, kind, items), output, tools, *options)


def assert_flat(readings: Sequence[Reading], names: set[str], most: float) -> None:
    found = {name for reading in readings for name in reading.own}
    assert found == names
    slopes = {name: round(growth(readings, name), 1) for name in sorted(names)}
    steps = {name: round(step(readings, name) / MIB, 2) for name in sorted(names)}
    print(f"{readings[0].items} to {readings[-1].items} items:")
    print(f"bytes an item: {slopes}; MiB more in the last quarter: {steps}")
    print("MiB at the end:", {name: own // MIB for name, own in readings[-1].own.items()})
    assert max(slopes.values()) < most
    assert max(steps.values()) * MIB < MOST_STEP


def watch_farm_of(
    ranks: int, arguments: list[str], folder: Path, wanted: int | None = None, **more: str
) -> list[Reading]:
    """Readings of a farm until there are as many as wanted, or until it has ended well."""
    log = folder / "log"
    farm = start_farm(ranks, [*arguments, *(UNDER_MPI if ranks > 1 else ())], log, **more)
    try:
        readings = watch_farm(farm, folder / "corpus", ITEMS_PER_SHARD, wanted)
        assert farm.poll() in (None, 0), log.read_text()
    finally:
        if farm.poll() is None:
            kill_farm(farm, folder / "corpus", "ranks", random.Random(0))
    assert len(readings) >= FEWEST_READINGS, log.read_text()
    return readings


def test_a_farm_of_two_ranks_does_not_grow(small_media: Path, tools: Path, tmp_path: Path) -> None:
    arguments = farm_arguments("images", small_media, 40_000, tmp_path / "corpus", tools)
    readings = watch_farm_of(2, arguments, tmp_path, wanted=40)
    assert_flat(readings, {*MPI_PROCESSES, "worker of rank 1"}, MOST_GROWTH["images"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kind", "items", "decoder"),
    [
        (2, "images", 30_000, "ffmpeg"),
        (1, "images", 30_000, "ffmpeg"),
        (2, "clips", 3_000, "ffmpeg"),
        (2, "clips", 8_000, "pyav"),
        (1, "clips", 8_000, "pyav"),
    ],
)
def test_a_long_farm_does_not_grow(
    small_media: Path,
    tools: Path,
    tmp_path: Path,
    ranks: int,
    kind: str,
    items: int,
    decoder: str,
) -> None:
    output = tmp_path / "corpus"
    arguments = farm_arguments(kind, small_media, items, output, tools)
    readings = watch_farm_of(ranks, [*arguments, "--decoder", decoder], tmp_path)
    counts = read_manifest(output).counts
    assert counts.failed == items // 20
    assert set(counts.left_out.values()) == {items // 20}
    names = MPI_PROCESSES if ranks > 1 else {"rank 0"}
    if kind == "images" or decoder == "pyav":
        names = {*names, f"worker of rank {ranks - 1}"}
    assert_flat(readings, names, MOST_GROWTH[kind])


@pytest.mark.slow
def test_a_kilobyte_an_item_is_found_in_every_process(
    small_media: Path, tools: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LEAKS)
    arguments = farm_arguments("images", small_media, 40_000, tmp_path / "corpus", tools)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    readings = watch_farm_of(2, arguments, tmp_path, wanted=40, PYTHONPATH=path)
    slopes = {name: growth(readings, name) for name in readings[-1].own}
    assert slopes.pop("launcher") < MOST_GROWTH["images"]
    assert set(slopes) == {"rank 0", "rank 1", "worker of rank 1"}
    for name, slope in slopes.items():
        assert slope > 5 * MOST_GROWTH["images"], name


def test_growth_is_that_of_a_leak_and_not_of_a_step_or_of_noise() -> None:
    noise = random.Random(0)

    def readings(leak: int) -> list[Reading]:
        one_step = [0] * 25 + [MIB] * 15
        return [
            Reading(
                100 * n, {"rank 0": 10**8 + leak * 100 * n + one_step[n] + noise.randrange(8192)}
            )
            for n in range(40)
        ]

    assert abs(growth(readings(0), "rank 0")) < 10
    assert growth(readings(120), "rank 0") > 100
    assert step(readings(0), "rank 0") == pytest.approx(MIB, abs=8192)


def test_a_decode_worker_gives_back_all_that_clips_took(small_media: Path) -> None:
    pytest.importorskip("av")
    settings = DecodeSettings(image_size=32, frames=2, backend="pyav")
    clips, readings = PyavBackend(), []
    guard.end_workers()
    for number in range(1200):
        path = small_media / f"clips{number % FILES['clips']}"
        clips.frames(path, settings, 0.0, 2, Fraction("2.5"), DEFAULT_LIMITS)
        if number >= 200 and number % 25 == 0:
            [worker] = guard.worker_processes()
            readings.append(Reading(number, {"worker": own_memory(worker)}))
    assert growth(readings, "worker") < 80


def test_ten_times_the_items_need_no_higher_peak(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The plan before the first item and the commit after the last one are counted here, too.
    peaks = {}
    # The first run only warms up what a process allocates once.
    for name, count in (("warm", 200), ("few", 200), ("many", 2000)):
        rows: list[dict[str, object]] = [
            {"id": n, "media": f"image{n % 6}.png", "captions": CAPTIONS} for n in range(count)
        ]
        manifest = write_manifest(media / f"{name}.jsonl", rows)
        forget_highest_memory()
        more = ("--items-per-shard", "50")
        assert main(tokenize_command(manifest, tmp_path / name, tools, *more)) == 0
        peaks[name] = highest_memory()
    # 1,800 more items of 3 KiB of pixels and as much of the rest would need 10 MiB.
    assert peaks["many"] - peaks["few"] < 4 * MIB
