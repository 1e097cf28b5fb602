"""The blocks of NÜWA's transformer: feed-forward, encoder and decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.attention import Attention, Full, Nearby, Pattern
from megatron_nuwa.ops.tables import Geometry

NormPosition = Literal["pre", "post"]
CrossAttention = Literal["parallel", "sequential"]


def cross_pattern(pattern: Pattern) -> Pattern:
    """The pattern of cross-attention in a decoder whose self-attention has this one."""
    return pattern if isinstance(pattern, Full) else Nearby()


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, inner_width)
        self.contract = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → the same."""
        return self.contract(F.gelu(self.expand(x)))


class EncoderLayer(nn.Module):
    """`C ← C + 3DNA(C, C)`, then a feed-forward (paper Eq. 10); `pattern` may replace 3DNA."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner_width: int,
        dropout: float,
        norm: NormPosition,
        pattern: Pattern,
    ) -> None:
        super().__init__()
        self.norm_position = norm
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, pattern)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, inner_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, geometry: Geometry, mask: Tensor | None) -> Tensor:
        """(batch, tokens, width) → the same."""
        if self.norm_position == "pre":
            h = self.attention_norm(x)
            x = x + self.dropout(self.attention(h, h, geometry, mask))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, x, geometry, mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """`Y ← Y + 3DNA(Y, Y)[causal] + 3DNA(Y, C)`, then a feed-forward (paper Eq. 11).

    `cross="parallel"` adds both attentions at once, as the paper's formula reads;
    `"sequential"` is the classic decoder, cross-attention after self-attention.

    `pattern` is self-attention's. Cross-attention is full where self-attention is, and nearby
    otherwise: blocks and lines are defined inside one grid, and the context has another.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner_width: int,
        dropout: float,
        norm: NormPosition,
        cross: CrossAttention,
        pattern: Pattern,
    ) -> None:
        super().__init__()
        self.norm_position = norm
        self.attention_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, pattern)
        self.cross_attention = Attention(width, heads, cross_pattern(pattern))
        self.cross_norm = nn.LayerNorm(width) if cross == "sequential" else None
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, inner_width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        geometry: Geometry,
        cross_geometry: Geometry,
        context_mask: Tensor | None,
    ) -> Tensor:
        """`x` (batch, tokens, width), `context` (batch, context tokens, width) → like `x`."""

        def look_back(h: Tensor) -> Tensor:
            return self.self_attention(h, h, geometry)

        def look_across(h: Tensor) -> Tensor:
            return self.cross_attention(h, context, cross_geometry, context_mask)

        return self.combine(x, look_back, look_across)

    def combine(
        self,
        x: Tensor,
        look_back: Callable[[Tensor], Tensor],
        look_across: Callable[[Tensor], Tensor],
        look_both: Callable[[Tensor], Tensor] | None = None,
        feed_forward: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Norms and residuals around two attentions, each a function of a normalised input.

        Training attends over the whole grid and decoding over a cache; both come through here.
        `look_both` is the sum of the two, where it is cheaper at once; `feed_forward` stands in
        for the layer's own.
        """
        feed_forward = feed_forward or self.feed_forward
        look_both = look_both or (lambda h: look_back(h) + look_across(h))
        if self.norm_position == "pre":
            h = self.attention_norm(x)
            if self.cross_norm is None:
                x = x + self.dropout(look_both(h))
            else:
                x = x + self.dropout(look_back(h))
                x = x + self.dropout(look_across(self.cross_norm(x)))
            return x + self.dropout(feed_forward(self.feed_forward_norm(x)))
        if self.cross_norm is None:
            x = self.attention_norm(x + self.dropout(look_both(x)))
        else:
            x = self.attention_norm(x + self.dropout(look_back(x)))
            x = self.cross_norm(x + self.dropout(look_across(x)))
        return self.feed_forward_norm(x + self.dropout(feed_forward(x)))
