"""Videos longer than a window: what is kept, how many frames come out, and what seeds promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_decoding import CODES, make_model, rows_of, text
from torch import Tensor

from megatron_nuwa.generation.drawing import SamplingSettings, uniform_numbers
from megatron_nuwa.generation.longer import generate_long, window_starts
from megatron_nuwa.generation.sampling import generate_tokens
from megatron_nuwa.grid import Grid

GRID = Grid(3, 4, 4)
FRAME = GRID.h * GRID.w
GUIDED = SamplingSettings(top_k=30, guidance=2.0)


def long(frames: int, overlap: int, **changes: object) -> Tensor:
    arguments = {"seeds": [1, 2], "settings": GUIDED, **changes}
    context = arguments.pop("context", text(2))
    return generate_long(
        make_model(),
        context,
        text(2, seed=9),
        GRID,
        frames=frames,
        overlap=overlap,
        **arguments,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("frames", "overlap"), [(3, 1), (4, 9), (5, 1), (9, 2), (10, 3), (11, 1)])
def test_a_video_has_the_frames_asked_for_and_each_window_goes_on_from_the_last(
    frames: int, overlap: int
) -> None:
    tokens = long(frames, overlap)
    assert tokens.shape == (2, frames * FRAME)
    assert torch.equal(tokens, long(frames, overlap))
    starts = window_starts(frames, GRID, overlap)
    assert starts[-1] + GRID.s >= frames
    model, without = make_model(), text(2, seed=9)
    for start in starts[1:]:
        # The window by itself, its first frames given.
        first, shown = start * FRAME, min(GRID.s, frames - start) * FRAME
        known = torch.zeros(2, GRID.cells, dtype=torch.int64)
        known[:, : overlap * FRAME] = tokens[:, first : first + overlap * FRAME]
        window = generate_tokens(
            model,
            text(2),
            without,
            GRID,
            [1, 2],
            GUIDED,
            known=known,
            is_known=torch.arange(GRID.cells) < overlap * FRAME,
            first_cell=first,
        )
        assert torch.equal(window[:, :shown], tokens[:, first : first + shown])


def test_a_long_sample_does_not_depend_on_its_batch() -> None:
    together = long(7, 2)
    for row in range(2):
        alone = generate_long(
            make_model(),
            rows_of(text(2), [row]),
            rows_of(text(2, seed=9), [row]),
            GRID,
            [row + 1],
            GUIDED,
            frames=7,
            overlap=2,
        )
        assert torch.equal(alone[0], together[row])


def test_random_numbers_go_on_from_window_to_window() -> None:
    model = make_model()
    assert model.head is not None
    # All tokens are equally likely, so that a cell's token says its number.
    torch.nn.init.zeros_(model.head.weight)
    seeds, cells = [1, 2], 9 * FRAME
    tokens = generate_long(
        model, text(2), text(2), GRID, seeds, SamplingSettings(), frames=9, overlap=2
    )
    assert torch.equal(tokens, (uniform_numbers(seeds, 0, cells) * CODES).long())


def test_the_text_may_change_from_window_to_window() -> None:
    first, second = text(2), text(2, seed=5)
    plain = long(6, 2)
    changed = long(6, 2, context=[first, second])
    assert torch.equal(plain[:, : 4 * FRAME], changed[:, : 4 * FRAME])
    assert not torch.equal(plain[:, 4 * FRAME :], changed[:, 4 * FRAME :])
    with pytest.raises(ValueError, match="context must hold one a window: 2, not 3"):
        long(6, 2, context=[first, second, second])


def test_given_cells_anywhere_in_the_video_are_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    known = torch.randint(0, CODES, (2, 7 * FRAME), generator=generator)
    is_known = torch.rand(2, 7 * FRAME, generator=generator) < 0.3
    tokens = long(7, 1, known=known, is_known=is_known)
    assert torch.equal(tokens[is_known], known[is_known])
    assert not torch.equal(tokens, known)
    with pytest.raises(ValueError, match="known must be"):
        long(6, 1, known=known, is_known=is_known)
    for half in ({"known": known}, {"is_known": is_known}):
        with pytest.raises(ValueError, match="known and is_known must be given together"):
            long(7, 1, **half)


def test_progress_counts_new_cells_and_frames_once() -> None:
    counted: list[None] = []
    arrived: list[tuple[int, Tensor]] = []
    tokens = long(
        9,
        2,
        settings=replace(GUIDED, guidance=1.0),
        on_token=lambda: counted.append(None),
        on_frame=lambda frame, cells: arrived.append((frame, cells)),
    )
    assert len(counted) == 9 * FRAME
    assert [frame for frame, _ in arrived] == list(range(9))
    assert torch.equal(torch.cat([cells for _, cells in arrived], 1), tokens)


@pytest.mark.parametrize(
    ("frames", "overlap", "message"),
    [(9, 4, "overlap must be 1 to 3"), (9, 0, "overlap must be"), (0, 1, "frames must be")],
)
def test_windows_that_lead_nowhere_are_refused(frames: int, overlap: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        long(frames, overlap)
