"""Decoding cell by cell with cached keys and values: constant work a token."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.attention import Attention, Nearby
from megatron_nuwa.models.layers import DecoderLayer
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.ops import RingCache, nearby_attention_step
from megatron_nuwa.ops.tables import Geometry


class CachedDecoder:
    """The decoder of a model, run one cell at a time over a fixed context."""

    def __init__(self, model: Nuwa, context: Context, grid: Grid) -> None:
        self._model = model
        own, across = model.decoder_geometries(grid, context)
        encoded = model.encode(context)
        self._batch = encoded.shape[0]
        self._positions = model.target_positions(grid)
        first: DecoderLayer = model.decoder[0]  # type: ignore[assignment]
        pattern = first.self_attention.pattern
        # A window needs its own frames only; other patterns need lists of cells, which all layers
        # share.
        lists = None if isinstance(pattern, Nearby) else pattern.keys_seen(own, encoded.device)
        self._layers = [
            _LayerCache(layer, encoded, own, lists, _Context(layer, encoded, across, context.mask))  # type: ignore[arg-type]
            for layer in model.decoder
        ]
        self._next = 0

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (batch, codebook size) of the next cell.

        `previous` int64 (batch,) is the token of the cell before it, None at the first cell.
        """
        n, model = self._next, self._model
        if (previous is None) != (n == 0):
            raise ValueError("previous must be None at the first cell and a token at every other")
        vector = (
            model.begin.vector.expand(self._batch, -1)
            if previous is None
            else model.visual_embedding(previous.unsqueeze(1)).squeeze(1)
        )
        x = (vector + self._positions[n]).unsqueeze(1)
        for layer in self._layers:
            x = layer.step(x, n)
        self._next += 1
        return model.predict(x).squeeze(1)


class _Past(Protocol):
    """Keys and values of the cells decoded so far."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add the next cell, and look back from it; all of (batch, 1, heads, head_dim)."""
        ...


class _ListedPast:
    """The whole past, of which each cell sees a list."""

    def __init__(self, keys: Tensor, lists: list[Tensor] | list[slice]) -> None:
        self._keys, self._values = torch.zeros_like(keys), torch.zeros_like(keys)
        self._lists = lists
        self._next = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n = self._next
        self._keys[:, n : n + 1], self._values[:, n : n + 1] = key, value
        seen = self._lists[n]
        self._next += 1
        keys, values = self._keys[:, seen].transpose(1, 2), self._values[:, seen].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values)
        return mixed.transpose(1, 2)


class _Context:
    """Keys and values of the encoder's output, for the cross-attention of one layer."""

    def __init__(
        self, layer: DecoderLayer, encoded: Tensor, geometry: Geometry, mask: Tensor | None
    ) -> None:
        attention = layer.cross_attention
        self._keys = attention.split_heads(attention.key(encoded))
        self._values = attention.split_heads(attention.value(encoded))
        # Cross-attention is nearby or full, never of lines.
        assert isinstance(attention.pattern, Nearby)
        self._geometry, self._mask = attention.pattern.window(geometry), mask

    def attend(self, query: Tensor, n: int) -> Tensor:
        """What cell `n` takes from the context."""
        return nearby_attention_step(
            query,
            self._keys,
            self._values,
            position=n,
            grid=self._geometry.grid,
            context_grid=self._geometry.context_grid,
            extent=self._geometry.extent,
            context_mask=self._mask,
        )


class _LayerCache:
    """All that one layer remembers."""

    def __init__(
        self,
        layer: DecoderLayer,
        encoded: Tensor,
        own: Geometry,
        lists: list[Tensor] | list[slice] | None,
        context: _Context,
    ) -> None:
        self._layer, self._context = layer, context
        attention = layer.self_attention
        batch, heads = encoded.shape[0], attention.heads
        size = encoded.shape[-1] // heads
        self._past: _Past
        if isinstance(attention.pattern, Nearby):
            self._past = RingCache(
                batch,
                heads,
                size,
                grid=own.grid,
                extent=attention.pattern.window(own).extent,
                dtype=encoded.dtype,
                device=encoded.device,
            )
        else:
            assert lists is not None
            self._past = _ListedPast(encoded.new_zeros(batch, own.grid.cells, heads, size), lists)

    def step(self, x: Tensor, n: int) -> Tensor:
        """(batch, 1, width) of cell `n` → the same after this layer."""
        attention, cross = self._layer.self_attention, self._layer.cross_attention

        def look_back(h: Tensor) -> Tensor:
            query, key, value = (_heads(attention, part, h) for part in ("query", "key", "value"))
            return attention.output(self._past.attend(query, key, value).flatten(2))

        def look_across(h: Tensor) -> Tensor:
            mixed = self._context.attend(_heads(cross, "query", h), n)
            return cross.output(mixed.flatten(2))

        return self._layer.combine(x, look_back, look_across)


def _heads(attention: Attention, projection: str, x: Tensor) -> Tensor:
    return attention.split_heads(getattr(attention, projection)(x))
