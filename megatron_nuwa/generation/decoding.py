"""Decoding cell by cell with cached keys and values: constant work a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.generation.decoding_layer import CachedLayer, EncodedContext, parts_of
from megatron_nuwa.generation.row_linear import LogitHead, padded_rows
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.attention import Nearby
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.ops.decode import CellLists, Place, Span, cell_attention, head_dim_of


class CachedDecoder:
    """The decoder of a model over fixed contexts, a few cells at a time.

    All branches, such as a sketch and "None", decode the same tokens; their contexts may be of
    different kinds and sizes. `position` is the next cell.
    A `static` decoder reads its position from a tensor on the device instead of asking the host;
    on a GPU it always does, so that a graph of one step serves all cells.
    """

    @torch.no_grad()
    def __init__(
        self, model: Nuwa, branches: Sequence[Context], grid: Grid, *, static: bool = False
    ) -> None:
        self.grid, self.batch, self._model = grid, branches[0].tokens.shape[0], model
        self._rows = self.batch * len(branches)
        self.device = branches[0].tokens.device
        static = static or self.device.type != "cpu"
        layers: list[DecoderLayer] = list(model.decoder)  # type: ignore[arg-type]
        like = model.begin.vector
        head_dim = like.shape[-1] // layers[0].self_attention.heads
        scale = head_dim**-0.5
        (own_parts, own_part), (cross_parts, cross_part) = parts_of(layers[0])
        # Cross-attention is nearby or full, never of lines.
        cross_pattern = layers[0].cross_attention.pattern
        assert isinstance(cross_pattern, Nearby)
        contexts = []
        for alike in _groups(branches):
            _, across = model.decoder_geometries(grid, alike[0])
            attention = cell_attention(
                CellLists.nearby(cross_pattern.window(across)),
                like,
                mask=_joined_mask(alike),
                scale=scale,
                parts=cross_parts,
                part=cross_part,
                static=static,
            )
            rows = [row for context in alike for row in encoded_rows(model, context)]
            contexts.append(EncodedContext(rows, attention))
        own, _ = model.decoder_geometries(grid, branches[0])
        self._lists = lists = layers[0].self_attention.pattern.lists(own)
        looks_back = cell_attention(
            lists, like, scale=scale, parts=own_parts, part=own_part, static=static
        )
        self._attentions = [looks_back, *(context.attention for context in contexts)]
        kept_dim = head_dim_of(like, head_dim, static)
        self._layers = [
            CachedLayer(layer, contexts, looks_back, lists.slots, kept_dim) for layer in layers
        ]
        embedding = model.visual_embedding
        codes = embedding.projection(embedding.codes.weight)
        # `<bos>` is one more code, and what stands before cell n lies in column n.
        self._vectors = torch.cat([codes, model.begin.vector.to(codes.dtype).unsqueeze(0)])
        self._inputs = torch.full((self.batch, grid.cells + 1), len(codes), device=self.device)
        self._positions = model.target_positions(grid)
        self._head = LogitHead(codes if model.head is None else model.head.weight)
        self._place = torch.zeros(1, dtype=torch.int64, device=self.device) if static else None
        self.position = 0

    @property
    def position(self) -> int:
        """The next cell."""
        return self._position

    @position.setter
    def position(self, cell: int) -> None:
        self._position = cell
        if self._place is not None:
            self._place.fill_(cell)

    def tokens(self, first: int, stop: int) -> Tensor:
        """Tokens int64 (batch, stop − first) of cells that are written."""
        return self._inputs[:, first + 1 : stop + 1]

    def write(self, first: int, tokens: Tensor) -> None:
        """Set tokens (batch, n) of the cells from `first` on; decoding goes on where it was."""
        self._inputs[:, first + 1 : first + 1 + tokens.shape[1]] = tokens

    def here(self, cells: Tensor) -> Tensor:
        """The column of (batch, grid cells) that belongs to the next cell."""
        if self._place is None:
            return cells[:, self._position]
        return cells.index_select(1, self._place).squeeze(1)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits fp32 (branches · batch, codebook size) of the next cell; `append` comes after."""
        place = Span(self._position, 1) if self._place is None else self._place
        x = self._model.decoder_norm(self._run(place))
        return self._head(x)[: self._rows]

    def append(self, tokens: Tensor) -> None:
        """Set the tokens (batch,) of the next cell, and go on to the one after it."""
        if self._place is None:
            self._inputs[:, self._position + 1] = tokens
        else:
            self._place.add_(1)
            self._inputs.index_copy_(1, self._place, tokens.unsqueeze(1))
        self._position += 1

    def went_on(self, cells: int = 1) -> None:
        """Count cells that the device has taken in by itself."""
        self._position += cells

    @torch.no_grad()
    def skip(self, steps: int) -> None:
        """Take in the next cells, whose tokens are written, without logits: a frame at a time."""
        frame, last = self.grid.h * self.grid.w, self._position + steps
        while self._position < last:
            first = self._position
            stop = min(last, (first // frame + 1) * frame)
            place: Place = Span(first, stop - first)
            if self._place is not None:
                place = torch.arange(first, stop, device=self.device)
            self._run(place)
            self.position = stop

    def _run(self, place: Place) -> Tensor:
        """The layers' output for these cells, (padded rows, width)."""
        if isinstance(place, Span):
            cells = slice(place.first, place.first + place.steps)
            tokens, positions = self._inputs[:, cells], self._positions[cells]
        else:
            tokens = self._inputs.index_select(1, place)
            positions = self._positions.index_select(0, place)
        x = F.embedding(tokens, self._vectors) + positions
        if self._rows > self.batch:
            x = x.repeat(self._rows // self.batch, 1, 1)
        x = x.flatten(0, 1)
        count = len(x)
        x = F.pad(x, (0, 0, 0, padded_rows(count, self.device) - count))
        for attention in self._attentions:
            attention.go_to(place)
        slots = self._lists.slots_of(place)
        for layer in self._layers:
            x = layer.step(x, count, slots)
        return x


def encoded_rows(model: Nuwa, context: Context) -> list[Tensor]:
    """The encoder's output (context cells, width) of every row, the same tensor for equal rows.

    Rows are encoded one by one: the same bits whatever the batch.
    """
    made: dict[bytes, Tensor] = {}
    rows = []
    for number, tokens in enumerate(context.tokens):
        mask = None if context.mask is None else context.mask[number]
        key = tokens.cpu().numpy().tobytes() + (
            b"" if mask is None else mask.cpu().numpy().tobytes()
        )
        if key not in made:
            alone = replace(
                context,
                tokens=tokens.unsqueeze(0),
                mask=None if mask is None else mask.unsqueeze(0),
            )
            made[key] = model.encode(alone)[0]
        rows.append(made[key])
    return rows


def _groups(branches: Sequence[Context]) -> list[list[Context]]:
    """Successive branches whose contexts are alike, and so fit into one cache."""
    groups: list[list[Context]] = []
    for context in branches:
        last = groups[-1][0] if groups else None
        if last is not None and (last.kind, last.grid, last.mask is None) == (
            context.kind,
            context.grid,
            context.mask is None,
        ):
            groups[-1].append(context)
        else:
            groups.append([context])
    return groups


def _joined_mask(branches: Sequence[Context]) -> Tensor | None:
    masks = [context.mask for context in branches]
    if any(mask is None for mask in masks):
        return None
    return torch.cat([mask for mask in masks if mask is not None])
