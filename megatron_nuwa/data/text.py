"""Captions as tokens: lower-cased byte-level BPE, the way CLIP counts it."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically

TEXT_TOKENS = 77
# The constant text of video prediction (paper Sec. 3.4).
NO_CAPTION = "None"
START, END = "<|startoftext|>", "<|endoftext|>"
# A token with this suffix ends a word.
WORD_END = "</w>"
# 256 bytes, each inside a word and at its end, and the two special tokens.
SMALLEST_VOCABULARY = 2 * 256 + 2
LARGEST_VOCABULARY = 1 << 16
# CLIP's file holds more merges than CLIP uses.
CLIP_VOCABULARY = 49_408
_SURROGATE = re.compile("[\ud800-\udfff]")
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Ids = TypeVar("Ids", np.ndarray, torch.Tensor)


class TextTokenizer:
    """Captions to 77 token ids and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a `tokenizers` tokenizer that has the two special tokens; else `ValueError`."""
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        if start is None or end is None:
            raise ValueError(f"tokenizer must have the special tokens {START} and {END}")
        # A caption that spells a special token out must not be able to end the text early.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.start_id: int = start
        self.end_id: int = end

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, the special ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's canonical JSON."""
        tree = json.loads(self._tokenizer.to_str())
        canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, caption: str, *, truncate: bool = False) -> np.ndarray:
        """Token ids uint16 (77,): start, the caption's tokens, end, then padding with end.

        Raises `UserError` quoting the caption's first words where it is empty, or where it needs
        more than 77 tokens and `truncate` is off.
        """
        clean = _clean(caption)
        if not clean.isascii() and _SURROGATE.search(clean):
            raise UserError(f"the caption {caption[:40]!r} is not valid Unicode text")
        words = self._tokenizer.encode(clean, add_special_tokens=False).ids
        if not words:
            raise UserError(f"the caption {caption[:40]!r} is empty")
        if len(words) > TEXT_TOKENS - 2:
            if not truncate:
                raise UserError(
                    f"the caption '{_first_words(clean)}' needs {len(words) + 2} tokens, "
                    f"and at most {TEXT_TOKENS} are allowed"
                )
            words = words[: TEXT_TOKENS - 2]
        ids = np.full(TEXT_TOKENS, self.end_id, np.uint16)
        ids[0] = self.start_id
        ids[1 : len(words) + 1] = words
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids up to the first end token: lower-case words with single spaces.

        Raises `ValueError` for an id outside the vocabulary.
        """
        words: list[str] = []
        pieces: list[str] = []
        for token_id in ids:
            if token_id == self.end_id:
                break
            if token_id == self.start_id:
                continue
            token = self._tokenizer.id_to_token(int(token_id))
            if token is None:
                raise ValueError(f"ids must lie in the vocabulary, and {int(token_id)} does not")
            pieces.append(token.removesuffix(WORD_END))
            if token.endswith(WORD_END):
                words.append(decoders.ByteLevel().decode(pieces))
                pieces = []
        if pieces:
            words.append(decoders.ByteLevel().decode(pieces))
        return " ".join(words)

    def to_json(self) -> str:
        """The tokenizer in the JSON of the `tokenizers` library."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as one JSON file of the `tokenizers` library."""
        write_text_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Read a tokenizer's JSON file, or a CLIP merges file (.txt, .txt.gz).

        Raises `UserError` naming the file where it is missing or something else.
        """
        path = Path(path)
        if path.suffix in (".txt", ".gz"):
            return cls(_byte_level_tokenizer(_read_merges(path)))
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"BPE {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"BPE {path} is not a tokenizer file: {error}") from error
        return cls.from_json(text, f"BPE {path}")

    @classmethod
    def from_json(cls, text: str, origin: str) -> TextTokenizer:
        """What `to_json` gave; `UserError` naming `origin` where it is something else."""
        try:
            return cls(Tokenizer.from_str(text))
        # The library raises plain Exception for JSON that is not a tokenizer.
        except Exception as error:
            raise UserError(
                f"{origin} is not a tokenizer file: {' '.join(str(error).split())}"
            ) from error


def train_bpe(captions: Iterable[str], vocabulary_size: int) -> TextTokenizer:
    """Learn a BPE vocabulary from captions; it is smaller than asked where they hold too few pairs.

    Raises `ValueError` for a size outside 514 to 65,536, `UserError` where no caption has a word.
    """
    if not SMALLEST_VOCABULARY <= vocabulary_size <= LARGEST_VOCABULARY:
        raise ValueError(
            f"vocabulary_size must lie between {SMALLEST_VOCABULARY} and {LARGEST_VOCABULARY:,}, "
            f"not {vocabulary_size}"
        )
    learner = _byte_level_tokenizer([])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        initial_alphabet=_alphabet(),
        # Named here so that all have their ids from the start: the trainer would number them in
        # the order of a hash map, and decide between equally frequent pairs by that number.
        special_tokens=[byte + WORD_END for byte in _alphabet()],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(_cleaned(captions), trainer)
    found = json.loads(learner.to_str())["model"]["merges"]
    return TextTokenizer(_byte_level_tokenizer([(left, right) for left, right in found]))


def text_mask(ids: Ids) -> Ids:
    """Which of the text tokens (…, 77) are the caption's own: bool, true up to the first end token.

    The last token of an encoded caption is always the end token, so none has to be named.
    """
    is_end = ids == ids[..., -1:]
    return is_end.cumsum(-1) <= is_end


def _byte_level_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer in CLIP's layout of ids: bytes, bytes that end a word, merges, special tokens."""
    alphabet = _alphabet()
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    tokens += [left + right for left, right in merges]
    # dict.fromkeys: two merges may lead to the same token.
    tokens = [*dict.fromkeys(tokens), START, END]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        end_of_word_suffix=WORD_END,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _alphabet() -> list[str]:
    """The 256 letters that stand for bytes, in CLIP's order: printable bytes first."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges that CLIP uses of a file with a heading line and one pair a line."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"BPE {path} cannot be read: {error}") from error
    lines = text.splitlines()[1 : CLIP_VOCABULARY - SMALLEST_VOCABULARY + 1]
    known = {*_alphabet(), *(byte + WORD_END for byte in _alphabet())}
    merges = []
    for number, line in enumerate(lines, start=2):
        left, _, right = line.partition(" ")
        if left not in known or right not in known:
            raise UserError(f"BPE {path}, line {number}: '{line}' is not a merge of known tokens")
        known.add(left + right)
        merges.append((left, right))
    if not merges:
        raise UserError(f"BPE {path} holds no merges")
    return merges


def _clean(caption: str) -> str:
    """Lower case, single spaces, and HTML entities undone twice, since the web doubles them."""
    plain = unicodedata.normalize("NFC", html.unescape(html.unescape(caption)))
    return " ".join(plain.split()).lower()


def _cleaned(captions: Iterable[str]) -> Iterator[str]:
    empty = True
    for caption in captions:
        clean = _clean(caption)
        empty = empty and not clean
        # The farm refuses captions with lone surrogates; here they only are nothing to learn from.
        yield clean.encode(errors="ignore").decode()
    if empty:
        raise UserError("no caption has a word to learn a BPE vocabulary from")


def _first_words(text: str) -> str:
    if len(text) <= 40:
        return text
    # One long word is cut.
    return f"{text[:40].rpartition(' ')[0] or text[:40]} …"
