"""DeepSpeed engines of a pretraining run: one that runs the whole model, one that runs a stage."""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_nuwa.data.batches import TaskName, TokenBatch
from megatron_nuwa.models.initialisation import shard_of, whole_shape
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.parallel.groups import Place, import_deepspeed
from megatron_nuwa.parallel.tensor import split_model, whole_weight
from megatron_nuwa.parallel.units import Flow, Units
from megatron_nuwa.training.bf16_optimizer import streamline
from megatron_nuwa.training.fused import fuse_norms, make_adam
from megatron_nuwa.training.name_patterns import matching
from megatron_nuwa.training.recipe import OptimizerSettings, Recipe

_LINEAR = nn.functional.linear


class Loss(NamedTuple):
    """Mean loss of a micro-batch, and its share in the replica's mean of that task."""

    task: TaskName
    mean: Tensor
    share: float


class Engine(ABC):
    """One process's part of the model in training.

    `model` is whole, or split over the tensor group; in a pipeline the units of other stages have
    no weights. Processes that compute no losses return none. `bounds` say where the pipeline is
    cut; without one they are empty. `adam` is the implementation that was taken.
    """

    bounds: list[int]
    adam: str

    def __init__(self, model: Nuwa, place: Place, device: torch.device) -> None:
        self.model, self.place, self.device = model, place, device
        self.bounds = []
        self.deepspeed: Any = None
        # Called between micro-batches, on all processes alike; what it raises ends the step there.
        self.between: Callable[[], None] = lambda: None

    @abstractmethod
    def train_step(self, batches: Sequence[TokenBatch], seed: int) -> None:
        """Forward, backward and optimizer step over micro-batches; `seed` is dropout's."""

    @abstractmethod
    def losses(self) -> list[Loss]:
        """Losses of the newest step or evaluation, as far as it has come."""

    @abstractmethod
    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Loss]:
        """Losses without gradients; every replica brings the same number of micro-batches."""

    @abstractmethod
    def owned(self, stage: int) -> list[nn.Module]:
        """The modules whose weights a stage holds."""

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def grad_norm(self) -> float:
        """Norm of the last step's gradient, before clipping; every process must call it."""
        return float(self.deepspeed.get_global_grad_norm())

    def loss_scale(self) -> float | None:
        """What fp16 multiplies losses by now; None in other precisions."""
        if self.place.layout.precision != "fp16":
            return None
        return float(self.deepspeed.optimizer.cur_scale)

    @property
    def is_whole(self) -> bool:
        """Whether every process holds all weights whole."""
        layout = self.place.layout
        return layout.pipeline * layout.tensor == 1 and layout.zero_stage < 3

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU of the first process, none elsewhere; every process calls it."""
        return {name: weight.cpu() for name, weight in self.gathered_weights()}

    def gathered_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole weight, one after the other, on the first process; none elsewhere.

        Every process must go through it to the end.
        """
        place = self.place
        names = {id(p): name for name, p in self.model.named_parameters()}
        fetched: set[str] = set()
        for stage in range(place.layout.pipeline):
            leader = place.mpu.stage_to_global(stage, data=0, model=0)
            for parameter in (p for module in self.owned(stage) for p in module.parameters()):
                name = names[id(parameter)]
                # A tied head's table lies on two stages.
                if name not in fetched:
                    fetched.add(name)
                    whole = self._fetch(parameter, place.stage == stage, leader)
                    if dist.get_rank() == 0:
                        yield name, whole

    @torch.no_grad()
    def _fetch(self, parameter: Tensor, is_here: bool, leader: int) -> Tensor:
        """One whole weight: on the first process the truth, elsewhere whatever is at hand."""
        whole = parameter
        if is_here:
            with self._gathered(parameter):
                whole = whole_weight(parameter, self.place.tensor).detach().contiguous().clone()
        rank = dist.get_rank()
        if leader != 0 and rank == leader:
            dist.send(whole, 0)
        elif leader != 0 and rank == 0:
            whole = torch.empty(whole_shape(parameter), dtype=self._dtype(), device=self.device)
            dist.recv(whole, leader)
        return whole

    def replicated_weights(self) -> list[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
        """Weights by their names that the processes of a group hold alike, group by group."""
        group = self.place.tensor.group
        if group is None:
            return []
        whole = {
            # Under ZeRO 3 a part of it, the same part on all.
            name: getattr(p, "ds_tensor", p)
            for name, p in self.model.named_parameters()
            if not p.is_meta and shard_of(p) is None
        }
        return [(group, whole)]

    def _gathered(self, parameter: Tensor) -> Any:
        if not hasattr(parameter, "ds_id"):
            return contextlib.nullcontext()
        return import_deepspeed().zero.GatheredParameters([parameter])

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if not p.is_meta)

    def _scales(self, batches: Sequence[TokenBatch], weights: dict[TaskName, float]) -> list[float]:
        """Factors that make DeepSpeed's mean over micro-batches the paper's sum over tasks."""
        return [weights[batch.task] * batch.share * len(batches) for batch in batches]


class WholeEngine(Engine):
    """Every process runs all units."""

    def __init__(
        self, recipe: Recipe, place: Place, config: dict[str, Any], device: torch.device
    ) -> None:
        super().__init__(_model_of(recipe, place, device), place, device)
        self.model.to_empty(device=device)
        self.model.initialise(recipe.seed)
        self._weights = _task_weights(recipe)
        self._loss = _TaskLoss(_units_of(self.model, recipe, place))
        self._recipe, self._config = recipe, config
        self._losses: list[Loss] = []

    def wrap(self) -> None:
        """Hand the model, with its starting weights, over to DeepSpeed."""
        settings = self._recipe.optimizer
        self.deepspeed, self.adam = _initialize(self._loss, settings, self._config, self.place.mpu)
        streamline(self.deepspeed.optimizer, norm_at_once=self.place.layout.tensor == 1)

    def train_step(self, batches: Sequence[TokenBatch], seed: int) -> None:
        self._losses = []
        scales = self._scales(batches, self._weights)
        # All at once: a copy in the middle of the step would wait for what is queued before it.
        here = [batch.to(self.device) for batch in batches]
        for number, (batch, scale) in enumerate(zip(here, scales, strict=True)):
            if number:
                self.between()
            loss = self.deepspeed(batch, seed + number)
            self._losses.append(Loss(batch.task, loss.detach(), batch.share))
            self.deepspeed.backward(loss * scale)
            self.deepspeed.step()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Loss]:
        self.deepspeed.eval()
        self._losses = []
        try:
            for batch in batches:
                self.between()
                loss = self.deepspeed(batch.to(self.device), 0)
                self._losses.append(Loss(batch.task, loss, batch.share))
        finally:
            self.deepspeed.train()
        return self._losses

    def losses(self) -> list[Loss]:
        return self._losses

    def owned(self, stage: int) -> list[nn.Module]:
        return [self.model]


class StageEngine(Engine):
    """Every process runs the units of its stage in DeepSpeed's pipeline schedule (1F1B)."""

    def __init__(
        self,
        recipe: Recipe,
        place: Place,
        config: dict[str, Any],
        device: torch.device,
        bounds: list[int],
    ) -> None:
        from megatron_nuwa.parallel.pipeline import own_modules

        super().__init__(_model_of(recipe, place, device), place, device)
        self._units, self.bounds = _units_of(self.model, recipe, place), bounds
        for module in own_modules(self._units, bounds, place.stage):
            module.to_empty(device=device)
        self.model.initialise(recipe.seed)
        self._recipe, self._config = recipe, config
        self._weights = _task_weights(recipe)
        self._batches: Sequence[TokenBatch] = ()
        self._means: list[Tensor] = []

    def wrap(self) -> None:
        """Hand the stage, with its starting weights, over to DeepSpeed."""
        from megatron_nuwa.parallel.pipeline import NuwaPipeline, Traffic

        pipeline = NuwaPipeline(self._units, self.bounds, self.place, self._scaled_loss)
        # Messages of different shapes travel; what a process sends is not split further.
        settings = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
        config = {**self._config, "pipeline": settings}
        self.deepspeed, self.adam = _initialize(pipeline, self._recipe.optimizer, config, None)
        streamline(self.deepspeed.optimizer, norm_at_once=False)
        self._traffic = Traffic(self.deepspeed, self.device)
        for weight, _ in self.deepspeed.module.get_tied_weights_and_groups():
            # DeepSpeed asks for what only weights that are trained get, and passes over None.
            if not weight.requires_grad:
                weight._hp_grad = None

    def train_step(self, batches: Sequence[TokenBatch], seed: int) -> None:
        scales = self._scales(batches, self._weights)
        micro_batches = self._begin(batches, scales, seed, self.deepspeed.micro_batches)
        self.deepspeed.train_batch(micro_batches)
        # It is emptied only when DeepSpeed prints, and keeps two events of CUDA's a step till then.
        self.deepspeed.timers("train_batch").reset()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[TokenBatch]) -> list[Loss]:
        self.between()
        agreed = torch.tensor(len(batches), device=self.device)
        # Stages in the middle read no data, and so do not know how much there is.
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        count = int(agreed)
        self.deepspeed.eval_batch(
            self._begin(batches, [1.0] * len(batches), 0, count),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=count,
        )
        self.deepspeed.train()
        return self.losses()

    def _begin(
        self, batches: Sequence[TokenBatch], scales: Sequence[float], seed: int, count: int
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]]:
        """The micro-batches of a step or an evaluation, on the device; all stages know of them."""
        self._batches, self._means = batches, []
        # All at once: a copy in the middle of the step would wait for what is queued before it.
        here = [batch.to(self.device) for batch in batches]
        factors = torch.tensor(scales, dtype=torch.float32, device=self.device)
        flows = [
            Flow.of(batch.context, batch.target, batch.grid, seed + number)
            for number, batch in enumerate(here)
        ]
        self._traffic.announce(flows, count)
        return iter(
            [
                (flow.pack(), (batch.target, factor))
                for flow, batch, factor in zip(flows, here, factors, strict=True)
            ]
        )

    def replicated_weights(self) -> list[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        tied = self.deepspeed.module.get_tied_weights_and_groups()
        return [
            *super().replicated_weights(),
            *((group, {names[id(weight)]: weight}) for weight, group in tied),
        ]

    def _scaled_loss(self, logits: Tensor, labels: Sequence[Tensor]) -> Tensor:
        target, scale = labels
        loss = self.model.cross_entropy(logits, target)
        self._means.append(loss.detach())
        return loss * scale

    def losses(self) -> list[Loss]:
        # The schedule computes them in the order of the micro-batches, on the last stage.
        return [
            Loss(batch.task, mean, batch.share)
            for batch, mean in zip(self._batches, self._means, strict=False)
        ]

    def owned(self, stage: int) -> list[nn.Module]:
        from megatron_nuwa.parallel.pipeline import own_modules

        return own_modules(self._units, self.bounds, stage)


class _TaskLoss(nn.Module):
    """The model as DeepSpeed wants to call it: a micro-batch in, its loss out."""

    def __init__(self, units: Units) -> None:
        super().__init__()
        self.model = units.model
        self._units = (units,)

    def forward(self, batch: TokenBatch, seed: int) -> Tensor:
        """Mean cross-entropy of the batch's target tokens, nats a token."""
        (units,) = self._units
        flow = units.run(Flow.of(batch.context, batch.target, batch.grid, seed))
        return self.model.cross_entropy(flow.x, batch.target)


def _model_of(recipe: Recipe, place: Place, device: torch.device) -> Nuwa:
    assert recipe.model is not None
    with torch.device("meta"):
        model = Nuwa(recipe.model)
    if place.layout.tensor > 1:
        split_model(model, place.tensor, place.layout.sequence_parallel)
    if recipe.training.compile:
        model.cross_entropy.compile(dynamic=False)
    # A compiler cannot look into apex's.
    norm = "torch" if recipe.training.compile else recipe.training.norm
    taken = fuse_norms(norm, model, device)
    parameters = dict(model.named_parameters())
    for name in matching(recipe.optimizer.frozen, parameters, "optimizer.frozen"):
        parameters[name].requires_grad_(False)
    if dist.get_rank() == 0:
        print(f"norms {taken}", flush=True)
    return model


def _units_of(model: Nuwa, recipe: Recipe, place: Place) -> Units:
    # With sequence parallelism the processes of a tensor group hold different tokens.
    stream = place.tensor.rank if place.layout.sequence_parallel else 0
    settings = recipe.training
    return Units(model, settings.checkpoint_activations, stream, compiled=settings.compile)


def _task_weights(recipe: Recipe) -> dict[TaskName, float]:
    assert recipe.data is not None
    return {task: settings.weight for task, settings in recipe.data.tasks.items()}


def _initialize(
    module: nn.Module, settings: OptimizerSettings, config: dict[str, Any], mpu: Any
) -> tuple[Any, str]:
    """A DeepSpeed engine, and which Adam it was given."""
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    optimizer, taken = make_adam(
        settings.implementation,
        [p for p in module.parameters() if p.requires_grad],
        decoupled=settings.name == "adamw",
        offloaded=offload.get("device", "none") != "none",
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    if dist.get_rank() == 0:
        print(f"optimizer {taken}", flush=True)
    # DeepSpeed replaces it for ZeRO 3, and leaves it so to whatever the process trains next.
    nn.functional.linear = _LINEAR
    # It prints its memory at every turn.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = import_deepspeed().initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False, mpu=mpu
        )
    return engine, taken
