"""Filters: small named rules about which items a corpus takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.decoders import DecodeLimits, MediaFacts, media_facts
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from preprocessing.sources import SourceItem, local_copy, named_as_source

# Where in a clip its hashes are taken: the first, the middle and the last frame.
HASHED_FRAMES = 3


class FilteredError(UserError):
    """An item that a filter left out; `filter` is the filter's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"filter '{name}': {reason}")
        self.filter = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[FilteredError], tuple[str, str]]:
        return FilteredError, (self.filter, self.reason)


class Candidate:
    """An item before the filters; its medium is fetched and looked at only where a filter asks.

    What is fetched is there until `copies` is closed.
    """

    def __init__(
        self, item: SourceItem, copies: ExitStack, limits: DecodeLimits = DEFAULT_LIMITS
    ) -> None:
        self.item = item
        self._copies = copies
        self._limits = limits

    @cached_property
    def path(self) -> Path:
        """The medium as a local file; raises `DecodeError`, or `MachineError` (`local_copy`)."""
        return self._copies.enter_context(local_copy(self.item.media, self._limits))

    @cached_property
    def facts(self) -> MediaFacts:
        """Size and length of the medium; raises as `path`."""
        with named_as_source(self.item.media, self.path):
            return media_facts(self.path, self._limits)

    @property
    def seconds(self) -> float | None:
        """Length of the item's window; None for an image."""
        if self.facts.seconds is None:
            return None
        end = self.facts.seconds
        if self.item.end is not None:
            end = min(end, self.item.end)
        return max(0.0, end - (self.item.start or 0.0))


class Filter(Settings, ABC):
    """One rule; its fields are its settings and `name` says which rule it is."""

    name: str

    @abstractmethod
    def objection(self, candidate: Candidate) -> str | None:
        """Why the item is left out, in words; None where it is taken. May raise as `path`."""


class MinimumSize(Filter):
    """Leaves out media whose shorter side has fewer than `pixels` pixels."""

    name: Literal["minimum_size"] = "minimum_size"
    pixels: int = Field(ge=1)

    def objection(self, candidate: Candidate) -> str | None:
        """As `Filter.objection`."""
        facts = candidate.facts
        if min(facts.width, facts.height) >= self.pixels:
            return None
        return f"{facts.width}×{facts.height} pixels, and the shorter side must have {self.pixels}"


class AspectRatio(Filter):
    """Leaves out media whose longer side is more than `largest` times the shorter."""

    name: Literal["aspect_ratio"] = "aspect_ratio"
    largest: float = Field(ge=1)

    def objection(self, candidate: Candidate) -> str | None:
        """As `Filter.objection`."""
        facts = candidate.facts
        ratio = max(facts.width, facts.height) / max(1, min(facts.width, facts.height))
        if ratio <= self.largest:
            return None
        return f"{facts.width}×{facts.height} pixels are longer than {self.largest:g} to 1"


class Duration(Filter):
    """Leaves out clips, or windows of clips, shorter or longer than so many seconds."""

    name: Literal["duration"] = "duration"
    shortest: float = Field(default=0.0, ge=0)
    longest: float | None = Field(default=None, gt=0)

    def objection(self, candidate: Candidate) -> str | None:
        """As `Filter.objection`; images have no length and are taken."""
        seconds = candidate.seconds
        if seconds is None:
            return None
        if seconds < self.shortest:
            return f"{seconds:.3g} s are less than {self.shortest:g}"
        if self.longest is not None and seconds > self.longest:
            return f"{seconds:.3g} s are more than {self.longest:g}"
        return None


class CaptionLength(Filter):
    """Leaves out items that have no caption of `fewest` to `most` words."""

    name: Literal["caption_length"] = "caption_length"
    fewest: int = Field(default=1, ge=0)
    most: int | None = Field(default=None, ge=1)

    def objection(self, candidate: Candidate) -> str | None:
        """As `Filter.objection`."""
        counts = [len(caption.split()) for caption in candidate.item.captions]
        if any(self.fewest <= n and (self.most is None or n <= self.most) for n in counts):
            return None
        most = "any number of" if self.most is None else str(self.most)
        return f"no caption has {self.fewest} to {most} words (they have {counts})"


AnyFilter = Annotated[
    MinimumSize | AspectRatio | Duration | CaptionLength, Field(discriminator="name")
]


NEAR_DUPLICATES = "near_duplicates"


class NearDuplicates(Settings):
    """Of items that look alike, the first of the source is taken.

    Two items look alike where each of their hashes differs in at most `distance` of 64 bits.
    """

    distance: int = Field(default=3, ge=0, le=15)


class FilterSettings(Settings):
    """The filters of a corpus, in the order in which they are asked."""

    filters: tuple[AnyFilter, ...] = ()
    near_duplicates: NearDuplicates | None = None


def perceptual_hashes(frames: np.ndarray, real: int | None = None) -> np.ndarray:
    """dHash of the first, middle and last real frame: uint64 (3,); of an image three times one.

    Takes frames uint8 (frames, H, W, 3). A bit says whether a cell of the frame, shrunk to 9 × 8,
    is darker than its right neighbour.
    """
    last = (len(frames) if real is None else real) - 1
    return np.array([_difference_hash(frames[n]) for n in (0, last // 2, last)], np.uint64)


def _difference_hash(frame: np.ndarray) -> int:
    grey = Image.fromarray(frame).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey).astype(int)
    bits = (cells[:, :-1] < cells[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def apply_filters(filters: Sequence[Filter], candidate: Candidate) -> None:
    """Ask the filters in order; the first objection is raised as `FilteredError`."""
    for rule in filters:
        objection = rule.objection(candidate)
        if objection is not None:
            raise FilteredError(rule.name, f"item {candidate.item.id!r}: {objection}")
