"""The tensor-parallel forms of the model's layers; every one is built from the whole layer.

Between split layers, tokens are whole on every process, or spread with sequence parallelism. A
`Region` brings them into split layers and the sums of those out again, once an attention or
feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.initialisation import Shard
from megatron_nuwa.models.layers import DecoderLayer, FeedForward
from megatron_nuwa.models.nuwa import VisualEmbedding
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.parallel.collectives import (
    TensorGroup,
    copy_all_to_group,
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    scatter_reduce_sequence,
    spread_sequence,
)


@dataclass(frozen=True)
class Region:
    """How tokens come into layers that are split, and out of them."""

    tensor: TensorGroup
    sequence_parallel: bool

    def enter(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """What lies here of (batch, tokens, width) → all `tokens`; None keeps padding."""
        if self.sequence_parallel:
            return gather_sequence(x, self.tensor, tokens)
        return copy_to_group(x, self.tensor)

    def leave(self, summand: Tensor, *biases: Tensor) -> Tensor:
        """The sum over the group and of the biases, as much of it as lies here."""
        if self.sequence_parallel:
            x = scatter_reduce_sequence(summand, self.tensor)
        else:
            x = reduce_from_group(summand, self.tensor)
        return x + sum(self.outside(*biases))

    def outside(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """Whole weights for use on the tokens that lie here."""
        return copy_all_to_group(weights, self.tensor) if self.sequence_parallel else weights

    def shard(self, whole: Tensor, dim: int) -> Shard:
        """The part of a weight that lies here."""
        return Shard(dim, self.tensor.rank, self.tensor.size, whole.shape[dim])


class SplitModule(nn.Module):
    """A module some of whose own weights are split; they stay marked when they are moved."""

    shards: dict[str, Shard]

    def take_over(self, whole: nn.Module, shards: Mapping[str, Shard]) -> None:
        """Become a module with the settings and weights of another one, or the parts of them."""
        nn.Module.__init__(self)
        for name, setting in vars(whole).items():
            if not name.startswith("_"):
                setattr(self, name, setting)
        self.shards = dict(shards)
        for name, parameter in whole._parameters.items():
            if parameter is not None and name in shards:
                # A copy, so that the whole one can be freed.
                part = shards[name].of(parameter.detach()).clone()
                parameter = nn.Parameter(part, parameter.requires_grad)
            self.register_parameter(name, parameter)
        self._mark()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # Leaving the meta device makes new parameters.
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _mark(self) -> None:
        for name, shard in self.shards.items():
            parameter: Any = self._parameters[name]
            parameter.shard, parameter.tensor_model_parallel = shard, True


class ColumnParallelLinear(SplitModule, nn.Linear):
    """Some of the outputs, for inputs that have entered the region."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        shard = region.shard(whole.weight, 0)
        self.take_over(whole, {"weight": shard, "bias": shard})
        self.out_features = shard.length


class RowParallelLinear(SplitModule, nn.Linear):
    """Some of the inputs: a summand of all outputs; its bias is added where the sum leaves."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        shard = region.shard(whole.weight, 1)
        self.take_over(whole, {"weight": shard})
        self.in_features = shard.length

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs/size) → (…, outputs), to be summed over the group."""
        return F.linear(x, self.weight)


class TensorParallelAttention(Attention):
    """Some of the heads."""

    def __init__(self, whole: Attention, region: Region) -> None:
        nn.Module.__init__(self)
        self.region, self.pattern = region, whole.pattern
        self.heads = whole.heads // region.tensor.size
        self.query = ColumnParallelLinear(whole.query, region)
        self.key = ColumnParallelLinear(whole.key, region)
        self.value = ColumnParallelLinear(whole.value, region)
        self.output = RowParallelLinear(whole.output, region)

    def forward(
        self, x: Tensor, context: Tensor, geometry: Geometry, context_mask: Tensor | None = None
    ) -> Tensor:
        """What lies here of (batch, tokens, width) each → like `x`."""
        inputs = self.region.enter(x, geometry.grid.cells)
        seen = inputs if context is x else self.region.enter(context, geometry.context_grid.cells)
        return self.region.leave(
            self.summand(inputs, seen, geometry, context_mask), self.output.bias
        )

    def summand(
        self, inputs: Tensor, seen: Tensor, geometry: Geometry, context_mask: Tensor | None = None
    ) -> Tensor:
        """The part that some heads have in the output; all arguments inside the region."""
        return super().forward(inputs, seen, geometry, context_mask)


class TensorParallelFeedForward(FeedForward):
    """Some of the inner width."""

    def __init__(self, whole: FeedForward, region: Region) -> None:
        nn.Module.__init__(self)
        self.region = region
        self.expand = ColumnParallelLinear(whole.expand, region)
        self.contract = RowParallelLinear(whole.contract, region)

    def forward(self, x: Tensor) -> Tensor:
        """What lies here of (batch, tokens, width) → the same."""
        return self.region.leave(super().forward(self.region.enter(x)), self.contract.bias)


class TensorParallelDecoderLayer(DecoderLayer):
    """Parallel self- and cross-attention enter and leave the region together."""

    self_attention: TensorParallelAttention
    cross_attention: TensorParallelAttention

    def __init__(self, whole: DecoderLayer, region: Region) -> None:
        nn.Module.__init__(self)
        self.region, self.norm_position = region, whole.norm_position
        self.attention_norm = whole.attention_norm
        self.self_attention = TensorParallelAttention(whole.self_attention, region)
        self.cross_attention = TensorParallelAttention(whole.cross_attention, region)
        self.cross_norm = whole.cross_norm
        self.feed_forward_norm = whole.feed_forward_norm
        self.feed_forward, self.dropout = whole.feed_forward, whole.dropout

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        geometry: Geometry,
        cross_geometry: Geometry,
        context_mask: Tensor | None,
    ) -> Tensor:
        """What lies here of `x` (batch, tokens, width) and `context` → like `x`."""
        across, back, region = self.cross_attention, self.self_attention, self.region

        def look_back(h: Tensor) -> Tensor:
            return back(h, h, geometry)

        def look_across(h: Tensor) -> Tensor:
            return across(h, context, cross_geometry, context_mask)

        def look_both(h: Tensor) -> Tensor:
            inputs = region.enter(h, geometry.grid.cells)
            seen = region.enter(context, cross_geometry.context_grid.cells)
            summand = back.summand(inputs, inputs, geometry)
            summand = summand + across.summand(inputs, seen, cross_geometry, context_mask)
            return region.leave(summand, back.output.bias, across.output.bias)

        return self.combine(x, look_back, look_across, look_both)


class VocabularyParallelEmbedding(SplitModule, nn.Embedding):
    """The vectors of some tokens; looked up where they are, and summed over the group."""

    def __init__(self, whole: nn.Embedding, region: Region) -> None:
        shard = region.shard(whole.weight, 0)
        self.take_over(whole, {"weight": shard})
        self.num_embeddings = shard.length
        self.tensor = region.tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (…) → (…, width), the same on every process."""
        local = tokens - self.tensor.rank * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_group(vectors.masked_fill(elsewhere.unsqueeze(-1), 0), self.tensor)


class VocabularyParallelHead(SplitModule, nn.Linear):
    """The logits of some tokens; −∞ where the vocabulary is padded."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        shard = region.shard(whole.weight, 0)
        self.take_over(whole, {"weight": shard})
        self.out_features = shard.length
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """What lies here of (batch, tokens, width) → (batch, tokens, vocabulary/size)."""
        return _logits(self.region.enter(x), self.weight, self.shards["weight"])


class TensorParallelVisualEmbedding(VisualEmbedding):
    """The codes' table is split by code; the projection is whole."""

    codes: VocabularyParallelEmbedding

    def __init__(self, whole: VisualEmbedding, region: Region) -> None:
        nn.Module.__init__(self)
        self.region = region
        self.codes = VocabularyParallelEmbedding(whole.codes, region)
        self.projection = whole.projection

    def logits(self, x: Tensor) -> Tensor:
        """What lies here of (batch, tokens, width) → (batch, tokens, vocabulary/size)."""
        vectors = self.codes.weight
        if isinstance(self.projection, nn.Linear):
            # Each process projects its own codes only: the gradients are summands.
            projection = copy_to_group(self.projection.weight, self.region.tensor)
            vectors = F.linear(vectors, projection)
        return _logits(self.region.enter(x), vectors, self.codes.shards["weight"])


class SequenceParallelNorm(SplitModule, nn.LayerNorm):
    """A norm of the tokens that lie here."""

    def __init__(self, whole: nn.LayerNorm, region: Region) -> None:
        self.take_over(whole, {})
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ⌈tokens/size⌉, width) → the same."""
        weight, bias = self.region.outside(self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SpreadTokens(nn.Identity):
    """Where sequence parallelism begins."""

    def __init__(self, tensor: TensorGroup) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → (batch, ⌈tokens/size⌉, width)."""
        return spread_sequence(x, self.tensor)


def _logits(x: Tensor, vectors: Tensor, shard: Shard) -> Tensor:
    first = min(max(shard.full - shard.index * shard.length, 0), shard.length)
    if first == shard.length:
        return F.linear(x, vectors)
    padding = vectors.new_zeros(shard.length)
    padding[first:] = -torch.inf
    return F.linear(x, vectors, padding)
