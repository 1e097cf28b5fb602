"""Decoding cell by cell with cached keys and values: constant work a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.models.nuwa import Context, Nuwa


class CachedDecoder:
    """The decoder of a model, run one cell at a time over a fixed context."""

    def __init__(self, model: Nuwa, context: Context, grid: Grid) -> None:
        self._model = model
        self._mask = context.mask
        own, across = model.decoder_geometries(grid, context)
        encoded = model.encode(context)
        self._positions = model.target_positions(grid)
        self._layers = [_LayerCache(layer, encoded, grid) for layer in model.decoder]  # type: ignore[arg-type]
        first: DecoderLayer = model.decoder[0]  # type: ignore[assignment]
        self._own = first.self_attention.pattern.keys_seen(own, encoded.device)
        self._across = first.cross_attention.pattern.keys_seen(across, encoded.device)
        self._next = 0

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (batch, codebook size) of the next cell.

        `previous` int64 (batch,) is the token of the cell before it, None at the first cell.
        """
        n, model = self._next, self._model
        if (previous is None) != (n == 0):
            raise ValueError("previous must be None at the first cell and a token at every other")
        batch = self._layers[0].keys.shape[0]
        vector = (
            model.begin.expand(batch, -1)
            if previous is None
            else model.visual_embedding(previous.unsqueeze(1)).squeeze(1)
        )
        x = (vector + self._positions[n]).unsqueeze(1)
        for layer in self._layers:
            x = layer.step(x, n, self._own[n], self._across[n], self._mask)
        self._next += 1
        return model.predict(x).squeeze(1)


class _LayerCache:
    """Keys and values of one layer: the context's, and those of the cells decoded so far."""

    def __init__(self, layer: DecoderLayer, encoded: Tensor, grid: Grid) -> None:
        self._layer = layer
        cross = layer.cross_attention
        self._context_keys = cross.split_heads(cross.key(encoded))
        self._context_values = cross.split_heads(cross.value(encoded))
        shape = (encoded.shape[0], grid.cells, *self._context_keys.shape[2:])
        self.keys = encoded.new_zeros(shape)
        self.values = encoded.new_zeros(shape)

    def step(
        self,
        x: Tensor,
        n: int,
        near: Tensor | slice,
        near_context: Tensor | slice,
        mask: Tensor | None,
    ) -> Tensor:
        attention, cross = self._layer.self_attention, self._layer.cross_attention

        def look_back(h: Tensor) -> Tensor:
            self.keys[:, n : n + 1] = attention.split_heads(attention.key(h))
            self.values[:, n : n + 1] = attention.split_heads(attention.value(h))
            return _attend(attention, h, self.keys[:, near], self.values[:, near], None)

        def look_across(h: Tensor) -> Tensor:
            visible = None if mask is None else mask[:, near_context]
            keys = self._context_keys[:, near_context]
            return _attend(cross, h, keys, self._context_values[:, near_context], visible)

        return self._layer.combine(x, look_back, look_across)


def _attend(
    attention: Attention, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None
) -> Tensor:
    """One query over the gathered keys; zeros where none is visible."""
    query = attention.split_heads(attention.query(x)).transpose(1, 2)
    allowed = None if visible is None else visible[:, None, None, :]
    has_keys = None if allowed is None else allowed.any(-1, keepdim=True)
    if allowed is not None and has_keys is not None:
        allowed = allowed | ~has_keys
    mixed = F.scaled_dot_product_attention(
        query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=allowed
    )
    if has_keys is not None:
        mixed = mixed.masked_fill(~has_keys, 0)
    return attention.output(mixed.transpose(1, 2).flatten(2))
