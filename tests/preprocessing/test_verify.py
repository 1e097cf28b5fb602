"""Damage that `verify` finds, what `stats` shows, and the small commands."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from farm_media import CAPTIONS, write_manifest

from megatron_nuwa.command_line import CommandParser
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    write_settings,
    write_shard,
)
from megatron_nuwa.data.text import TextTokenizer
from preprocessing.__main__ import main
from preprocessing.command_line import parser
from preprocessing.stats import codebook_use
from preprocessing.verify import find_damage


@pytest.fixture
def folder(tmp_path: Path, bpe: TextTokenizer) -> Path:
    """Two shards of image items, in groups of two."""
    return write_corpus(tmp_path / "corpus", bpe, token=3)


def write_corpus(folder: Path, bpe: TextTokenizer, token: int, name: str = "item") -> Path:
    folder.mkdir()
    sidecars = []
    for shard in range(2):
        items = [
            ShardItem(
                id=f"{name}{shard}-{number if name == 'item' else 0}",
                visual=np.array([0, 1, 1, token], np.uint16),
                text=np.stack([bpe.encode(caption) for caption in CAPTIONS[: number + 1]]),
                captions=tuple(CAPTIONS[: number + 1]),
                frames=1,
                media=f"{number}.png",
            )
            for number in range(3)
        ]
        sidecars.append(write_shard(folder, shard, items, group_items=2))
    (folder / "failures.jsonl").write_text(
        "".join(
            json.dumps({"id": f"bad{n}", "reason": f"media/{n}.png does not exist"}) + "\n"
            for n in range(2)
        )
    )
    manifest = CorpusManifest(
        format_version=1,
        grid=(2, 2, 1),
        frames_per_second=None,
        codebook_size=8,
        text_vocabulary_size=bpe.vocabulary_size,
        fingerprints=Fingerprints(vqgan="v", bpe="b", decode="d"),
        counts=Counts(items=6, captions=12, failed=2),
        shards=tuple(sidecar.entry() for sidecar in sidecars),
    )
    write_settings(folder / "corpus.json", manifest)
    return folder


def test_good_corpus_is_said_to_be_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert "sizes and sums checked" in capsys.readouterr().out
    assert main(["verify", str(folder), "--full"]) == 0
    assert "every byte read" in capsys.readouterr().out


@pytest.mark.parametrize("place", range(0, 10_000, 1111))
def test_any_altered_byte_is_found_by_a_full_check(folder: Path, place: int) -> None:
    tar = folder / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[place] ^= 0x10
    tar.write_bytes(content)
    assert find_damage(folder) == []
    damage = find_damage(folder, full=True)
    assert damage == [f"{tar} has other bytes than were written (its sha256 differs)"]


def test_truncated_and_missing_files_are_found_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (folder / "shard-000001.json").unlink()
    (folder / "shard-000007.tar").touch()
    (folder / "failures.jsonl").unlink()
    assert main(["verify", str(folder)]) == 1
    told = capsys.readouterr().err
    for part in (
        "shard-000000.tar has",
        "shard-000001.json cannot be read",
        "shard-000007.tar is not listed in corpus.json",
        "failures.jsonl cannot be read",
    ):
        assert part in told
    assert all(line.startswith("error: ") for line in told.splitlines())


def test_tokens_outside_the_codebook_are_found(tmp_path: Path, bpe: TextTokenizer) -> None:
    folder = write_corpus(tmp_path / "corpus", bpe, token=8)
    assert find_damage(folder) == []
    damage = find_damage(folder, full=True)
    assert "000000.visual.npy holds the token 8, and there are only 8" in damage[0]


def test_repeated_ids_are_found(tmp_path: Path, bpe: TextTokenizer) -> None:
    folder = write_corpus(tmp_path / "corpus", bpe, token=3, name="same")
    assert "holds the id 'same0-0' twice" in find_damage(folder, full=True)[0]


def test_sums_that_do_not_add_up_are_found(folder: Path) -> None:
    path = folder / "corpus.json"
    tree = json.loads(path.read_text())
    tree["counts"] = {"items": 7, "captions": 12, "failed": 3}
    path.write_text(json.dumps(tree))
    damage = find_damage(folder)
    assert "counts 7 items, but its shards add up to 6" in damage[0]
    assert "holds 2 items, and corpus.json counts 3 that failed" in damage[1]


def test_verify_of_nothing_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is missing or unfinished" in capsys.readouterr().err


def test_stats_show_what_the_corpus_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(folder)]) == 0
    shown = capsys.readouterr().out
    # Codes 0 and 3 in a quarter, code 1 in half of the places: entropy 1.5 bits.
    for part in (
        "2×2×1",
        "6 in 2 shards",
        "12 (2.00 an item)",
        "24 (4 an item)",
        "8 codes, 37.5% in use, perplexity 2.8",
        "2 × … does not exist",
    ):
        assert part in shown


def test_codebook_use_of_a_known_distribution() -> None:
    perplexity, share = codebook_use(np.array([2, 4, 0, 2]))
    assert perplexity == pytest.approx(2**1.5)
    assert share == 0.75


def test_train_bpe_learns_from_all_manifests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, caption in (("a", "zebra zebra zebra"), ("b", "quokka quokka quokka")):
        rows: list[dict[str, object]] = [{"id": name, "media": "x.png", "captions": [caption]}]
        write_manifest(tmp_path / f"{name}.jsonl", rows)
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    output = tmp_path / "bpe.json"
    command = ["train-bpe", *sources, "--output", str(output), "--vocabulary-size"]
    assert main([*command, "530"]) == 0
    bpe = TextTokenizer.load(output)
    assert len(set(bpe.encode("zebra quokka").tolist())) == 4
    assert "too few pairs for 530" in capsys.readouterr().out
    assert main([*command, "100"]) == 2
    assert "--vocabulary-size must be a whole number from 514 to" in capsys.readouterr().err


def test_train_bpe_replaces_no_file_unless_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"id": "a", "media": "x.png", "captions": ["a zebra"]}]
    manifest = write_manifest(tmp_path / "a.jsonl", rows)
    output = tmp_path / "bpe.json"
    output.write_text("precious")
    command = ["train-bpe", str(manifest), "--output", str(output), "--vocabulary-size", "530"]
    assert main(command) == 2
    assert "bpe.json exists already; name another, or pass --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert TextTokenizer.load(output).encode("a zebra").any()


def commands() -> dict[str, CommandParser]:
    """The parser of each command by its name."""
    whole = parser()._actions
    (choice,) = (action for action in whole if isinstance(action, argparse._SubParsersAction))
    return dict(choice.choices)


def test_all_commands_are_there() -> None:
    expected = {"tokenize", "shots", "verify", "stats", "merge", "split", "train-bpe"}
    assert commands().keys() == expected


@pytest.mark.parametrize("command", commands())
def test_help_shows_an_example_that_is_right(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    typed = f"python -m preprocessing {command} "
    start, _, arguments = capsys.readouterr().out.split("example:")[1].partition(typed)
    assert start.strip() in ("", "mpirun -n 8 --bind-to none")
    commands()[command].parse_args(shlex.split(arguments))


@pytest.mark.parametrize("command", commands())
def test_every_argument_has_a_help_text(command: str) -> None:
    for action in commands()[command]._actions:
        name = action.option_strings or action.dest
        assert action.help, f"{name} of {command}"
        assert " " in action.help, f"{name} of {command} has no more than {action.help!r}"


def test_corpus_of_the_fixture_reads_back(folder: Path) -> None:
    assert len(Corpus(folder)) == 6
