"""Videos longer than the model's grid: a window that slides over the frames made so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nuwa.generation.drawing import SamplingSettings
from megatron_nuwa.generation.sampling import OnFrame, OnToken, generate_tokens
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Context, Nuwa


def window_starts(frames: int, grid: Grid, overlap: int) -> list[int]:
    """First frame of every window, for a video of `frames` frames.

    Raises `ValueError` where `overlap` is not between 1 and one less than a window.
    """
    if frames < 1:
        raise ValueError(f"frames must be 1 or more, not {frames}")
    if frames <= grid.s:
        return [0]
    if not 1 <= overlap < grid.s:
        raise ValueError(
            f"overlap must be 1 to {grid.s - 1} frames, less than the {grid.s} of a window, "
            f"not {overlap}"
        )
    return list(range(0, frames - overlap, grid.s - overlap))


def generate_long(
    model: Nuwa,
    context: Context | Sequence[Context],
    without_text: Context | Sequence[Context],
    grid: Grid,
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    frames: int,
    overlap: int,
    known: Tensor | None = None,
    is_known: Tensor | None = None,
    on_token: OnToken | None = None,
    on_frame: OnFrame | None = None,
) -> Tensor:
    """Tokens int64 (batch, frames · h · w) of a video of any length.

    The last `overlap` frames of a window are the first ones of the next, given and kept; the model
    sees every window at the positions of its own grid. A seed's random numbers go on from window
    to window.

    Args:
        context, without_text: of the whole video, or one a window (see `window_starts`), so that
            the text may change on the way.
        known, is_known: as for `generate_tokens`, over (batch, frames · h · w).
        on_token, on_frame: called once a new cell and once a new frame, counted over the video.
    """
    starts = window_starts(frames, grid, overlap)
    contexts = _one_a_window("context", context, len(starts))
    without = _one_a_window("without_text", without_text, len(starts))
    frame, batch = grid.h * grid.w, len(seeds)
    cells = frames * frame
    tokens, is_there = _given(known, is_known, batch, cells)
    tokens = tokens.to(contexts[0].tokens.device)
    for start, own, own_without in zip(starts, contexts, without, strict=True):
        first = start * frame
        shown = min(grid.s, frames - start)
        done = 0 if start == 0 else overlap
        is_there[:, first : first + done * frame] = True
        here = slice(first, first + shown * frame)
        tokens[:, here] = generate_tokens(
            model,
            own,
            own_without,
            grid,
            seeds,
            settings,
            known=_padded(tokens[:, here], grid.cells),
            is_known=_padded(is_there[:, here], grid.cells),
            first_cell=first,
            frames=shown,
            on_token=_after(on_token, done * frame),
            on_frame=_shifted(on_frame, start, done),
        )
    return tokens


def _one_a_window(name: str, value: Context | Sequence[Context], windows: int) -> list[Context]:
    contexts = [value] * windows if isinstance(value, Context) else list(value)
    if len(contexts) != windows:
        raise ValueError(f"{name} must hold one a window: {windows}, not {len(contexts)}")
    return contexts


def _given(
    known: Tensor | None, is_known: Tensor | None, batch: int, cells: int
) -> tuple[Tensor, Tensor]:
    if (known is None) != (is_known is None):
        raise ValueError("known and is_known must be given together")
    if known is None or is_known is None:
        shape = (batch, cells)
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    if tuple(known.shape) != (batch, cells) or is_known.shape[-1] != cells:
        raise ValueError(
            f"known must be (batch, frames · h · w) {(batch, cells)}, and is_known alike or "
            f"({cells},), not {tuple(known.shape)} and {tuple(is_known.shape)}"
        )
    return known.clone(), is_known.cpu().expand(batch, cells).clone()


def _padded(cells: Tensor, length: int) -> Tensor:
    """(batch, n) with zeros up to a whole window, whose last frames are not made."""
    return torch.nn.functional.pad(cells, (0, length - cells.shape[1]))


def _after(on_token: OnToken | None, given: int) -> OnToken | None:
    """A callback without the calls for the cells that another window has made."""
    if on_token is None:
        return None
    left = given

    def call() -> None:
        nonlocal left
        if left:
            left -= 1
        else:
            on_token()

    return call


def _shifted(on_frame: OnFrame | None, start: int, given: int) -> OnFrame | None:
    if on_frame is None:
        return None

    def call(number: int, tokens: Tensor) -> None:
        if number >= given:
            on_frame(start + number, tokens)

    return call
