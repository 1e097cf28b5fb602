"""Choosing a token from its logits: temperature, top-k, top-p, and one random number a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A Philox block holds four numbers.
_BLOCK = 4
# What fp32 can divide by; a colder draw is the same one.
_COLDEST = 1e-30
# Beyond it, the mixture of finite logits might not be finite.
MOST_GUIDANCE = 1e6


@dataclass(frozen=True)
class SamplingSettings:
    """How a token is drawn from its logits.

    `guidance` g mixes `u + g·(c − u)` from the logits with (c) and without (u) the text; 1 is
    plain sampling. `temperature` 0 takes the most likely token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("guidance", 0 <= self.guidance <= MOST_GUIDANCE, f"0 to {MOST_GUIDANCE:,.0f}"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")


def uniform_numbers(seeds: Sequence[int], first: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64 (seeds, count): those of the cells first … first + count − 1.

    A number depends on its seed and its cell alone (a counter-based stream, Philox), so what is
    drawn in one cell does not shift the draws of another.
    """
    skipped = first % _BLOCK
    streams = [
        np.random.Philox(key=seed % 2**64, counter=first // _BLOCK).random_raw(skipped + count)
        for seed in seeds
    ]
    # 32 bits: a product with a sum of probabilities then never rounds up to that sum.
    high = np.stack(streams)[:, skipped:] >> np.uint64(32)
    return torch.from_numpy(high.astype(np.float64) / 2**32)


def draw(logits: Tensor, settings: SamplingSettings, uniforms: Tensor) -> Tensor:
    """Tokens int64 (batch,) from logits (batch, codebook size), a number of `uniforms` each.

    `uniforms` (batch,) lie in [0, 1) and pick a place of the cumulative distribution. All rows
    are drawn at once, without waiting for the device.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    # The likeliest is at 0, which no temperature makes infinite.
    below = logits - logits.amax(-1, keepdim=True)
    cooled = below / max(settings.temperature, _COLDEST)
    probabilities = filtered(cooled, settings).softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    places = uniforms.to(cumulative.dtype).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, places, right=True).squeeze(-1)


def filtered(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits with -inf outside the top k, and outside the smallest set of mass top p.

    Of equal logits as many stay as there is room for.
    """
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        values, places = logits.topk(settings.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, places, values)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        # A token stays while the mass before it is below p, so the likeliest always stays.
        outside = mass.cumsum(-1, dtype=torch.float64) - mass >= settings.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits (batch, …) of one branch, or the mixture of (2 · batch, …): with text, then without.

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), as Make-A-Scene applies it to
    tokens (arXiv 2203.13131).
    """
    if guidance == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
