"""Captions as 77 tokens."""

from __future__ import annotations

import gzip
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nuwa.data.text import (
    END,
    NO_CAPTION,
    SMALLEST_VOCABULARY,
    START,
    TEXT_TOKENS,
    TextTokenizer,
    text_mask,
    train_bpe,
)
from megatron_nuwa.errors import UserError

CAPTIONS = ["a red square moves left", "a blue circle moves right", "it's a red circle"] * 3
BPE = train_bpe(CAPTIONS, 560)
LETTERS = st.characters(categories=["Ll", "Lo"]).filter(
    lambda letter: unicodedata.normalize("NFC", letter) == letter
)
WORDS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1).map(" ".join)


@given(WORDS.filter(lambda text: len(text.encode()) <= TEXT_TOKENS - 2))
def test_words_of_any_script_survive_a_round_trip(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.text(st.characters(codec="utf-8"), max_size=18).filter(str.strip))
def test_every_text_is_framed_and_padded(text: str) -> None:
    ids = BPE.encode(text, truncate=True)
    assert ids.shape == (77,)
    assert ids.dtype == np.uint16
    assert ids[0] == BPE.start_id
    mask = text_mask(ids)
    length = int(mask.sum())
    assert mask[:length].all()
    assert (ids[length - 1 :] == BPE.end_id).all()
    assert BPE.end_id not in ids[: length - 1]
    assert BPE.start_id not in ids[1:]


@pytest.mark.parametrize("words", [1, 74, 75])
def test_up_to_75_tokens_fit_between_start_and_end(words: int) -> None:
    ids = BPE.encode("q " * words)
    assert text_mask(ids).sum() == words + 2
    assert list(ids).index(BPE.end_id) == words + 1


def test_longer_captions_are_refused_or_cut() -> None:
    with pytest.raises(UserError, match=r"'q q q .* …' needs 78 tokens, and at most 77 are"):
        BPE.encode("q " * 76)
    with pytest.raises(UserError, match=r"the caption 'q{40} …' needs"):
        BPE.encode("q" * 900)
    cut = BPE.encode("q " * 76, truncate=True)
    np.testing.assert_array_equal(cut, BPE.encode("q " * 75))


@pytest.mark.parametrize("caption", ["", "   ", "\n\t\u3000"])
def test_empty_caption_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match="is empty"):
        BPE.encode(caption)


def test_broken_unicode_is_refused() -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        BPE.encode("a \ud800 b")


def test_case_spaces_and_entities_do_not_matter() -> None:
    expected = BPE.encode("a red & blue square")
    for caption in ("A  Red &amp; BLUE\tsquare ", "\na red &amp;amp; blue square"):
        np.testing.assert_array_equal(BPE.encode(caption), expected)
    assert BPE.decode(BPE.encode(NO_CAPTION)) == "none"


def test_spelt_out_special_tokens_are_plain_text() -> None:
    ids = BPE.encode(f"a {END} b {START}")
    assert text_mask(ids).sum() > 10
    assert ids[text_mask(ids)][1:-1].max() < min(BPE.start_id, BPE.end_id)


def test_mask_keeps_the_first_end_token_only() -> None:
    ids = np.stack([BPE.encode("a"), BPE.encode("q " * 75), BPE.encode("red circle")])
    mask = text_mask(ids)
    assert mask.sum(-1).tolist() == [3, 77, 4]
    assert mask.dtype == bool
    batch = text_mask(torch.from_numpy(ids.astype(np.int64)).reshape(3, 1, 77))
    assert batch.dtype == torch.bool
    np.testing.assert_array_equal(batch.numpy()[:, 0], mask)


def test_training_is_repeatable_and_keeps_to_the_size(tmp_path: Path) -> None:
    # Many pairs of equal frequency: each has to be decided the same way every time.
    assert {train_bpe(CAPTIONS, 560).fingerprint for _ in range(20)} == {BPE.fingerprint}
    assert BPE.vocabulary_size <= 560
    assert train_bpe(CAPTIONS, 520).vocabulary_size == 520
    assert train_bpe(CAPTIONS, 520).fingerprint != BPE.fingerprint
    assert text_mask(BPE.encode("red circle")).sum() == 4
    BPE.save(tmp_path / "bpe.json")
    loaded = TextTokenizer.load(tmp_path / "bpe.json")
    assert loaded.fingerprint == BPE.fingerprint
    np.testing.assert_array_equal(loaded.encode(f"a {END} é"), BPE.encode(f"a {END} é"))
    assert [path.name for path in tmp_path.iterdir()] == ["bpe.json"]


def test_training_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="vocabulary_size must lie between 514 and 65,536"):
        train_bpe(CAPTIONS, 513)
    with pytest.raises(UserError, match="no caption has a word"):
        train_bpe(["", "  "], 600)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_merges_file_gives_clips_layout_of_ids(tmp_path: Path, suffix: str) -> None:
    text = '"bpe_simple_vocab"#version: 0.2\nc a\nca t</w>\na t</w>\n'
    path = tmp_path / f"merges{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    bpe = TextTokenizer.load(path)
    assert bpe.vocabulary_size == SMALLEST_VOCABULARY + 3
    # CLIP's first ids are the printable bytes from '!' on, then the same at a word's end.
    letter = {character: ord(character) - ord("!") for character in "abcdefghijklmnopqrstuvwxyz"}
    assert bpe.encode("cat")[:3].tolist() == [515, 513, 516]
    assert bpe.encode("at")[1] == 514
    assert bpe.encode("act")[1:4].tolist() == [letter["a"], letter["c"], letter["t"] + 256]
    assert (bpe.start_id, bpe.end_id) == (515, 516)
    assert bpe.decode(bpe.encode("A cat's 10 !?")) == "a cat 's 1 0 !?"


def test_only_the_merges_that_clip_uses_are_read(tmp_path: Path) -> None:
    pairs = [f"{a} {b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    triples = [
        f"{pair.replace(' ', '')} {c}" for pair in pairs for c in "abcdefghijklmnopqrstuvwxyz"
    ]
    fours = [f"{triple.replace(' ', '')} {d}" for triple in triples for d in "abc"]
    lines = [*pairs, *triples, *fours]
    assert len(lines) > 49_408
    (tmp_path / "merges.txt").write_text("heading\n" + "\n".join(lines) + "\n")
    bpe = TextTokenizer.load(tmp_path / "merges.txt")
    assert bpe.vocabulary_size == 49_408
    assert (bpe.start_id, bpe.end_id) == (49_406, 49_407)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bpe.json", b"{}", "is not a tokenizer file"),
        ("bpe.json", b"\xff", "is not a tokenizer file"),
        ("merges.txt", b"heading\n", "holds no merges"),
        ("merges.txt", b"heading\na b\nno merge\n", "line 3: 'no merge' is not a merge"),
        ("merges.txt.gz", b"not gzip", "cannot be read"),
        ("merges.txt.gz", gzip.compress(b"heading\n", mtime=0)[:12], "cannot be read"),
        (
            "merges.txt.gz",
            gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9,
            "cannot be read: Error -3",
        ),
    ],
)
def test_foreign_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        TextTokenizer.load(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("nowhere.json", "nowhere.txt.gz"):
        with pytest.raises(UserError, match=f"BPE .*{name} cannot be read"):
            TextTokenizer.load(tmp_path / name)
