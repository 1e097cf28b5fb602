"""What a corpus holds, in one table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_list import ShardList
from megatron_nuwa.data.text import TEXT_TOKENS, text_mask
from megatron_nuwa.training.progress import Progress, track
from preprocessing.ledger import FAILURES_FILE
from preprocessing.sources.samples import MEDIA

SHOWN_REASONS = 10
# `repr` takes double quotation marks for what has a single one in it.
_QUOTATION = re.compile(r"""'[^']*'|"[^"]*'[^"]*\"""")
# The medium that a reason begins with, whose name may hold spaces.
_SUFFIX = "|".join(map(re.escape, MEDIA))
_MEDIUM = re.compile(rf"^(?:(?!: ).)*?(?:{_SUFFIX})\b(?:\?\S*)?", re.IGNORECASE | re.DOTALL)
_NAME_OR_NUMBER = re.compile(r"\S*/\S+|\S+\.\w+|\b\d+(?:,\d+)*\b")
_RUN = re.compile(r"…(?:[\s…]*…)+")


def corpus_table(folder: Path) -> Table:
    """A table of counts, sizes, caption lengths, codebook use and failures.

    Raises `UserError` where there is no finished corpus.
    """
    corpus = Corpus(folder)
    table = Table(title=f"corpus {folder}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(corpus):
        table.add_row(name, value)
    return table


def codebook_use(counts: np.ndarray) -> tuple[float, float]:
    """Perplexity of the codes' frequencies and the share of codes in use, from their counts."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum())), len(share) / len(counts)


def percentile(counts: np.ndarray, share: float) -> float:
    """What `np.percentile` says of values 0, 1, … that occur so often."""
    ends = np.cumsum(counts)
    place = (ends[-1] - 1) * share / 100
    below, above = np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")
    return float(below + (above - below) * (place % 1))


def _rows(corpus: Corpus) -> Iterator[tuple[str, str]]:
    manifest, grid = corpus.manifest, corpus.grid
    counts = manifest.counts
    size = ShardList.of(manifest.shards).total("bytes")
    rate = manifest.frames_per_second
    yield "grid", f"{grid.h}×{grid.w}×{grid.s}" + (f" at {rate:g} frames/s" if rate else "")
    yield "items", f"{counts.items:,} in {len(manifest.shards)} shards"
    yield "captions", f"{counts.captions:,} ({counts.captions / counts.items:.2f} an item)"
    lengths = _caption_lengths(corpus)
    yield "visual tokens", f"{counts.items * grid.cells:,} ({grid.cells:,} an item)"
    if corpus.has_sketches:
        yield "sketch tokens", f"{counts.items * grid.cells:,} ({grid.cells:,} an item)"
    yield "text tokens", f"{int(lengths @ np.arange(len(lengths))):,} without padding"
    yield "bytes", f"{size:,} ({size / counts.items:,.0f} an item)"
    low, half, high, top = (percentile(lengths, share) for share in (0, 50, 95, 100))
    yield (
        "caption length",
        f"{low:.0f} shortest, {half:.0f} median, {high:.0f} 95th percentile, {top:.0f} longest",
    )
    with Progress("items whose codes are counted", len(corpus)) as shown:
        codes = corpus.visual_counts(shown.advance)
    yield "codebook", _use(codes)
    yield "code frequencies", _frequencies(codes)
    if corpus.has_sketches:
        with Progress("items whose sketches' codes are counted", len(corpus)) as shown:
            sketch_codes = corpus.sketch_counts(shown.advance)
        yield "sketch codebook", _use(sketch_codes)
    facts = item_facts(track(corpus.lines(), "items whose metadata are read", total=len(corpus)))
    if grid.s > 1:
        frames = facts.frames
        yield "real frames", ", ".join(f"{n} in {frames[n]:,} items" for n in sorted(frames))
        yield "short clips", f"{facts.padded(grid.s):,} padded, {_faster(facts)}"
    for writer, number in facts.writers.most_common(SHOWN_REASONS):
        yield "captions by", f"{writer}: {number:,} ({number / counts.captions:.1%})"
    for name, number in counts.left_out.items():
        yield "left out", f"{name}: {number:,}"
    yield "failed", f"{counts.failed:,}"
    for reason, number in failure_kinds(corpus.path).most_common(SHOWN_REASONS):
        yield "", f"{number:,} × {reason}"


def _use(codes: np.ndarray) -> str:
    perplexity, share = codebook_use(codes)
    return f"{len(codes):,} codes, {share:.1%} in use, perplexity {perplexity:,.1f}"


def _frequencies(codes: np.ndarray) -> str:
    """How unevenly the codes occur: what the most frequent ones take of all tokens."""
    shares = np.sort(codes)[::-1] / codes.sum()
    top = f"most frequent code {shares[0]:.1%} of the tokens"
    for part in (0.01, 0.1):
        first = int(np.ceil(part * len(shares)))
        top += f", top {part:.0%} of the codes {shares[:first].sum():.1%}"
    return top


def _caption_lengths(corpus: Corpus) -> np.ndarray:
    """How many captions have 0, 1, … tokens."""
    lengths = np.zeros(TEXT_TOKENS + 1, np.int64)
    with Progress("items whose captions are counted", len(corpus)) as shown:
        for visual, text in corpus.groups():
            lengths += np.bincount(text_mask(text).sum(-1), minlength=len(lengths))
            shown.advance(len(visual))
    return lengths


@dataclass(frozen=True)
class ItemFacts:
    """What metadata say of items: how many have so many real frames, or their own rate.

    `writers` counts captions by who wrote them.
    """

    frames: Counter[int]
    rates: Counter[float]
    writers: Counter[str]

    @property
    def faster(self) -> int:
        """How many were sampled at another rate than the corpus's."""
        return self.rates.total()

    def padded(self, frames: int) -> int:
        """How many have fewer real frames than the corpus's items have frames."""
        return self.frames.total() - self.frames[frames]


def item_facts(lines: Iterable[Mapping[str, Any]]) -> ItemFacts:
    """Count what lines of metadata say."""
    facts = ItemFacts(Counter(), Counter(), Counter())
    for item in lines:
        facts.frames[item["frames"]] += 1
        if "frames_per_second" in item:
            facts.rates[item["frames_per_second"]] += 1
        unknown = [None] * len(item["captions"])
        facts.writers.update(name or "unknown" for name in item.get("provenance", unknown))
    return facts


def _faster(facts: ItemFacts) -> str:
    most = f" (at up to {max(facts.rates):g} frames/s)" if facts.rates else ""
    return f"{facts.faster:,} sampled faster{most}"


def failure_kinds(folder: Path) -> Counter[str]:
    """Failures by reason, names, quotations and numbers removed so that like meets like.

    What filters left out is not among them.
    """
    kinds: Counter[str] = Counter()
    path = folder / FAILURES_FILE
    if path.exists():
        # Not `splitlines`, which takes more than a line feed for the end of a line.
        with path.open(encoding="utf-8", newline="\n") as lines:
            for failure in map(json.loads, lines):
                if "filter" not in failure:
                    kinds[_kind(failure["reason"])] += 1
    return kinds


def _kind(reason: str) -> str:
    named = _MEDIUM.sub("…", _QUOTATION.sub("…", reason), count=1)
    return _RUN.sub("…", _NAME_OR_NUMBER.sub("…", named))
