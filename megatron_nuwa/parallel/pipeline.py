"""The model as a DeepSpeed pipeline: each process holds the units of one stage."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_nuwa.parallel.groups import Place, import_deepspeed
from megatron_nuwa.parallel.units import Flow, Units

import_deepspeed()
from deepspeed.pipe import PipelineModule, TiedLayerSpec  # noqa: E402

# Computes a scalar from logits and what a micro-batch's labels hold.
LossFunction = Callable[[Tensor, Sequence[Tensor]], Tensor]


class NuwaPipeline(PipelineModule):
    """One stage of the model.

    `bounds` are `parallel.cut.cut`'s. Layer 0 of the pipeline is the visual embedding by itself,
    so that a tied head can share it from another stage; layer n + 1 holds the rest of unit n.
    """

    def __init__(
        self, units: Units, bounds: Sequence[int], place: Place, loss: LossFunction
    ) -> None:
        self._bounds = list(bounds)
        self._start, self._stop = bounds[place.stage], bounds[place.stage + 1]
        # Not a module of this one: it holds the units of all stages, most of them without weights.
        self._units = (units,)
        # DeepSpeed prints its seeds and its own cut.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=_layers(units),
                topology=place.topology,
                loss_fn=loss,
                dynamic_shape=True,
            )

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """What the stage before packed, or a micro-batch → packed for the next, or the logits."""
        (units,) = self._units
        flow = units.run(Flow.unpack(tensors), self._start, self._stop)
        if self._stop == len(units):
            return flow.x
        packed = flow.pack()
        if torch.is_grad_enabled():
            # What frozen weights computed: the next stage sends a gradient for it all the same.
            for tensor in packed:
                if tensor.is_floating_point() and not tensor.requires_grad:
                    tensor.requires_grad_()
        return packed

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # Else autograd would record the broadcast as the weights' origin.
        super()._synchronize_tied_weights()

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [0, *(bound + 1 for bound in self._bounds[1:-1]), self._num_layers]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


def own_modules(units: Units, bounds: Sequence[int], stage: int) -> list[nn.Module]:
    """The modules whose weights a stage holds; a tied head's table lies on two stages."""
    start, stop = bounds[stage], bounds[stage + 1]
    modules = [module for unit in range(start, stop) for module in units.modules(unit)]
    model = units.model
    if model.head is None and start > 0 and stop == len(units):
        modules.append(model.visual_embedding)
    return modules


def weight_names(units: Units) -> dict[str, str]:
    """The model's name of every weight, by the name that `NuwaPipeline` and its checkpoints use."""
    names = {id(parameter): name for name, parameter in units.model.named_parameters()}
    found = {}
    for number, layer in enumerate(_layers(units)):
        tied = isinstance(layer, _TiedTable)
        module, prefix = (layer.table, f"tied_modules.{layer.key}") if tied else (layer, number)
        for name, parameter in module.named_parameters():
            found[f"{prefix}.{name}"] = names[id(parameter)]
    return found


class _TiedTable(TiedLayerSpec):
    """The visual embedding, wherever it is needed."""

    def __init__(self, table: nn.Module, **settings: Any) -> None:
        names = [name for name, _ in table.named_parameters()]
        super().__init__("visual_embedding", nn.Module, tied_weight_attr=names, **settings)
        self.table = table

    def build(self, log: bool = False) -> nn.Module:
        return self.table


def _layers(units: Units) -> list[Any]:
    first, *others = (units.modules(unit) for unit in range(len(units)))
    table, *rest = first
    layers = [nn.ModuleList(modules) for modules in (rest, *others)]
    if units.model.head is not None:
        return [table, *layers]
    # The first of a tie must have no forward function, or checkpoints leave its weights out.
    shared = _TiedTable(table, forward_fn=lambda module, x: x)
    return [_TiedTable(table), *layers[:-1], layers[-1], shared]
