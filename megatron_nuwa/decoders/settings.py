"""What decides the pixels of decoded media, and what decoding may cost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from megatron_nuwa.config import Settings
from megatron_nuwa.errors import UserError

# Raised whenever the same file and settings would give other pixels than before.
DECODE_RULES_VERSION = 1
# Seconds: poll(), which waits for decoders, counts milliseconds in 32 bits.
LONGEST_WAIT = 1e6


class DecodeError(UserError):
    """A media file that cannot become frames; its text is one sentence that names the file.

    `permanent` where no further attempt can mend it.
    """

    permanent = False


class DecodeSettings(Settings):
    """How media become frames: `frames` of them (1 = an image), `image_size` pixels high and wide.

    With `fit` native, `image_size` is the shorter side; the longer keeps the aspect, cut to a
    multiple of `side_multiple`. `short_clips` says what a clip of too few frames gets: it is
    skipped, padded with its last frame, or sampled faster, so that its whole length is shown.
    """

    image_size: int = Field(ge=1)
    frames: int = Field(default=1, ge=1)
    frames_per_second: float = Field(default=2.5, gt=0)
    short_clips: Literal["skip", "pad", "faster"] = "skip"
    fit: Literal["crop", "native"] = "crop"
    side_multiple: int = Field(default=16, ge=1)
    backend: Literal["ffmpeg", "pyav"] = "ffmpeg"

    @model_validator(mode="after")
    def _sides_fit(self) -> Self:
        if self.fit == "native" and self.image_size % self.side_multiple:
            raise ValueError(
                f"image_size = {self.image_size} must be a multiple of side_multiple = "
                f"{self.side_multiple} where fit is native"
            )
        return self

    def fingerprint(self) -> str:
        """sha256 of everything that decides the pixels."""
        rules = {"rules": DECODE_RULES_VERSION, **self.model_dump(mode="json")}
        if self.frames == 1:
            # An image has neither a frame rate nor a length, and Pillow decodes it.
            del rules["frames_per_second"], rules["short_clips"], rules["backend"]
        if self.fit == "crop":
            # Left out where it does not matter, so that older corpora keep their fingerprint.
            del rules["fit"], rules["side_multiple"]
        if rules.get("backend") == "ffmpeg":
            del rules["backend"]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


class DecodeLimits(Settings):
    """What one item may cost before it is given up; it does not change the pixels of the others.

    Where all of a film is read, `seconds` holds for each minute of it, and it may have
    `film_hours`.
    """

    seconds: float = Field(default=120.0, gt=0)
    memory_gib: float = Field(default=4.0, gt=0)
    download_gib: float = Field(default=4.0, gt=0)
    film_hours: float = Field(default=24.0, gt=0, le=1e6)

    @property
    def memory_bytes(self) -> int:
        """`memory_gib` in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def download_bytes(self) -> int:
        """`download_gib` in bytes."""
        return int(self.download_gib * 2**30)


DEFAULT_LIMITS = DecodeLimits()


@dataclass(frozen=True)
class Decoded:
    """Frames uint8 (frames, H, W, 3), how many of them are real, and the rate they were taken at.

    `frames_per_second` is None for an image, and above the asked rate where a short clip was
    sampled faster.
    """

    frames: np.ndarray
    real: int
    frames_per_second: float | None
