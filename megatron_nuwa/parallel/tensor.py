"""Tensor parallelism: the model's matrices split over a group of processes.

Attention is split by head, feed-forwards by inner width, tables and head by vocabulary. Sequence
parallelism also spreads the tokens between those, where norms, dropout and residuals work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.initialisation import Shard, shard_of
from megatron_nuwa.models.layers import DecoderLayer, FeedForward
from megatron_nuwa.models.nuwa import Nuwa, VisualEmbedding
from megatron_nuwa.parallel.collectives import TensorGroup, all_gathered
from megatron_nuwa.parallel.cross_entropy import VocabularyParallelCrossEntropy
from megatron_nuwa.parallel.tensor_layers import (
    Region,
    SequenceParallelNorm,
    SpreadTokens,
    TensorParallelAttention,
    TensorParallelDecoderLayer,
    TensorParallelFeedForward,
    TensorParallelVisualEmbedding,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
)

_Form = Callable[[Any, Region], nn.Module]
_FORMS: dict[type[nn.Module], _Form] = {
    Attention: TensorParallelAttention,
    FeedForward: TensorParallelFeedForward,
    DecoderLayer: TensorParallelDecoderLayer,
    VisualEmbedding: TensorParallelVisualEmbedding,
    nn.Embedding: VocabularyParallelEmbedding,
}


def split_model(model: Nuwa, tensor: TensorGroup, sequence_parallel: bool = False) -> None:
    """Swap tensor-parallel layers in, in place; names of weights stay as they are.

    Works on a model on the meta device and on one with weights, which are then sliced. A split
    weight carries `shard`, and `tensor_model_parallel`, which DeepSpeed's gradient norm asks for.
    The model's logits become the own part of the vocabulary; its loss stays the whole one.

    With sequence parallelism all that lies between the embedding and the head has
    ⌈tokens/size⌉ tokens, the last ones padding.

    Raises `ValueError` if heads or the feed-forward's width are no multiple of the group's size.
    """
    if tensor.size == 1:
        return
    _check(model, tensor.size)
    region = Region(tensor, sequence_parallel)
    _swap(model, _FORMS, region)
    if model.head is not None:
        model.head = VocabularyParallelHead(model.head, region)
    model.cross_entropy = VocabularyParallelCrossEntropy(tensor)
    if sequence_parallel:
        _swap(model, {nn.LayerNorm: SequenceParallelNorm}, region)
        model.embedding_output = SpreadTokens(tensor)
    model.train(model.training)


def whole_weight(parameter: Tensor, tensor: TensorGroup) -> Tensor:
    """A weight as the whole model has it; every process of the group calls it."""
    return joined(parameter.detach(), shard_of(parameter), tensor)


def joined(part: Tensor, shard: Shard | None, tensor: TensorGroup) -> Tensor:
    """What belongs to a weight, such as its gradient, joined as the weight is split."""
    if shard is None:
        return part
    parts = all_gathered(part, tensor)
    return torch.cat([*parts], shard.dim).narrow(shard.dim, 0, shard.full)


def _check(model: Nuwa, size: int) -> None:
    config = model.config
    inner = int(config.width * config.feed_forward_ratio)
    for name, number in (("heads", config.heads), ("feed-forward width", inner)):
        if number % size:
            raise ValueError(f"the model's {name} {number} is not a multiple of tensor {size}")


def _swap(module: nn.Module, forms: Mapping[type[nn.Module], _Form], region: Region) -> None:
    for name, child in [*module.named_children()]:
        # The exact type: what is split already is a subclass.
        form = forms.get(type(child))
        split = child if form is None else form(child, region)
        setattr(module, name, split)
        _swap(split, forms, region)
