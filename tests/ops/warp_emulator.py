"""The tensor-core kernels' algorithm in PyTorch: the same tables, tiles, ring and order.

Rows and columns are (images, tokens, size), an image being one head of one batch item; sums are in
the tensors' own precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.ops.tilings import GROUP, TILE_ROWS
from megatron_nuwa.ops.warp_tables import Shape, WarpTables

LAG = 8.0
LOG2E = 1.4426950408889634

# gathered columns (images, 32, …) one a tensor, visible (16, 32)
Add = Callable[[list[Tensor], Tensor], None]


def decode(shape: Shape, entry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slots (32,) and visible (16 rows, 32 columns) of one group, as the lanes' fragments lie."""
    entry = entry.astype(np.int64) & 0xFFFFFFFF
    offsets, bits = entry & 0xFFFF, entry >> 16
    slots = offsets // shape.row_bytes
    assert np.array_equal(shape.offsets(slots), offsets)
    visible = np.zeros((TILE_ROWS, GROUP), bool)
    for lane in range(GROUP):
        for element in range(16):
            row = lane // 4 + 8 * (element % 4 // 2)
            column = 8 * (element // 4) + 2 * (lane % 4) + element % 2
            visible[row, column] = bits[lane] >> element & 1
    return slots, visible


def walk(
    tables: WarpTables,
    shape: Shape,
    columns: list[Tensor],
    start: Callable[[Tensor], tuple[Add, Callable[[], None]]],
) -> None:
    """For every tile, `start(rows)` gives what to do with each group and what at the end."""
    warp_count, chunk, stages = shape.warps, shape.chunk, shape.stages
    block_chunks, ring_columns, rows, starts, ends, entries = (t.numpy() for t in tables)
    for block in range(len(block_chunks) - 1):
        # Where the ring stands when the block begins.
        turn = block * 5 % stages
        first, last = block_chunks[block], block_chunks[block + 1]
        of_block = ring_columns[first * chunk : last * chunk]
        # What was never gathered is NaN, so that reading it shows.
        ring = [t.new_full((t.shape[0], stages * chunk, *t.shape[2:]), torch.nan) for t in columns]

        def gather(
            step: int,
            of_block: np.ndarray = of_block,
            ring: list[Tensor] = ring,
            turn: int = turn,
        ) -> None:
            here = of_block[step * chunk : (step + 1) * chunk]
            if step >= shape.row_chunks and not len(here):
                return
            start = (turn + step) % stages * chunk
            for target, source in zip(ring, columns, strict=True):
                target[:, start : start + chunk] = torch.nan
                if step >= shape.row_chunks:
                    target[:, start + np.flatnonzero(here >= 0)] = source[:, here[here >= 0]]

        warps = [
            start(torch.from_numpy(of_tile))
            for of_tile in rows.reshape(-1, warp_count, TILE_ROWS)[block].astype(np.int64)
        ]
        group = starts.reshape(-1, warp_count)[block].copy()
        for step in range(stages - 2):
            gather(step)
        for step in range(last - first):
            # The soonest that a kernel may: every warp is done with the step before.
            gather(step + stages - 2)
            for warp, (add, _) in enumerate(warps):
                end = ends.reshape(-1, warp_count)[first + step, warp]
                for entry in entries[group[warp] : end]:
                    slots, visible = decode(shape, entry)
                    slots = (slots + turn * chunk) % (stages * chunk)
                    add([t[:, slots] for t in ring], torch.from_numpy(visible))
                group[warp] = max(group[warp], end)
        for _, finish in warps:
            finish()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shown: Tensor,
    tables: WarpTables,
    shape: Shape,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log_sum; `shown` (images, columns) is the context mask, 1.0 where seen."""
    images, tokens, size = query.shape
    output, log_sum = torch.full_like(query, torch.nan), query.new_full((images, tokens), torch.nan)

    def start(rows: Tensor) -> tuple[Add, Callable[[], None]]:
        tile = query[:, rows.clamp(min=0)] * (rows >= 0).unsqueeze(1)
        reference = query.new_full((images, TILE_ROWS), -3e38)
        total = query.new_zeros(images, TILE_ROWS)
        weighted = query.new_zeros(images, TILE_ROWS, size)

        def add(columns: list[Tensor], visible: Tensor) -> None:
            nonlocal reference
            keys, values, is_shown = columns
            seen = visible & (is_shown == 1).unsqueeze(1)
            scores = (tile @ (keys * is_shown.unsqueeze(2)).mT * (scale * LOG2E)).masked_fill(
                ~seen, -torch.inf
            )
            high = scores.amax(2)
            # A warp raises the references of all its rows when one of them lags too far.
            raised = torch.where(
                (high > reference + LAG).any(1, keepdim=True), high.maximum(reference), reference
            )
            factor = torch.exp2(reference - raised)
            reference = raised
            weights = torch.exp2(scores - reference.unsqueeze(2))
            total.mul_(factor).add_(weights.sum(2))
            weighted.mul_(factor.unsqueeze(2)).add_(weights @ (values * is_shown.unsqueeze(2)))

        def finish() -> None:
            has_keys, real = total > 0, rows >= 0
            result = torch.where(has_keys.unsqueeze(2), weighted / total.unsqueeze(2), 0)
            output[:, rows[real]] = result[:, real]
            log = torch.where(has_keys, (reference + total.log2()) / LOG2E, torch.inf)
            log_sum[:, rows[real]] = log[:, real]

        return add, finish

    walk(tables, shape, [key, value, shown], start)
    return output, log_sum


def backward(
    rows_of: tuple[Tensor, Tensor],
    columns_of: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    shown: Tensor,
    tables: WarpTables,
    shape: Shape,
    scale: float,
    mirrored: bool,
) -> tuple[Tensor, Tensor]:
    """Σ dS · first columns and, of use when mirrored, Σ P · second columns, for every row.

    Rows are (query, grad) and columns (key, value), or mirrored; `statistics` are log_sum and
    Σ grad · output (images, queries); `shown` is the context mask (images, keys).
    """
    results = tuple(torch.full_like(t, torch.nan) for t in rows_of)
    beside = list(statistics) if mirrored else [shown]

    def start(rows: Tensor) -> tuple[Add, Callable[[], None]]:
        real, index = rows >= 0, rows.clamp(min=0)
        first, second = (t[:, index] * real.unsqueeze(1) for t in rows_of)
        sums = [torch.zeros_like(first), torch.zeros_like(second)]

        def add(columns: list[Tensor], visible: Tensor) -> None:
            first_columns, second_columns = columns[:2]
            if mirrored:
                log_sum, product = (t.unsqueeze(1) for t in columns[2:])
            else:
                is_shown = columns[2]
                visible = visible & (is_shown == 1).unsqueeze(1)
                log_sum, product = (t[:, index].unsqueeze(2) for t in statistics)
            scores = first @ first_columns.mT * scale
            weights = torch.where(visible, torch.exp(scores - log_sum), 0)
            changes = weights * (second @ second_columns.mT - product)
            sums[0].add_(changes @ first_columns)
            sums[1].add_(weights @ second_columns)

        def finish() -> None:
            kept = shown[:, index].unsqueeze(2) if mirrored else 1.0
            results[0][:, rows[real]] = (sums[0] * scale * kept)[:, real]
            results[1][:, rows[real]] = (sums[1] * kept)[:, real]

        return add, finish

    walk(tables, shape, [*columns_of, *beside], start)
    return results
