"""What autograd keeps of one layer, measured and not guessed.

A real encoder or decoder layer of the recipe's width and grids runs on fake tensors, which have
shapes and no memory, while PyTorch's own hooks note every tensor that is saved for the backward
pass. Tensors that share memory count once, weights not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.attention import Attention
from megatron_nuwa.models.layers import DecoderLayer, EncoderLayer, FeedForward
from megatron_nuwa.models.nuwa import ContextKind, NuwaConfig
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.parallel.units import Recomputation

LayerKind = Literal["encoder", "decoder"]
# Operators whose outputs selective recomputation keeps.
_COSTLY = ("mm.", "bmm.", "scaled_dot_product", "nearby_attention")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one sample in one layer, its input included and the encoder's output left out.

    `saved`: all that autograd keeps. `outputs`: those of matrix products and attention.
    `inputs`: the layer's own input. `gradients`: what the feed-forward's backward pass holds at
    once, the widest of the layer.
    """

    saved: int
    outputs: int
    inputs: int
    gradients: int

    def kept(self, recomputation: Recomputation) -> int:
        """What stays until the backward pass."""
        kept = {"none": self.saved, "selective": self.inputs + self.outputs, "layer": self.inputs}
        return min(kept[recomputation], self.saved)

    def working(self, recomputation: Recomputation) -> int:
        """What one layer's backward pass adds: what it recomputes, and gradients."""
        return self.saved - self.kept(recomputation) + self.gradients


@lru_cache(maxsize=1024)
def layer_bytes(
    config: NuwaConfig,
    kind: LayerKind,
    read: tuple[ContextKind, Grid],
    grid: Grid,
    dtype: torch.dtype,
    tensor: int = 1,
) -> LayerBytes:
    """Bytes of one sample of a target `grid`, in one process of `tensor` that share the layer.

    `read` is kind and grid of what the encoder reads.
    """
    own, across, seen = _geometries(config, read, grid)
    _warm_tables(config, kind, own, seen)
    # The tables are real tensors: a fake one in their cache would break every later use.
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        layer = _layer(config, kind)
        _take_share(layer, tensor)
        context_kind, context_grid = read
        cells = grid.cells if kind == "decoder" else context_grid.cells
        x = torch.empty(1, cells, config.width, requires_grad=True)
        context = torch.empty(1, context_grid.cells, config.width, requires_grad=True)
        # Only texts have padding.
        is_text = context_kind == "text"
        mask = torch.ones(1, context_grid.cells, dtype=torch.bool) if is_text else None
        arguments = (x, context, own, across, mask) if kind == "decoder" else (x, seen, mask)
        counter, outputs = _Outputs(), _Storages()
        with counter, saved_tensors_hooks(outputs.note, lambda saved: saved):
            layer(*arguments)
        inputs = (context, mask) if mask is not None else (context,)
        elsewhere = {_key(t) for t in (*layer.parameters(), *inputs)}
        inner = int(config.width * config.feed_forward_ratio) // tensor
        return LayerBytes(
            outputs.total(elsewhere),
            counter.storages.total(elsewhere),
            x.untyped_storage().nbytes(),
            2 * cells * (inner + config.width) * x.element_size(),
        )


def _warm_tables(config: NuwaConfig, kind: LayerKind, own: Geometry, seen: Geometry) -> None:
    """Have the patterns build what they cache before anything is fake."""
    if kind == "decoder":
        config.decoder_pattern.pairs(own)
    else:
        config.encoder_pattern.pairs(seen)


class _Storages:
    """Distinct pieces of memory behind tensors."""

    def __init__(self) -> None:
        # The tensors are kept, so that no address is used twice.
        self._seen: dict[int, Tensor] = {}

    def note(self, tensor: Tensor) -> Tensor:
        self._seen.setdefault(_key(tensor), tensor)
        return tensor

    def total(self, without: set[int]) -> int:
        return sum(
            tensor.untyped_storage().nbytes()
            for key, tensor in self._seen.items()
            if key not in without
        )


class _Outputs(TorchDispatchMode):
    """Notes what the costly operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = _Storages()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in _COSTLY):
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Tensor):
                    self.storages.note(part)
        return result


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _layer(config: NuwaConfig, kind: LayerKind) -> nn.Module:
    width, inner = config.width, int(config.width * config.feed_forward_ratio)
    sizes = (width, config.heads, inner, config.dropout, config.norm)
    if kind == "encoder":
        return EncoderLayer(*sizes, config.encoder_pattern)
    return DecoderLayer(*sizes, config.cross_attention, config.decoder_pattern)


def _take_share(layer: nn.Module, tensor: int) -> None:
    """Give the layer the shapes that one of `tensor` processes has: fewer heads and inner units."""
    if tensor == 1:
        return
    for module in list(layer.modules()):
        if isinstance(module, Attention):
            module.heads //= tensor
            width = module.query.in_features
            for name in ("query", "key", "value"):
                setattr(module, name, nn.Linear(width, width // tensor))
            module.output = nn.Linear(width // tensor, width)
        elif isinstance(module, FeedForward):
            width, inner = module.expand.in_features, module.expand.out_features // tensor
            module.expand, module.contract = nn.Linear(width, inner), nn.Linear(inner, width)


def _geometries(
    config: NuwaConfig, read: tuple[ContextKind, Grid], grid: Grid
) -> tuple[Geometry, Geometry, Geometry]:
    extent, context_grid = config.context_extent(*read), read[1]
    return (
        Geometry(grid, grid, config.visual_extent(grid), True),
        Geometry(grid, context_grid, extent, False),
        Geometry(context_grid, context_grid, extent, False),
    )
