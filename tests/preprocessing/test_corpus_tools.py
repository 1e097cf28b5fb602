"""Damage that is always found, and corpora that are merged and split."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, tokenize_command, write_manifest
from power import Disk

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Failure,
    Fingerprints,
    ShardItem,
    commit_corpus,
    read_manifest,
    write_shard,
)
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from preprocessing import options
from preprocessing.__main__ import main
from preprocessing.ledger import failure_line
from preprocessing.merge import merge
from preprocessing.split import is_held_out, split
from preprocessing.stats import failure_kinds, percentile
from preprocessing.verify import find_damage


def items_of(
    bpe: TextTokenizer, prefix: str, numbers: Sequence[int], sketches: bool = False
) -> list[ShardItem]:
    """Items with one to three captions, three clips of each video."""
    items = []
    for number in numbers:
        captions = tuple(CAPTIONS[: number % 3 + 1])
        items.append(
            ShardItem(
                id=f"{prefix}{number}",
                visual=np.array([number % 8, 1, 1, 3], np.uint16),
                text=np.stack([bpe.encode(caption) for caption in captions]),
                captions=captions,
                frames=1 + number % 2,
                media=f"{prefix}/video{number // 3}.mp4",
                start=float(number),
                provenance=("original", "captioner-2b", None)[: len(captions)]
                if number % 2
                else None,
                sketch=np.array([3, number % 4, 0, 1], np.uint16) if sketches else None,
            )
        )
    return items


def write_corpus(
    folder: Path,
    bpe: TextTokenizer,
    prefix: str,
    items: int = 30,
    vqgan: str = "v",
    sketch: str | None = None,
) -> Path:
    folder.mkdir(parents=True)
    cuts = [range(items)[start : start + 11] for start in range(0, items, 11)]
    sidecars = [
        write_shard(folder, number, items_of(bpe, prefix, cut, sketch is not None), group_items=4)
        for number, cut in enumerate(cuts)
    ]
    failure = json.dumps({"id": f"{prefix}bad", "reason": "it is empty"})
    (folder / "failures.jsonl").write_text(failure + "\n")
    manifest = CorpusManifest(
        format_version=1,
        grid=(2, 1, 2),
        frames_per_second=2.5,
        codebook_size=8,
        sketch_codebook_size=4 if sketch else None,
        text_vocabulary_size=bpe.vocabulary_size,
        fingerprints=Fingerprints(vqgan=vqgan, bpe="b", decode="d", sketch=sketch),
        counts=Counts(
            items=items, captions=sum(sidecar.captions for sidecar in sidecars), failed=1
        ),
        shards=tuple(sidecar.entry() for sidecar in sidecars),
    )
    commit_corpus(folder, manifest, ["failures.jsonl", "absent.json"])
    return folder


def everything(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that a corpus says of its items, by their ids."""
    corpus = Corpus(folder)
    said = {}
    for index in range(len(corpus)):
        line = corpus.item(index)
        rest = {key: value for key, value in line.items() if key not in ("id", "first_caption")}
        tokens = (corpus.visual(index).tolist(), corpus.texts(index).tolist())
        sketch = corpus.sketch(index).tolist() if corpus.has_sketches else None
        said[line["id"]] = (*tokens, json.dumps(rest, sort_keys=True), sketch)
    assert len(said) == len(corpus)
    return said


def test_every_one_of_200_changed_bytes_and_truncations_is_found(
    tmp_path: Path, bpe: TextTokenizer
) -> None:
    folder = write_corpus(tmp_path / "corpus", bpe, "a", sketch="s")
    assert find_damage(folder, full=True) == []
    files = sorted(folder.iterdir())
    kinds = [path for path in files if path.suffix == ".tar"]
    kinds += [path for path in files if path.suffix != ".tar"] * 2
    dice = random.Random(7)
    for number in range(200):
        path = dice.choice(kinds)
        content = path.read_bytes()
        place = dice.randrange(len(content))
        is_cut = number % 4 == 0
        changed = bytearray(content)
        changed[place] ^= dice.randrange(1, 256)
        path.write_bytes(content[:place] if is_cut else changed)
        where = f"{path.name}, byte {place}, cut {is_cut}"
        damage = find_damage(folder, full=True)
        assert any(path.name in sentence for sentence in damage), where
        if is_cut or path.suffix != ".tar":
            # Only a changed byte of a tar needs the full check.
            assert any(path.name in sentence for sentence in find_damage(folder)), where
        path.write_bytes(content)
    assert find_damage(folder, full=True) == []


def test_damaged_manifest_is_damage_and_not_absence(
    tmp_path: Path, bpe: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_corpus(tmp_path / "corpus", bpe, "a")
    path = folder / "corpus.json"
    path.write_bytes(path.read_bytes()[:100])
    assert main(["verify", str(folder)]) == 1
    assert "corpus.json is not valid JSON" in capsys.readouterr().err


def test_corpora_without_checksums_of_their_json_files_are_still_read(
    tmp_path: Path, bpe: TextTokenizer
) -> None:
    folder = write_corpus(tmp_path / "corpus", bpe, "a")
    path = folder / "corpus.json"
    tree = json.loads(path.read_text())
    for name in ("files", "sha256"):
        del tree[name]
    for shard in tree["shards"]:
        del shard["sidecar_sha256"]
    path.write_text(json.dumps(tree))
    assert find_damage(folder, full=True) == []
    assert len(Corpus(folder)) == 30


@pytest.mark.parametrize("sketch", [None, "s"])
def test_merged_corpus_holds_all_items_in_linked_shards(
    tmp_path: Path, bpe: TextTokenizer, capsys: pytest.CaptureFixture[str], sketch: str | None
) -> None:
    one, two = (write_corpus(tmp_path / name, bpe, name, sketch=sketch) for name in "ab")
    # A corpus may lie elsewhere, with links to its tars.
    (one / "shard-000001.tar").rename(tmp_path / "elsewhere.tar")
    (one / "shard-000001.tar").symlink_to("../elsewhere.tar")
    output = tmp_path / "new" / "both"
    assert main(["merge", str(one), str(two), "--output", str(output)]) == 0
    assert "60 items" in capsys.readouterr().out
    assert find_damage(output, full=True) == []
    assert everything(output) == everything(one) | everything(two)
    first = Corpus(output)
    assert [first.item(index)["id"] for index in (0, 29, 30, 59)] == ["a0", "a29", "b0", "b29"]
    assert first.manifest.counts.failed == 2
    tar = "shard-000000.tar"
    assert not any(path.is_symlink() for path in output.iterdir())
    assert (output / "shard-000003.tar").stat().st_ino == (two / tar).stat().st_ino
    assert find_damage(one, full=True) == []


def test_merge_names_the_first_repeated_item_with_few_ids_in_memory(
    tmp_path: Path, bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocessing.repeated_ids._ROWS_AT_ONCE", 8)
    one, two, three = (write_corpus(tmp_path / name, bpe, name) for name in "abc")
    merge([one, two, three], tmp_path / "all")
    assert find_damage(tmp_path / "all", full=True) == []
    again = tmp_path / "again"
    with pytest.raises(UserError, match=r"corpora .*all and .*b both hold the item 'b0'"):
        merge([tmp_path / "all", two, one], again)
    assert not again.exists()


def test_percentiles_of_counted_values_are_those_of_the_values() -> None:
    values = np.random.default_rng(0).integers(0, 78, 999)
    for share in (0, 12.3, 50, 95, 100):
        found = percentile(np.bincount(values, minlength=78), share)
        assert found == pytest.approx(float(np.percentile(values, share)))


def test_merge_copies_where_links_do_not_reach(
    tmp_path: Path, bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (write_corpus(tmp_path / name, bpe, name) for name in "ab")

    def refuses(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuses)
    merge([one, two], tmp_path / "both")
    assert find_damage(tmp_path / "both", full=True) == []
    assert len(Corpus(tmp_path / "both")) == 60


@pytest.mark.parametrize("tool", ["merge", "split"])
def test_a_corpus_made_of_others_outlasts_a_power_loss(
    tool: str, tmp_path: Path, bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (write_corpus(tmp_path / name, bpe, name) for name in "ab")

    def refuses(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuses)
    disk = Disk(monkeypatch)
    made = tmp_path / "made"
    if tool == "merge":
        merge([one, two], made)
    else:
        split(one, 0.5, made, tmp_path / "other")
    assert disk.of(made).lost == []
    assert "made" in disk.names(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o755


def test_merge_refuses_what_differs_and_leaves_nothing(tmp_path: Path, bpe: TextTokenizer) -> None:
    one = write_corpus(tmp_path / "a", bpe, "a")
    other = write_corpus(tmp_path / "other", bpe, "b", vqgan="w")
    damaged = write_corpus(tmp_path / "damaged", bpe, "c")
    (damaged / "shard-000001.tar").write_bytes(b"")
    sketched, traced = (
        write_corpus(tmp_path / name, bpe, name, sketch=name) for name in ("sketched", "traced")
    )
    before = sorted(tmp_path.iterdir())
    output = tmp_path / "both"
    for corpora, place, message in (
        ([one, other], output, r"a and .*other differ in fingerprints\.vqgan"),
        ([one, sketched], output, "sketched has sketches and .*a has none; only corpora that all"),
        ([sketched, one], output, "sketched has sketches and .*a has none"),
        ([sketched, traced], output, r"differ in fingerprints\.sketch"),
        ([one, one], output, "both hold the item 'a0'"),
        ([one, damaged], output, r"damaged is damaged: .*shard-000001\.tar has 0 bytes"),
        ([one], output, "at least two"),
        ([one, other], one, "--output .*a exists already"),
    ):
        with pytest.raises(UserError, match=message):
            merge(corpora, place)
    assert sorted(tmp_path.iterdir()) == before


def test_failing_disk_leaves_nothing_behind(
    tmp_path: Path, bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus(tmp_path / "a", bpe, "a", items=90)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preprocessing.whole_corpus.written_atomically", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        split(folder, 0.3, tmp_path / "train", tmp_path / "held")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("sketch", [None, "s"])
def test_split_keeps_every_video_on_one_side(
    tmp_path: Path, bpe: TextTokenizer, capsys: pytest.CaptureFixture[str], sketch: str | None
) -> None:
    folder = write_corpus(tmp_path / "a", bpe, "a", items=90, sketch=sketch)
    train, held = tmp_path / "train", tmp_path / "held"
    command = ["split", str(folder), "--held-out", "0.3"]
    command += ["--output-train", str(train), "--output-heldout", str(held)]
    assert main(command) == 0
    assert capsys.readouterr().out.count("items") == 2
    sides = [everything(train), everything(held)]
    assert sides[0] | sides[1] == everything(folder)
    videos = [{json.loads(str(said[2]))["media"] for said in side.values()} for side in sides]
    assert not videos[0] & videos[1]
    assert all(is_held_out(media, 0.3) for media in videos[1])
    assert 3 <= len(videos[1]) <= 18
    for output in (train, held):
        assert find_damage(output, full=True) == []
    # More of the same corpus moves no video to the other side.
    assert is_held_out("./x/../a/video1.mp4", 0.3) == is_held_out("a/video1.mp4", 0.3)


def test_held_out_share_is_that_of_many_videos() -> None:
    share = np.mean([is_held_out(f"videos/{number}.mp4", 0.05) for number in range(20_000)])
    assert abs(share - 0.05) < 0.005


def test_a_video_is_on_one_side_however_its_path_is_written() -> None:
    for number in range(50):
        sides = {is_held_out(f"{way}{number}.mp4", 0.5) for way in ("a/", "./a/", "a//", "b/../a/")}
        assert len(sides) == 1
    # As in the corpora that were split by earlier releases.
    held = [number for number in range(20) if is_held_out(f"videos/{number}.mp4", 0.3)]
    assert held == [0, 9, 13, 15]


def test_split_refuses_what_cannot_be(tmp_path: Path, bpe: TextTokenizer) -> None:
    folder = write_corpus(tmp_path / "a", bpe, "a", items=3)
    train, held = tmp_path / "train", tmp_path / "held"
    for share, outputs, message in (
        (0.5, (train, held), "side of corpus .* would be empty"),
        (1.5, (train, held), "--held-out must lie between 0 and 1, not 1.5"),
        (0.5, (train, train), "must be different folders"),
        (0.5, (train, folder), "--output-heldout .* exists already"),
    ):
        with pytest.raises(UserError, match=message):
            split(folder, share, *outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_provenance_is_kept_item_by_item(tmp_path: Path, bpe: TextTokenizer) -> None:
    folder = write_corpus(tmp_path / "a", bpe, "a")
    corpus = Corpus(folder)
    assert "provenance" not in corpus.item(2)
    assert corpus.item(5)["provenance"] == ["original", "captioner-2b", None]
    item = items_of(bpe, "x", [1])[0]
    wrong = ShardItem(**{**item.__dict__, "provenance": ("original",)})
    with pytest.raises(ValueError, match="provenance of item 'x1' must have one entry a caption"):
        write_shard(tmp_path, 9, [wrong])


def test_stats_show_who_wrote_the_captions(
    tmp_path: Path, bpe: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(write_corpus(tmp_path / "a", bpe, "a"))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sketch" not in shown
    for part in ("original: 15 (25.0%)", "captioner-2b: 10", "most frequent code", "top 10%"):
        assert part in shown


def test_stats_show_the_sketches_codes(
    tmp_path: Path, bpe: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(write_corpus(tmp_path / "a", bpe, "a", sketch="s"))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sketch tokens 120 (4 an item)" in shown.replace("│", "").replace("  ", " ")
    assert "4 codes, 100.0% in use" in shown


def test_a_sketch_token_outside_its_codebook_is_found(tmp_path: Path, bpe: TextTokenizer) -> None:
    folder = write_corpus(tmp_path / "a", bpe, "a", sketch="s")
    manifest = read_manifest(folder).model_copy(update={"sketch_codebook_size": 3})
    commit_corpus(folder, manifest, ["failures.jsonl"])
    assert find_damage(folder) == []
    damage = find_damage(folder, full=True)
    assert "000000.sketch.npy holds the token 3, and there are only 3" in damage[0]


def test_ids_may_hold_what_others_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    lines = [failure_line(Failure(id=f"a\u2028b{n}\x85", reason=f"no {n}")) for n in range(3)]
    (tmp_path / "failures.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert failure_kinds(tmp_path) == {"no …": 3}


def test_more_shards_than_there_are_names_for_are_refused_at_once(
    media: Path,
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "MOST_SHARDS", 3)
    rows: list[dict[str, object]] = [
        {"id": n, "media": "image0.png", "captions": CAPTIONS} for n in range(8)
    ]
    manifest = write_manifest(media / "many.jsonl", rows)
    command = tokenize_command(manifest, tmp_path / "corpus", tools)
    assert main([*command, "--items-per-shard", "2"]) == 2
    assert "4 shards of 8 items, and a corpus has at most 3; use at least 3" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "corpus").exists()
