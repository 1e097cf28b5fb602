"""The model as a row of units: what a process runs of it, whole or one stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.models.nuwa import Context, ContextKind, Nuwa

Recomputation = Literal["none", "selective", "layer"]

# Selective recomputation keeps what is dear to compute: matrix products and attention.
_KEPT_PREFIXES = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::linear",
    "aten::_scaled_dot_product",
    "megatron_nuwa::nearby_attention",
)
_KINDS: tuple[ContextKind, ...] = get_args(ContextKind)
# Integers that a flow's notes are.
NOTES = 10
# Odd and far apart, so that no two of (micro-batch, unit, stream) come to the same seed.
_UNIT_STRIDE = 0x9E3779B97F4A7C15
_STREAM_STRIDE = 0xD1B54A32D192ED03
# Compiled forms of a layer that are kept, one a shape.
_SHAPES = 64


@dataclass(frozen=True)
class Flow:
    """What travels from unit to unit for one micro-batch.

    `context` and `x` are int64 tokens (batch, cells) before the unit "embedding" and vectors
    (batch, cells, width) after it; after the last decoder layer no context is left, and after the
    unit "head" `x` is the logits. `seed` names the micro-batch to dropout.
    """

    context: Tensor | None
    x: Tensor
    mask: Tensor | None
    kind: ContextKind
    context_grid: Grid
    grid: Grid
    seed: int = 0

    @staticmethod
    def of(context: Context, target: Tensor, grid: Grid, seed: int = 0) -> Flow:
        """The start of a micro-batch."""
        return Flow(context.tokens, target, context.mask, context.kind, context.grid, grid, seed)

    @property
    def notes(self) -> list[int]:
        """`NOTES` integers: all that does not lie in the tensors, and how many samples there are.

        With them the shapes of what travels between two given units are known.
        """
        kind, has_mask = _KINDS.index(self.kind), self.mask is not None
        return [kind, *self.context_grid, *self.grid, self.seed, has_mask, len(self.x)]

    def pack(self) -> tuple[Tensor, ...]:
        """As tensors that a process can send: vectors first, then the mask."""
        optional = (self.context, self.x, self.mask)
        return tuple(tensor for tensor in optional if tensor is not None)

    @staticmethod
    def unpack(tensors: Sequence[Tensor], notes: Sequence[int]) -> Flow:
        """What `pack` packed, with the `notes` of the same micro-batch."""
        kind, ch, cw, cs, h, w, s, seed, has_mask, _ = notes
        rest = list(tensors)
        mask = rest.pop() if has_mask else None
        x = rest.pop()
        context = rest.pop() if rest else None
        return Flow(context, x, mask, _KINDS[kind], Grid(ch, cw, cs), Grid(h, w, s), seed)

    def as_context(self) -> Context:
        """The encoder's input; its tokens are vectors after the unit "embedding"."""
        assert self.context is not None
        return Context(self.kind, self.context, self.context_grid, self.mask)


class Units:
    """Units of a model, run one after the other.

    Dropout of a unit depends on the micro-batch's seed, the unit and `stream` alone: neither the
    pipeline's cut nor recomputation changes it. `stream` tells processes apart that hold different
    tokens of one sample.

    With `compiled` the layers go through `torch.compile` wherever gradients are wanted, once for
    each kind of layer and shape of input, whatever the number of layers. Dropout then draws other
    numbers than without.
    """

    def __init__(
        self,
        model: Nuwa,
        recompute: Recomputation = "none",
        stream: int = 0,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.names = unit_names(model.config)
        self._recompute, self._stream = recompute, stream
        self._compiled = _compiled_apply() if compiled else None

    def __len__(self) -> int:
        return len(self.names)

    def modules(self, unit: int) -> list[nn.Module]:
        """The modules whose weights a unit uses; tables that several units share are not among
        the head's."""
        model, (kind, _, number) = self.model, self.names[unit].partition(".")
        if kind == "embedding":
            modules = [
                model.visual_embedding,
                model.text_embedding,
                model.text_positions,
                model.context_positions,
                model.target_positions,
                model.begin,
            ]
            return modules + ([] if model.sketch_embedding is None else [model.sketch_embedding])
        if kind == "encoder_norm":
            return [model.encoder_norm]
        if kind == "head":
            return [model.decoder_norm] + ([] if model.head is None else [model.head])
        return [(model.encoder if kind == "encoder" else model.decoder)[int(number)]]

    def run(self, flow: Flow, start: int = 0, stop: int | None = None) -> Flow:
        """The flow after the units `start` … `stop - 1`."""
        for unit in range(start, len(self) if stop is None else stop):
            flow = self._run(unit, flow)
        return flow

    def _run(self, unit: int, flow: Flow) -> Flow:
        model, (kind, _, number) = self.model, self.names[unit].partition(".")
        if kind == "embedding":
            self._seed(unit, flow)
            context = model.embed_context(flow.as_context())
            return replace(flow, context=context, x=model.embed_target(flow.x, flow.grid))
        if kind == "encoder":
            geometry = model.encoder_geometry(flow.as_context())
            layer = model.encoder[int(number)]
            context = self._call(unit, flow, layer, flow.context, geometry, flow.mask)
            return replace(flow, context=context)
        if kind == "encoder_norm":
            assert flow.context is not None
            return replace(flow, context=model.encoder_norm(flow.context))
        if kind == "decoder":
            geometries = model.decoder_geometries(flow.grid, flow.as_context())
            layer = model.decoder[int(number)]
            x = self._call(unit, flow, layer, flow.x, flow.context, *geometries, flow.mask)
            is_last = int(number) == len(model.decoder) - 1
            return replace(flow, x=x, context=None if is_last else flow.context)
        return replace(flow, x=model.predict(flow.x))

    def _seed(self, unit: int, flow: Flow) -> None:
        if self.model.training and self.model.config.dropout:
            seed = flow.seed + (unit + 1) * _UNIT_STRIDE + self._stream * _STREAM_STRIDE
            torch.manual_seed(seed % (1 << 63))

    def _call(self, unit: int, flow: Flow, layer: nn.Module, *arguments: object) -> Tensor:
        if self._compiled is not None and torch.is_grad_enabled():
            # What is run a second time keeps the random numbers that the compiled code has drawn.
            self._seed(unit, flow)
            return self._compiled(layer, self._recompute, *arguments)

        def seeded(*arguments: object) -> Tensor:
            self._seed(unit, flow)
            return layer(*arguments)

        return _apply(seeded, self._recompute, *arguments)


def _apply(layer: Callable[..., Tensor], recompute: Recomputation, *arguments: object) -> Tensor:
    """Call a layer so that its backward pass computes again what was not worth keeping."""
    if recompute == "none" or not torch.is_grad_enabled():
        return layer(*arguments)
    # A layer seeds itself, so no random state needs to be kept for its second run.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, *arguments, **settings)


def _compiled_apply() -> Callable[..., Tensor]:
    # Two kinds of layers, each for the micro-batches of several tasks: more than PyTorch expects
    # of one function, which it would then run as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    return torch.compile(_apply, dynamic=False)


def _policy(
    _context: object, operator: torch._ops.OpOverload, *_arguments: object, **_settings: object
) -> CheckpointPolicy:
    name = operator.name() if hasattr(operator, "name") else ""
    kept = name.startswith(_KEPT_PREFIXES)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
