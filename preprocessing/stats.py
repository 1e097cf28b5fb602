"""What a corpus holds, in one table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shard_list import ShardList
from megatron_nuwa.data.text import TEXT_TOKENS, text_mask
from preprocessing.ledger import FAILURES_FILE

SHOWN_REASONS = 10


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
    lengths = np.zeros(TEXT_TOKENS + 1, np.int64)
    for _, text in corpus.groups():
        lengths += np.bincount(text_mask(text).sum(-1), minlength=len(lengths))
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
    codes = corpus.visual_counts()
    yield "codebook", _use(codes)
    yield "code frequencies", _frequencies(codes)
    if corpus.has_sketches:
        yield "sketch codebook", _use(corpus.sketch_counts())
    frames, writers = _item_counts(corpus)
    if grid.s > 1:
        yield "real frames", ", ".join(f"{n} in {frames[n]:,} items" for n in sorted(frames))
    for writer, number in writers.most_common(SHOWN_REASONS):
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


def _item_counts(corpus: Corpus) -> tuple[Counter[int], Counter[str]]:
    """Items by their number of real frames, and captions by who wrote them."""
    frames: Counter[int] = Counter()
    writers: Counter[str] = Counter()
    for item in corpus.lines():
        frames[item["frames"]] += 1
        unknown = [None] * len(item["captions"])
        writers.update(name or "unknown" for name in item.get("provenance", unknown))
    return frames, writers


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
                    reason = re.sub(r"'[^']*'|\S*/\S+|\S+\.\w+|\b\d+\b", "…", failure["reason"])
                    kinds[reason] += 1
    return kinds
