"""Choosing tokens: temperature, top-k, top-p, classifier-free guidance, a seed a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa


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
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("guidance", self.guidance >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")


@torch.no_grad()
def generate_tokens(
    model: Nuwa,
    context: Context,
    without_text: Context,
    grid: Grid,
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    known: Tensor | None = None,
    is_known: Tensor | None = None,
    on_token: Callable[[], object] | None = None,
    on_frame: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Tokens int64 (batch, grid cells), cell by cell in generation order.

    Args:
        context, without_text: the encoder's input with the text, and with "None" in its place;
            the second is read only when guidance differs from 1.
        seeds: one a sample; a sample depends on its own seed alone, not on its neighbours.
        known: int64 (batch, grid cells) tokens that are given; those where `is_known`
            (bool, grid cells or batch × grid cells) is True are kept as they are.
        on_token: called after every cell, for a progress bar.
        on_frame: called after every frame with its number and tokens (batch, h·w).
    """
    batch = len(seeds)
    if context.tokens.shape[0] != batch:
        raise ValueError(
            f"seeds must hold one a sample: {context.tokens.shape[0]} samples, {batch} seeds"
        )
    if (known is None) != (is_known is None):
        raise ValueError("known and is_known must be given together")
    guided = settings.guidance != 1
    decoder = CachedDecoder(model, _joined(context, without_text) if guided else context, grid)
    device = context.tokens.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens = torch.zeros(batch, grid.cells, dtype=torch.int64, device=device)
    area = grid.h * grid.w
    previous: Tensor | None = None
    for n in range(grid.cells):
        logits = decoder.step(previous).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + settings.guidance * (conditional - unconditional)
        drawn = draw(logits, settings, generators)
        if known is not None and is_known is not None:
            drawn = torch.where(is_known[..., n], known[:, n], drawn)
        tokens[:, n] = drawn
        previous = tokens[:, n].repeat(2) if guided else tokens[:, n]
        if on_token is not None:
            on_token()
        if on_frame is not None and (n + 1) % area == 0:
            on_frame(n // area, tokens[:, n + 1 - area : n + 1])
    return tokens


def draw(
    logits: Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator]
) -> Tensor:
    """One token a row of `logits` (batch, codebook size), each row by its own generator."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered(logits / settings.temperature, settings).softmax(-1).cpu()
    rows = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(rows).to(logits.device)


def filtered(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits with -inf outside the top k, and outside the smallest set of mass top p."""
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        # A token stays while the mass before it is below p, so the likeliest always stays.
        outside = mass.cumsum(-1) - mass >= settings.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def _joined(first: Context, second: Context) -> Context:
    mask = None
    if first.mask is not None and second.mask is not None:
        mask = torch.cat([first.mask, second.mask])
    return Context(first.kind, torch.cat([first.tokens, second.tokens]), first.grid, mask)
