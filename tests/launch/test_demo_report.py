"""The demo's page, rendered from a small run folder that the test writes."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.demo import report
from launch.demo.results import read_goals, skipped_items
from launch.demo.showcase import peak_signal_to_noise
from launch.demo.sketches import draw_sketch
from launch.workflow.runner import StageRecord, record_path
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, save_vqgan

HOSTILE = 'a cat <script>alert("1")</script> & a dog'
SIDE = 32


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_media(folder: Path) -> None:
    (folder / "clips").mkdir(parents=True)
    (folder / "sketches").mkdir()
    clip = folder / "clips/ball-00000.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=1.2"]
    command = [ffmpeg_program(), "-v", "error", *source, str(clip)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "still.png")
    items = []
    for name, media, suffix, captions in (
        ("ball-00000", "clips/ball-00000.mp4", ".gif", [HOSTILE]),
        ("still", "still.png", ".png", ["coloured noise"]),
    ):
        sketch = f"sketches/{name}{suffix}"
        draw_sketch(folder / media, folder / sketch)
        items.append({"id": name, "media": media, "captions": captions, "sketch": sketch})
    write_lines(folder / "heldout-clips.jsonl", items[:1])
    write_lines(folder / "heldout-images.jsonl", items[1:])
    source_file = {"package": "gradio", "version": "6.31.0", "path": "gradio/world.mp4"}
    write_lines(folder / "provenance.jsonl", [{"id": "ball-00000", **source_file}])


def write_runs(output: Path) -> None:
    torch.manual_seed(0)
    config = VqganConfig(
        image_size=SIDE, downsampling=8, base_channels=8, residual_blocks=1, codebook_size=32
    )
    (output / "vqgan").mkdir()
    save_vqgan(Vqgan(config), output / "vqgan/vqgan.safetensors")
    figures = {"psnr_db": 21.25, "used_fraction": 0.75, "perplexity": 20.0, "frames": 9}
    write_json(output / "vqgan/evaluation.json", figures)
    write_lines(
        output / "vqgan/log.jsonl",
        [
            {
                "step": s,
                "samples": s,
                "seconds": s,
                "train/loss/reconstruction": 1 / s,
                "eval/psnr": s,
            }
            for s in (10, 20, 30)
        ],
    )
    task = {"loss_nats": 3.0, "unigram_entropy_nats": 4.0, "below_unigram": 0.25}
    write_json(output / "pretrain/evaluation.json", {"heldout": {**task, "tasks": {"t2v": task}}})
    environment = {"device": "cpu", "world_size": 2, "platform": "Linux", "python": "3.11.0"}
    write_json(
        output / "pretrain/environment.json", {**environment, "packages": {"torch": "2.13.0"}}
    )
    write_lines(
        output / "pretrain/log.jsonl",
        [
            {"step": s, "samples": s, "seconds": s, "train/loss/t2v": 5 / s}
            | {"speed/tokens_per_second": 1234.0}
            for s in (10, 20, 30)
        ],
    )


def write_corpora(output: Path) -> None:
    for name, failed in (("train-clips", 1), ("heldout-clips", 0)):
        counts = {"items": 5, "captions": 6, "failed": failed}
        write_json(output / "corpus" / name / "corpus.json", {"counts": counts})
        failures = [{"id": "torn", "reason": "torn.mp4: moov atom not found"}] * failed
        write_json(output / "corpus" / name / "shard-000000.json", {"failures": failures})


def write_samples(output: Path) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), (20 * k, 90, 200 - 20 * k)) for k in range(8)]
    clip, still = output / "media/clips/ball-00000.mp4", output / "media/still.png"
    starts: dict[str, dict[str, Any]] = {
        "t2i": {},
        "t2v": {},
        "s2i": {"sketch": str(output / "media/sketches/still.png")},
        "s2v": {"sketch": str(output / "media/sketches/ball-00000.gif")},
        "i2i": {"given": str(still), "region": "0.5,0,1,1"},
        "v2v": {"given": str(clip)},
        "ti2i": {"given": str(still), "region": "0.5,0,1,1"},
        "tv2v": {"given": str(clip), "region": "0.5,0,1,1"},
    }
    for task, start in starts.items():
        folder = output / "samples" / task
        folder.mkdir(parents=True)
        suffix = "png" if task.endswith("i") else "gif"
        if suffix == "png":
            frames[0].save(folder / "0.png")
        else:
            frames[0].save(folder / "0.gif", save_all=True, append_images=frames[1:], duration=125)
        sample = {"task": task, "prompt": HOSTILE, "seed": 0, "files": [f"0.{suffix}"], **start}
        write_json(folder / "samples.json", [sample])


def write_records(output: Path) -> None:
    for name, seconds in (("vqgan", 100.0), ("pretrain", 61.0)):
        record = StageRecord(
            name=name,
            title=f"The stage {name}",
            state="done",
            key="",
            commands=[f"deepspeed launch/{name}.py recipe.yaml training.stop_at_step=20"],
            log="",
            seconds=seconds,
            peak_memory_bytes=3 * 2**30,
        )
        write_json(record_path(output, name), record.model_dump())


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "demo"
    write_media(folder / "media")
    write_runs(folder)
    write_corpora(folder)
    write_samples(folder)
    write_records(folder)
    return folder


@pytest.fixture(scope="module")
def page(output: Path) -> str:
    assert report.main([str(output)]) == 0
    return (output / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects the elements of a page, and which are still open at its end."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_self_contained_well_formed_file(page: str) -> None:
    elements = Elements(page)
    assert elements.open == []
    for tag, attributes in elements.found:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            address = attributes.get(name) or "data:"
            assert address.startswith(("data:", "#")), (tag, name, address)
        assert tag not in ("script", "iframe", "object", "embed", "base")
    assert not re.search(r"url\(\s*['\"]?(?!#|data:)", page)
    assert "@import" not in page
    assert len(page.encode()) < 12 * 2**20


def test_a_caption_with_markup_is_shown_as_text(page: str) -> None:
    assert "<script" not in page
    assert "a cat &lt;script&gt;alert(" in page


def test_clips_play_for_ever_and_pictures_keep_every_pixel(page: str) -> None:
    kinds = []
    for tag, attributes in Elements(page).found:
        if tag != "img":
            continue
        head, _, content = str(attributes["src"]).partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            # Those with an outline are enlarged, so that it is a fine line.
            assert image.size in ((SIDE, SIDE), (10 * SIDE, 10 * SIDE))
            kinds.append((head, getattr(image, "n_frames", 1)))
            if head == "data:image/webp":
                assert image.info["loop"] == 0
    # T2V; what S2V, V2V and TV2V wrote; the sketch, the outlined clip; and twice the real clip.
    assert kinds.count(("data:image/webp", 8)) == 8
    # T2I; what S2I, I2I and TI2I wrote; the sketch, the kept half, the outlined image; the given
    # frame; twice the real image; two held-out frames each beside its reconstruction.
    assert kinds.count(("data:image/png", 1)) == 14
    assert "image-rendering: pixelated" in page


def test_figures_commands_and_skipped_items_come_from_the_run(page: str, output: Path) -> None:
    for text in ("21.2 dB", "75%", "25%", "2 min 41 s", "3.0 GiB", "1,234 tokens/s"):
        assert text in page
    words = re.sub(r"</?span>", "", page)
    assert "<pre>deepspeed launch/vqgan.py recipe.yaml training.stop_at_step=20</pre>" in words
    assert "torn.mp4: moov atom not found" in page
    assert [item.id for item in skipped_items(output)] == ["torn"]
    assert page.count("<svg") == 3
    assert "stopped and resumed" in page
    assert str(output.parent) not in re.sub(r"<code>.*?</code>", "", page)


def test_missed_goals_are_called_missed(output: Path, tmp_path: Path) -> None:
    assert all(goal.met for goal in read_goals(output))
    write_json(
        tmp_path / "vqgan/evaluation.json", {"psnr_db": 19.9, "used_fraction": 0.49, "frames": 1}
    )
    poor = {"loss_nats": 3.5, "unigram_entropy_nats": 4.0, "below_unigram": 0.125}
    write_json(tmp_path / "pretrain/evaluation.json", {"heldout": poor})
    assert not any(goal.met for goal in read_goals(tmp_path))


def test_psnr_is_that_of_bytes() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert peak_signal_to_noise(black, black + 255) == pytest.approx(0.0)
    assert peak_signal_to_noise(black, black + 51) == pytest.approx(20 * np.log10(5))
    assert peak_signal_to_noise(black, black) == 100.0


def test_a_run_that_is_not_finished_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"vqgan/evaluation.json"):
        report.main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
