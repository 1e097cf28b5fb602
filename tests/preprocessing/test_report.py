"""The farm's page: its bars are there, and add up to what the corpus holds and what it has lost."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import run_farm

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import TextTokenizer
from preprocessing.__main__ import main
from preprocessing.histograms import failure_bars, histogram
from preprocessing.stats import failure_kinds

CLIPS = ("--frames", "4", "--fps", "5", "--short-clips", "pad", "--items-per-shard", "4")


class Page(HTMLParser):
    """The bars of a page by the id of what they stand in, each with its label, count and size."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.bars: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.sizes: dict[str, list[float]] = defaultdict(list)
        self.text = path.read_text(encoding="utf-8")
        self._place = ""
        self._label: list[str] | None = None
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self._place = found.get("id", self._place)
        if "data-count" in found:
            label = found.get("title", "").partition(":")[0]
            self.bars[self._place].append((label, int(found["data-count"])))
        if size := re.search(r"(?:height|width): ([\d.]+)%", found.get("style", "")):
            self.sizes[self._place].append(float(size[1]))
        self._label = [] if tag == "span" else None

    def handle_data(self, data: str) -> None:
        if self._label is not None:
            self._label.append(data)

    def handle_endtag(self, tag: str) -> None:
        # The first text of a row is its label.
        if tag == "span" and self._label and self.bars[self._place]:
            label, count = self.bars[self._place][-1]
            self.bars[self._place][-1] = (label or "".join(self._label), count)
        self._label = None

    def counts(self, place: str) -> list[int]:
        return [count for _, count in self.bars[place]]


def check(corpus: Path) -> Page:
    """Hold the bars of a corpus's page against the corpus."""
    page = Page(corpus.with_name(f"{corpus.name}.farm") / "report.html")
    read, counts = Corpus(corpus), Corpus(corpus).manifest.counts
    assert sum(page.counts("captions")) == counts.captions
    assert sum(page.counts("codes")) == counts.items * read.grid.cells
    assert sum(page.counts("clips")) == (counts.items if read.grid.s > 1 else 0)
    assert sum(page.counts("reasons")) == counts.failed
    lost = counts.failed + sum(counts.left_out.values())
    assert sum(page.counts("outcome")) == counts.items + lost
    for place in ("captions", "clips", "codes", "reasons"):
        bars = page.counts(place)
        expected = [100 * count / max(bars) for count in bars]
        assert page.sizes[place] == pytest.approx(expected, abs=0.051), place
    return page


def lengths(corpus: Path, bpe: TextTokenizer) -> list[int]:
    read = Corpus(corpus)
    texts = [row.tolist() for n in range(len(read)) for row in read.texts(n)]
    return [text.index(bpe.end_id) + 1 for text in texts]


def image_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"id": f"i{n}", "media": f"image{n}.png", "captions": CAPTIONS[: n % 3 + 1]}
        for n in range(6)
    ]
    rows += [{"id": f"no{n}", "media": f"no {n}.png", "captions": ["x"]} for n in range(3)]
    rows.append({"id": "it's", "media": "image0.png", "captions": []})
    return rows


def clip_rows() -> list[dict[str, object]]:
    """Clips of 4, 4, 4, 3, 2 and 1 real frames, and one that is broken."""
    ends = {3: 0.6, 4: 0.4, 5: 0.2}
    rows: list[dict[str, object]] = [
        {
            "id": f"c{n}",
            "media": f"clip{n}.mp4",
            "captions": CAPTIONS[:1],
            **({"end": ends[n]} if n in ends else {}),
        }
        for n in range(6)
    ]
    rows.insert(2, {"id": "bad", "media": "corrupt.mp4", "captions": CAPTIONS[:1]})
    return rows


def test_the_page_of_images(media: Path, tools: Path, tmp_path: Path, bpe: TextTokenizer) -> None:
    manifest = write_manifest(media / "report-images.jsonl", image_rows())
    corpus = tmp_path / "images"
    assert main(tokenize_command(manifest, corpus, tools, "--report")) == 0
    page = check(corpus)
    assert "Clip lengths" not in page.text
    assert dict(page.bars["outcome"]) == {"in the corpus": 6, "failed": 4}
    assert page.bars["reasons"] == [
        ("… does not exist", 3),
        ('item … has no caption; give it "None" where it has none', 1),
    ]
    assert "shots" not in page.bars
    expected = Counter(lengths(corpus, bpe))
    for label, count in page.bars["captions"]:
        first, _, last = label.removesuffix(" tokens").partition("–")
        numbers = range(int(first), int(last or first) + 1)
        assert count == sum(expected[number] for number in numbers), label


def test_the_page_of_clips(media: Path, tools: Path, tmp_path: Path) -> None:
    manifest = write_manifest(media / "report-clips.jsonl", clip_rows())
    corpus = tmp_path / "clips"
    assert main(tokenize_command(manifest, corpus, tools, *CLIPS, "--report")) == 0
    page = check(corpus)
    assert page.bars["clips"] == [(f"{n + 1} frames", [1, 1, 1, 3][n]) for n in range(4)]
    assert "3 with fewer than 4 are padded" in page.text
    assert "sampled faster" not in page.text
    (reason,) = page.bars["reasons"]
    assert reason[0].startswith("… cannot be decoded as a video")


def test_the_page_of_two_ranks(media: Path, tools: Path, tmp_path: Path) -> None:
    manifest = write_manifest(media / "report-ranks.jsonl", clip_rows())
    corpus = tmp_path / "ranks"
    more = (*CLIPS, "--items-per-shard", "2", "--report")
    done = run_farm(2, tokenize_command(manifest, corpus, tools, *more))
    assert done.returncode == 0, done.stderr
    page = check(corpus)
    assert page.counts("clips") == [1, 1, 1, 3]
    assert "2 encoders" in page.text
    assert "7 in this run" in page.text


def test_the_page_of_shots_counts_films_filters_and_failures(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    windows = {0: (None, 0.4), 1: (0.4, 0.5), 3: (0.5, None)}
    rows: list[dict[str, object]] = [
        {
            "id": f"film/{film}#{shot}",
            "media": f"clip{film}.mp4",
            "captions": CAPTIONS[:1],
            "shot": shot,
            **{name: t for name, t in zip(("start", "end"), times, strict=True) if t is not None},
        }
        for shot, times in windows.items()
        for film in range(2)
    ]
    rows += [
        # Somebody else's fields.
        {"id": "whole", "media": "clip3.mp4", "captions": CAPTIONS[:1], "shot": "close-up"},
        {"id": "own", "media": "clip4.mp4", "captions": CAPTIONS[:1], "shot": 7},
        {"id": "bad", "media": "corrupt.mp4", "captions": CAPTIONS[:1]},
    ]
    manifest = write_manifest(media / "report-shots.jsonl", rows)
    rules = tmp_path / "filters.yaml"
    rules.write_text("filters: [{name: duration, shortest: 0.2}]")
    corpus, more = tmp_path / "shots", ("--filters", rules, "--report")
    assert main(tokenize_command(manifest, corpus, tools, *CLIPS, *more)) == 0
    page = check(corpus)
    assert page.bars["shots"] == [("shots of 2 films", 6), ("not cut into shots", 3)]
    assert page.bars["outcome"] == [
        ("in the corpus", 6),
        ("left out by the filter duration", 2),
        ("failed", 1),
    ]
    assert page.sizes["shots"] == pytest.approx([600 / 9, 300 / 9], abs=0.051)
    assert "The source has 9 items" in page.text


def test_rare_reasons_are_put_together(tmp_path: Path) -> None:
    words = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(50)]
    lines = [
        json.dumps({"id": "x", "reason": f"/a b/{n}.mp4 is {word}"})
        for place, word in enumerate(words)
        for n in range(50 - place)
    ]
    lines.append(json.dumps({"id": "x", "reason": "is short", "filter": "duration"}))
    (tmp_path / "failures.jsonl").write_text("".join(f"{line}\n" for line in lines))
    bars = failure_bars(tmp_path)
    assert sum(bar.count for bar in bars) == len(lines) - 1
    assert [bar.label for bar in bars] == [f"… is {word}" for word in words[:20]] + [
        "30 other reasons"
    ]
    assert bars[0].count == 50
    assert max(bar.share for bar in bars) == 1


@pytest.mark.parametrize(
    "reason",
    [
        "films/a.mp4 has 3 frames between 0 and 1.5 s",
        "/my films/all of it/a nice clip.MP4 has 12 frames between 7 and 9 s",
        "tar://x y.webm::/sets/one.tar has 1,024 frames between 0.25 and 2 s",
        "https://host/a%20b.mkv?key=1 has 5 frames between 1 and 2 s",
    ],
)
def test_reasons_are_alike_whatever_their_media_are_called(reason: str, tmp_path: Path) -> None:
    line = json.dumps({"id": "x", "reason": reason})
    (tmp_path / "failures.jsonl").write_text(line + "\n")
    assert failure_kinds(tmp_path) == {"… has … frames between … and … s": 1}


@pytest.mark.parametrize(
    ("numbers", "first"), [(1, 0), (10, 1), (32, 0), (33, 1), (78, 0), (8192, 0)]
)
def test_neighbours_share_bars_and_none_is_lost(numbers: int, first: int) -> None:
    counts = np.random.default_rng(numbers).integers(0, 100, numbers)
    bars = histogram(counts, first)
    assert len(bars) <= 32
    assert sum(bar.count for bar in bars) == counts.sum()
    assert bars[0].label.partition("–")[0] == str(first)
    assert bars[-1].label.rpartition("–")[2] == str(first + numbers - 1)
