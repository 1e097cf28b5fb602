"""The model as a DeepSpeed pipeline: each process holds the units of one stage."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nuwa.parallel.groups import Place, import_deepspeed
from megatron_nuwa.parallel.units import NOTES, Flow, Units

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
        # Of the micro-batches to come, each run once, in their order.
        self.notes: Iterator[Sequence[int]] = iter(())
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
        flow = units.run(Flow.unpack(tensors, next(self.notes)), self._start, self._stop)
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


class Traffic:
    """What DeepSpeed's engine of a stage hands to the next: it is known before it comes.

    By itself DeepSpeed sends a message's shapes before it, and the receiver reads them off the
    device number by number: each time its CPU waits for all that the GPU has to do, and then the
    GPU for the CPU. Here the stages are told once a step, when they wait for each other anyway,
    what its micro-batches are, and DeepSpeed's way is gone where a shape comes for the first time.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._tell_shapes, self._hear_shapes = engine._send_tensor_meta, engine._recv_tensor_meta
        self._told: set[tuple[int, ...]] = set()
        self._heard: dict[tuple[int, ...], list[tuple[torch.Size, torch.dtype]]] = {}
        self._sent: Iterator[Sequence[int]] = iter(())
        self._received: Iterator[Sequence[int]] = iter(())
        engine._send_tensor_meta, engine._recv_tensor_meta = self._before_sending, self._buffers
        # DeepSpeed reuses receive buffers whatever their type was.
        engine._allocate_or_extend_buffers = self._new_buffer

    def announce(self, flows: Sequence[Flow], count: int) -> None:
        """Tell all stages of `count` micro-batches to come; the first stage's `flows` are them.

        Every process calls it, before DeepSpeed's schedule begins.
        """
        grid = self._engine.grid
        if self._engine.is_first_stage():
            notes = [flow.notes for flow in flows]
            told = torch.tensor(notes, dtype=torch.int64, device=self._device)
        else:
            told = torch.empty(count, NOTES, dtype=torch.int64, device=self._device)
        dist.broadcast(told, grid.stage_to_global(0), group=grid.get_pipe_parallel_group())
        notes = told.tolist()
        self._engine.module.notes, self._sent, self._received = (
            iter(notes),
            iter(notes),
            iter(notes),
        )

    def _before_sending(self, message: tuple[Tensor, ...], stage: int) -> None:
        shape = _shape(next(self._sent))
        if shape not in self._told:
            self._told.add(shape)
            self._tell_shapes(message, stage)

    def _buffers(self, stage: int) -> tuple[Tensor, ...]:
        shape = _shape(next(self._received))
        if shape not in self._heard:
            buffers = self._hear_shapes(stage)
            self._heard[shape] = [(buffer.shape, buffer.dtype) for buffer in buffers]
            return buffers
        return tuple(self._new_buffer(0, *heard) for heard in self._heard[shape])

    def _new_buffer(self, _index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)


def _shape(notes: Sequence[int]) -> tuple[int, ...]:
    """All of a flow's notes but the seed."""
    *before, _, has_mask, samples = notes
    return (*before, has_mask, samples)


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
