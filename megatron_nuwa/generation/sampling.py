"""Generation of tokens: any set of cells given, a seed a sample, a frame or a token at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.decoding import CachedDecoder
from megatron_nuwa.generation.drawing import SamplingSettings, draw, guided, uniform_numbers
from megatron_nuwa.generation.graph import StepGraph
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa

OnToken = Callable[[], object]
OnFrame = Callable[[int, Tensor], object]


class NonFiniteLogitsError(UserError):
    """A model whose logits are NaN or infinite, from which nothing can be drawn."""


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
    first_cell: int = 0,
    frames: int | None = None,
    on_token: OnToken | None = None,
    on_frame: OnFrame | None = None,
) -> Tensor:
    """Tokens int64 (batch, grid cells) in generation order, or those of the first `frames` frames.

    A sample depends on its own seed, context and given cells alone: its tokens are the same, bit
    for bit, in a batch of any size and at any place of it. That is promised for fp32 and bf16 on
    a CPU with the compiled kernels, on the same machine, with the same dtype and number of
    threads. On a GPU it is meant to hold for batches of up to 16 rows (8 with guidance) without
    given cells; beyond that the matrix library may choose kernels by the number of rows.

    Raises `NonFiniteLogitsError` at the end of a frame whose logits were NaN or infinite.

    Args:
        context, without_text: the encoder's input with the text, and with "None" in its place;
            the second is read only when guidance differs from 1.
        seeds: one a sample.
        known: int64 (batch, grid cells) tokens that are given; those where `is_known` (bool,
            (grid cells,) or (batch, grid cells)) is True are kept as they are. Runs of cells that
            are known in all rows are taken in as blocks.
        first_cell: the place of cell 0 in the seeds' streams of random numbers, for windows of
            something longer.
        frames: how many frames of the grid to make; all when left out.
        on_token: called after every cell, for a progress bar.
        on_frame: called with a frame's number and its tokens (batch, h · w) when it is complete.
    """
    batch = len(seeds)
    if context.tokens.shape[0] != batch:
        raise ValueError(
            f"seeds must hold one a sample: {context.tokens.shape[0]} samples, {batch} seeds"
        )
    given = _checked(known, is_known, batch, grid, context.tokens.device)
    branches = [context] if settings.guidance == 1 else [context, without_text]
    decoder = CachedDecoder(model, branches, grid)
    uniforms = uniform_numbers(seeds, first_cell, grid.cells)
    sampler = Sampler(decoder, settings, uniforms, given)
    frame = grid.h * grid.w
    last = grid.cells if frames is None else min(frames, grid.s) * frame
    for first, stop in sampler.run(last):
        for cell in range(first, stop):
            if (cell + 1) % frame == 0:
                sampler.check((first_cell + cell) // frame)
            if on_token is not None:
                on_token()
            if on_frame is not None and (cell + 1) % frame == 0:
                on_frame(cell // frame, decoder.tokens(cell + 1 - frame, cell + 1).clone())
    return decoder.tokens(0, last).clone()


class Sampler:
    """Draws the cells of a decoder one after another, around those that are given.

    `advance` is `step`, on a GPU as a graph.
    """

    def __init__(
        self,
        decoder: CachedDecoder,
        settings: SamplingSettings,
        uniforms: Tensor,
        given: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`uniforms` (batch, cells) in [0, 1); `given` is (tokens, whether known), alike."""
        self.decoder, self._settings = decoder, settings
        self._uniforms = uniforms.to(decoder.device)
        # The largest logit so far, in every row; NaN or infinite once one was.
        self._largest = torch.zeros(len(uniforms), device=decoder.device)
        self._given = given
        weak = weakref.WeakMethod(self.step)

        def step() -> None:
            mine = weak()
            assert mine is not None
            mine()

        # Nothing that `advance` holds may hold the sampler: with its caches and its graph it is to
        # be gone as soon as nobody uses it, not when the garbage collector comes.
        on_gpu = decoder.device.type == "cuda"
        self.advance: Callable[[], None] = StepGraph(decoder, step).run if on_gpu else step
        self._all_known = torch.zeros(decoder.grid.cells, dtype=torch.bool)
        self._mixed = False
        if given is not None:
            tokens, is_known = given
            decoder.write(0, tokens)
            self._all_known = is_known.all(0).cpu()
            self._mixed = bool((is_known.any(0).cpu() != self._all_known).any())

    def run(self, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Fill the cells before `stop`; yields (first, stop) of those that are done since."""
        all_known = self._all_known[:stop].tolist()
        for first, end, known in _runs(all_known, self.decoder.grid):
            if known:
                self.decoder.skip(end - first)
                yield first, end
                continue
            for cell in range(first, end):
                self.advance()
                yield cell, cell + 1

    def step(self) -> None:
        """Draw the next cell in every row that does not know it."""
        decoder = self.decoder
        logits = guided(decoder.logits(), self._settings.guidance)
        torch.maximum(self._largest, logits.amax(-1).abs(), out=self._largest)
        tokens = draw(logits, self._settings, decoder.here(self._uniforms))
        if self._mixed:
            assert self._given is not None
            known, is_known = (decoder.here(cells) for cells in self._given)
            tokens = torch.where(is_known, known, tokens)
        decoder.append(tokens)

    def check(self, frame: int) -> None:
        """`NonFiniteLogitsError` where logits were NaN or infinite; this waits for the device."""
        if not bool(self._largest.isfinite().all()):
            raise NonFiniteLogitsError(
                f"the model's logits are NaN or infinite in frame {frame}: its weights are damaged "
                "or its training has diverged"
            )


def _checked(
    known: Tensor | None, is_known: Tensor | None, batch: int, grid: Grid, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Tokens and whether they are known, both (batch, cells), on the device."""
    if known is None and is_known is None:
        return None
    if known is None or is_known is None:
        raise ValueError("known and is_known must be given together")
    shape = (batch, grid.cells)
    if tuple(known.shape) != shape:
        raise ValueError(f"known must be (batch, cells) {shape}, not {tuple(known.shape)}")
    if is_known.dtype != torch.bool or tuple(is_known.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"is_known must be bool (cells,) or (batch, cells) {shape}, not {is_known.dtype} "
            f"{tuple(is_known.shape)}"
        )
    # What is not known may hold anything, and would be looked up while it waits for its turn.
    is_known = is_known.to(device).expand(shape)
    return known.to(device).masked_fill(~is_known, 0), is_known.contiguous()


def _runs(all_known: list[bool], grid: Grid) -> Iterator[tuple[int, int, bool]]:
    """(first, stop, whether known) of the longest runs of one kind, cut where frames end."""
    frame, first, cells = grid.h * grid.w, 0, len(all_known)
    for cell in range(1, cells + 1):
        if cell == cells or cell % frame == 0 or all_known[cell] != all_known[first]:
            yield first, cell, all_known[first]
            first = cell
