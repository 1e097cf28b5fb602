"""Collectives of a tensor-parallel group that autograd can differentiate.

Each pairs a collective of the forward pass with its transpose in the backward pass (Megatron-LM,
Shoeybi et al. 2019; the ones along tokens, Korthikanti et al. 2022). Every process of a group calls
them in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch renames them, and warns about the old names from 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class TensorGroup:
    """The processes that share one copy of the model's matrices; `rank` is the own place in it.

    `group` None stands for a process alone, with `size` 1.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int


def all_reduced(
    x: Tensor, tensor: TensorGroup, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """The sum, or another reduction, of every process's `x`; `x` is left as it is."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=operation, group=tensor.group)
    return total


def all_gathered(part: Tensor, tensor: TensorGroup) -> Tensor:
    """The parts of all processes, stacked along a new first dimension."""
    parts = part.new_empty(tensor.size, *part.shape)
    # NCCL and gloo both agree on the flat layout only.
    _all_gather(parts.view(-1), part.contiguous().view(-1), group=tensor.group)
    return parts


def copy_to_group(x: Tensor, tensor: TensorGroup) -> Tensor:
    """`x` itself; its gradient is summed over the group."""
    return _CopyToGroup.apply(tensor, x)[0]


def copy_all_to_group(tensors: tuple[Tensor, ...], tensor: TensorGroup) -> tuple[Tensor, ...]:
    """Like `copy_to_group` for many tensors of one dtype, in one collective."""
    return _CopyToGroup.apply(tensor, *tensors)


def reduce_from_group(x: Tensor, tensor: TensorGroup) -> Tensor:
    """The sum over the group; every process's part has the sum's gradient."""
    return _ReduceFromGroup.apply(tensor, x)


def spread_sequence(x: Tensor, tensor: TensorGroup) -> Tensor:
    """(batch, tokens, width) that all processes have → the own ⌈tokens/size⌉ of them.

    Parts are equally long: behind the last token stand zeros.
    """
    return _SpreadSequence.apply(tensor, x)


def gather_sequence(part: Tensor, tensor: TensorGroup, tokens: int | None = None) -> Tensor:
    """(batch, part, width) → the tokens of the whole group; gradients are summed.

    Of the size·part tokens the first `tokens` are kept: what lies behind them is padding.
    """
    return _GatherSequence.apply(tensor, part, tokens)


def scatter_reduce_sequence(x: Tensor, tensor: TensorGroup) -> Tensor:
    """The own ⌈tokens/size⌉ tokens of the sum over the group of (batch, tokens, width)."""
    return _ScatterReduceSequence.apply(tensor, x)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tensor = tensor
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if len(gradients) == 1:
            return None, all_reduced(gradients[0], ctx.tensor)
        packed = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(packed, group=ctx.tensor.group)
        parts = packed.split([gradient.numel() for gradient in gradients])
        return None, *(
            part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)
        )


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, x: Tensor) -> Tensor:
        return all_reduced(x, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, gradient


class _SpreadSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, x: Tensor) -> Tensor:
        ctx.tensor, ctx.tokens = tensor, x.shape[1]
        return _parts(x, tensor)[:, tensor.rank].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, _join(gradient, ctx.tensor, ctx.tokens)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, part: Tensor, tokens: int | None) -> Tensor:
        ctx.tensor, ctx.part = tensor, part.shape[1]
        return _join(part, tensor, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        missing = ctx.part * ctx.tensor.size - gradient.shape[1]
        return None, _reduced_part(F.pad(gradient, (0, 0, 0, missing)), ctx.tensor), None


class _ScatterReduceSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorGroup, x: Tensor) -> Tensor:
        ctx.tensor, ctx.tokens = tensor, x.shape[1]
        return _reduced_part(x, tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, _join(gradient, ctx.tensor, ctx.tokens)


def _parts(x: Tensor, tensor: TensorGroup) -> Tensor:
    """(batch, tokens, width) → (batch, size, ⌈tokens/size⌉, width), zeros behind the last."""
    missing = -x.shape[1] % tensor.size
    return F.pad(x, (0, 0, 0, missing)).unflatten(1, (tensor.size, -1))


def _join(part: Tensor, tensor: TensorGroup, tokens: int | None) -> Tensor:
    whole = all_gathered(part, tensor).transpose(0, 1).flatten(1, 2)
    return whole if tokens is None or tokens == whole.shape[1] else whole[:, :tokens].contiguous()


def _reduced_part(x: Tensor, tensor: TensorGroup) -> Tensor:
    parts = _parts(x, tensor).transpose(0, 1).contiguous()
    own = torch.empty_like(parts[0])
    _reduce_scatter(own.view(-1), parts.view(-1), group=tensor.group)
    return own
