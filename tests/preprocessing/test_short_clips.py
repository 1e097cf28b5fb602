"""Clips of too few frames: skipped, padded, or sampled at a rate that the corpus then names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from test_verify import write_corpus

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.decoders import DecodeLimits, DecodeSettings
from preprocessing.__main__ import main
from preprocessing.filters import FilterSettings
from preprocessing.isolation import Demands, decode_alone, decode_item
from preprocessing.sources import SourceItem
from preprocessing.stats import item_facts
from preprocessing.verify import find_damage

# Of eight frames at 10 a second; four at 5 a second are the first 0.8 s.
ENDS = {"long": None, "short": 0.6, "shorter": 0.4, "too short": 0.2}
COMMAND = ("--frames", "4", "--fps", "5", "--items-per-shard", "3")


def tokenize(media: Path, tools: Path, output: Path, *more: str) -> Path:
    rows: list[dict[str, object]] = [
        {
            "id": name,
            "media": "clip2.mp4",
            "captions": CAPTIONS[:1],
            **({} if end is None else {"end": end}),
        }
        for name, end in ENDS.items()
    ]
    manifest = write_manifest(media / f"short-{output.name}.jsonl", rows)
    assert main(tokenize_command(manifest, output, tools, *COMMAND, *more)) == 0
    assert find_damage(output, full=True) == []
    return output


def lines(corpus: Path) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for line in Corpus(corpus).lines()}


def stats(corpus: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["stats", str(corpus)]) == 0
    shown = capsys.readouterr().out.replace("│", " ")
    return " ".join(shown.split())


def failures(corpus: Path) -> list[str]:
    found = (corpus / "failures.jsonl").read_text().splitlines()
    return [json.loads(line)["id"] for line in found]


def test_skipped(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tokenize(media, tools, tmp_path / "skip")
    assert {name: line["frames"] for name, line in lines(corpus).items()} == {"long": 4}
    assert failures(corpus) == ["short", "shorter", "too short"]
    assert "short clips 0 padded, 0 sampled faster" in stats(corpus, capsys)


def test_padded(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tokenize(media, tools, tmp_path / "pad", "--short-clips", "pad")
    found = lines(corpus)
    frames = {"long": 4, "short": 3, "shorter": 2, "too short": 1}
    assert {name: line["frames"] for name, line in found.items()} == frames
    assert not any("frames_per_second" in line for line in found.values())
    assert "short clips 3 padded, 0 sampled faster" in stats(corpus, capsys)


def test_sampled_faster_each_at_a_rate_of_its_own(
    media: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tokenize(media, tools, tmp_path / "faster", "--short-clips", "faster", "--report")
    found = lines(corpus)
    assert {name: line["frames"] for name, line in found.items()} == dict.fromkeys(
        ("long", "short", "shorter"), 4
    )
    # The corpus's own rate is not said again.
    assert "frames_per_second" not in found["long"]
    assert found["short"]["frames_per_second"] == pytest.approx(4 / 0.6, abs=1e-5)
    assert found["shorter"]["frames_per_second"] == pytest.approx(4 / 0.4, abs=1e-5)
    assert failures(corpus) == ["too short"]
    assert "short clips 0 padded, 2 sampled faster (at up to 10 frames/s)" in stats(corpus, capsys)
    page = (tmp_path / "faster.farm" / "report.html").read_text()
    assert "2 that were too short are sampled faster" in page
    assert "are padded" not in page
    # The tokens are those of the frames at that rate.
    rows: list[dict[str, object]] = [
        {"id": "x", "media": "clip2.mp4", "captions": CAPTIONS[:1], "end": 0.4}
    ]
    manifest = write_manifest(media / "short-direct.jsonl", rows)
    direct = ("--frames", "4", "--fps", "10")
    assert main(tokenize_command(manifest, tmp_path / "direct", tools, *direct)) == 0
    expected = Corpus(tmp_path / "direct").visual(0)
    np.testing.assert_array_equal(Corpus(corpus).visual(2), expected)


def test_a_corpus_without_faster_clips_has_the_same_bytes_whatever_was_asked_for(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"clip{n}.mp4", "captions": CAPTIONS} for n in range(3)
    ]
    manifest = write_manifest(media / "long-enough.jsonl", rows)
    tars = []
    for policy in ("skip", "pad", "faster"):
        output = tmp_path / policy
        more = (*COMMAND, "--short-clips", policy)
        assert main(tokenize_command(manifest, output, tools, *more)) == 0
        tars.append((output / "shard-000000.tar").read_bytes())
    assert tars[0] == tars[1] == tars[2]


def test_the_rate_comes_back_from_a_process_of_its_own(media: Path) -> None:
    settings = DecodeSettings(image_size=32, frames=4, frames_per_second=5, short_clips="faster")
    demands = Demands(settings, DecodeLimits(), FilterSettings())
    for end, rate in ((0.4, 10.0), (None, None)):
        item = SourceItem("x", media / "clip2.mp4", ("a",), end=end)
        assert decode_item(item, demands).rate == rate
        assert decode_alone(item, demands).rate == rate


def faster_rows(ends: dict[str, float | None]) -> list[dict[str, object]]:
    return [
        {
            "id": name,
            "media": f"clip{name[0]}.mp4",
            "captions": CAPTIONS,
            **({} if end is None else {"end": end}),
        }
        for name, end in ends.items()
    ]


def rates(corpus: Path) -> dict[str, float | None]:
    return {name: line.get("frames_per_second") for name, line in lines(corpus).items()}


def test_a_shard_that_loses_a_near_duplicate_keeps_the_rates(
    media: Path, tools: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "filters.yaml"
    rules.write_text("near_duplicates: {distance: 0}")
    rows = faster_rows({"1a": 0.4, "1b": 0.4})
    manifest = write_manifest(media / "short-twins.jsonl", rows)
    corpus = tmp_path / "twins"
    more = (*COMMAND, "--short-clips", "faster", "--filters", str(rules))
    assert main(tokenize_command(manifest, corpus, tools, *more)) == 0
    assert failures(corpus) == ["1b"]
    assert rates(corpus) == {"1a": 10.0}


def test_split_and_merge_keep_the_rates(media: Path, tools: Path, tmp_path: Path) -> None:
    ends = {"0": None, "1": 0.4, "2": None, "3": 0.5, "4": None, "5": 0.4, "6": None}
    manifest = write_manifest(media / "short-split.jsonl", faster_rows(ends))
    corpus = tmp_path / "whole"
    more = (*COMMAND, "--short-clips", "faster")
    assert main(tokenize_command(manifest, corpus, tools, *more)) == 0
    expected = {name: None if end is None else 4 / end for name, end in ends.items()}
    assert rates(corpus) == pytest.approx(expected)
    sides = [tmp_path / name for name in ("train", "held")]
    outputs = ["--output-train", str(sides[0]), "--output-heldout", str(sides[1])]
    assert main(["split", str(corpus), "--held-out", "0.5", *outputs]) == 0
    assert main(["merge", *map(str, sides), "--output", str(tmp_path / "again")]) == 0
    assert rates(tmp_path / "again") == rates(corpus)
    assert find_damage(tmp_path / "again", full=True) == []


def test_facts_of_a_corpus_of_images(tmp_path: Path, bpe: TextTokenizer) -> None:
    facts = item_facts(Corpus(write_corpus(tmp_path / "corpus", bpe, token=3)).lines())
    assert (facts.padded(1), facts.faster, facts.writers["unknown"]) == (0, 0, 12)
