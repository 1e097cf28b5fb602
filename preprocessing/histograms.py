"""What the farm's page counts in a corpus, and the bars that show it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import CorpusManifest
from megatron_nuwa.data.text import TEXT_TOKENS, text_mask
from preprocessing.plan import PlanStamp
from preprocessing.stats import ItemFacts, failure_kinds, item_facts

# Of a large corpus the first groups of up to 1,024 items stand for all.
_GROUPS = 64
_MOST_BARS = 32
_MOST_REASONS = 20


@dataclass(frozen=True)
class Bar:
    """One bar; `share` is its length beside the longest, or beside the whole."""

    label: str
    count: int
    share: float


@dataclass(frozen=True)
class Counted:
    """What the first `items` items of a corpus hold, by number.

    `lengths`: how many captions have 0, 1, … tokens. `codes`: how often each code occurs.
    """

    items: int
    lengths: np.ndarray
    codes: np.ndarray
    facts: ItemFacts

    @classmethod
    def of(cls, corpus: Corpus) -> Counted:
        """Count in a corpus's first groups."""
        items = 0
        lengths = np.zeros(TEXT_TOKENS + 1, np.int64)
        codes = np.zeros(corpus.manifest.codebook_size, np.int64)
        for visual, text in itertools.islice(corpus.groups(), _GROUPS):
            items += len(visual)
            lengths += np.bincount(text_mask(text).sum(-1), minlength=len(lengths))
            codes += np.bincount(visual.ravel(), minlength=len(codes))
        return cls(items, lengths, codes, item_facts(itertools.islice(corpus.lines(), items)))

    def real_frames(self, frames: int) -> np.ndarray:
        """How many clips have 1, 2, … `frames` real frames."""
        return np.array([self.facts.frames[number] for number in range(1, frames + 1)])


def histogram(counts: np.ndarray, first: int = 0) -> list[Bar]:
    """Counts of the numbers from `first` on; neighbours share a bar where there are too many."""
    width = -(-len(counts) // _MOST_BARS)
    starts = range(0, len(counts), width)
    ends = [min(start + width, len(counts)) - 1 for start in starts]
    labels = [
        f"{first + start}" + (f"–{first + end}" if end > start else "")
        for start, end in zip(starts, ends, strict=True)
    ]
    sums = [int(counts[start : start + width].sum()) for start in starts]
    return _bars(list(zip(labels, sums, strict=True)))


def failure_bars(corpus: Path) -> list[Bar]:
    """Failed items by reason, the most frequent first; what is rare is put together at the end."""
    kinds = failure_kinds(corpus)
    shown = kinds.most_common(_MOST_REASONS)
    rest = kinds.total() - sum(count for _, count in shown)
    others = [(f"{len(kinds) - len(shown):,} other reasons", rest)] if rest else []
    return _bars([*shown, *others])


def outcome_bars(manifest: CorpusManifest) -> list[Bar]:
    """What became of the source's items: shares of all of them."""
    counts = manifest.counts
    left_out = [(f"left out by the filter {name}", n) for name, n in counts.left_out.items()]
    return _shares([("in the corpus", counts.items), *left_out, ("failed", counts.failed)])


def shot_bars(stamp: PlanStamp | None) -> list[Bar]:
    """How many of the source's items are shots, and of how many films; empty where none is."""
    if stamp is None or not stamp.shots:
        return []
    films = f"{stamp.films:,} film" + "s" * (stamp.films > 1)
    others = stamp.items - stamp.shots
    whole = [("not cut into shots", others)] if others else []
    return _shares([(f"shots of {films}", stamp.shots), *whole])


def _shares(rows: Sequence[tuple[str, int]]) -> list[Bar]:
    return _bars(rows, sum(count for _, count in rows))


def _bars(rows: Sequence[tuple[str, int]], whole: int | None = None) -> list[Bar]:
    """Bars beside a whole, or beside the longest of them."""
    most = whole or max((count for _, count in rows), default=0)
    return [Bar(label, count, count / max(most, 1)) for label, count in rows]
