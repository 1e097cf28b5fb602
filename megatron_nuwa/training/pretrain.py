"""Pretraining: batch → forward and backward → step → log → maybe evaluate → maybe save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_nuwa.data.batches import TaskBatches, TaskName, TokenBatch
from megatron_nuwa.data.sampling import mix
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.models.vqgan import save_vqgan
from megatron_nuwa.training import resume
from megatron_nuwa.training.checkpoint import Checkpoints
from megatron_nuwa.training.checkpoint import load as load_checkpoint
from megatron_nuwa.training.engine import build_engine, complete_layout, read_layout
from megatron_nuwa.training.evaluation import HeldOut, evaluate
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.inputs import Inputs, open_inputs
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.prefetch import prefetched
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.run_folder import prepare_run_folder
from megatron_nuwa.training.schedule import learning_rate

# Shows pictures of the current model: (model, step, monitor, grids, frames a second).
ShowSamples = Callable[[Nuwa, int, Monitor, Sequence[Grid], float | None], None]
VQGAN_FILE = "tokenizers/vqgan.safetensors"
BPE_FILE = "tokenizers/bpe.json"


def pretrain(
    recipe: Recipe, layout_path: Path, processes: Processes, show_samples: ShowSamples | None = None
) -> None:
    """Train to the end of the recipe's schedule, from the run's newest checkpoint if it has one.

    Every process of the run calls it. Raises `UserError` before anything is written when the
    recipe, the layout, the corpora and the tokenizers do not fit together.
    """

    def check() -> tuple[dict[str, Any], Inputs, resume.Start]:
        recipe.require("run", "model", "tokenizers", "data")
        layout = read_layout(layout_path)
        inputs = open_inputs(recipe, processes.world_size)
        return layout, inputs, resume.find_start(recipe, layout, inputs, processes.world_size)

    layout, inputs, start = processes.first_then_all(check)
    assert recipe.run is not None
    if processes.is_first:
        for line in start.messages:
            print(line, flush=True)
        _write_run_folder(recipe.run, recipe, inputs)
    with Monitor(recipe.run, enabled=processes.is_first) as monitor:
        training = Pretraining(recipe, layout, inputs, processes, monitor)
        training.begin(start)
        training.run(show_samples)


class Pretraining:
    """One process's part of a pretraining run."""

    def __init__(
        self,
        recipe: Recipe,
        layout: dict[str, Any],
        inputs: Inputs,
        processes: Processes,
        monitor: Monitor,
    ) -> None:
        assert recipe.run is not None
        assert recipe.model is not None
        assert recipe.data is not None
        self.recipe, self.layout, self.inputs = recipe, layout, inputs
        self.processes, self.monitor = processes, monitor
        self.data = recipe.data
        self.folder = recipe.run
        self.checkpoints = Checkpoints(recipe.run / "checkpoints", recipe.training.keep_checkpoints)
        self.tasks: dict[TaskName, TaskBatches] = {
            task: TaskBatches(
                task,
                inputs.train[task],
                inputs.bpe,
                seed=recipe.seed,
                batch_size=settings.batch_size,
                caption_dropout=self.data.caption_dropout,
            )
            for task, settings in self.data.tasks.items()
        }
        self.held_out = _held_out(recipe, inputs)
        torch.manual_seed(recipe.seed)
        self.model = Nuwa(recipe.model)
        self.model.checkpoint_activations = recipe.training.checkpoint_activations
        if recipe.model.visual_embedding == "codebook":
            self.model.use_codebook(inputs.vqgan.codebook())
        config = complete_layout(
            layout,
            len(self.tasks) * self.data.accumulation,
            processes.world_size,
            recipe.optimizer.gradient_clipping,
        )
        if processes.is_first:
            write_text_atomically(self.folder / "ds_config.json", json.dumps(config, indent=2))
        self.engine = build_engine(self.model.to(processes.device), recipe.optimizer, config)
        self.figures = StepFigures(recipe, self.tasks, processes)
        self.step = 0

    def begin(self, start: resume.Start) -> None:
        """Load the checkpoint that the run continues from, and say how the run begins."""
        if start.checkpoint is not None:
            load_checkpoint(self.engine, start.checkpoint)
            self.step = start.step
        if self.processes.is_first:
            counts = self.model.parameter_counts()
            print("  ".join(f"{name} {number / 1e6:.2f} M" for name, number in counts.items()))
            begins = f"continuing after step {self.step}" if self.step else "starting"
            print(f"{begins}; {self.recipe.schedule.steps} steps in all", flush=True)

    def run(self, show_samples: ShowSamples | None) -> None:
        """Train until the schedule or `training.stop_at_step` ends."""
        recipe = self.recipe
        last = min(recipe.schedule.steps, recipe.training.stop_at_step or recipe.schedule.steps)
        if self.step >= last:
            if self.processes.is_first:
                print(f"nothing to do: step {self.step} of {last} is reached already", flush=True)
            return
        self.engine.train()
        for batches in prefetched(self._batches(), range(self.step, last), self.figures):
            losses = self._train_step(batches)
            self.step += 1
            ended = self.step == last
            self.figures.add(losses)
            if self.step % recipe.training.log_every == 0 or ended:
                self._log(last)
            if recipe.evaluation and (self.step % recipe.evaluation.every == 0 or ended):
                self._evaluate()
            if recipe.samples and show_samples and self.step % recipe.samples.every == 0:
                self._show(show_samples)
            if self.step % recipe.training.checkpoint_every == 0 or ended:
                self._save()
            self.figures.restart_clock()

    def _train_step(self, batches: list[TokenBatch]) -> list[tuple[TaskName, torch.Tensor]]:
        """One optimizer step over the micro-batches of every task (paper Eq. 12)."""
        # Dropout depends on the step and the process alone, so a resume needs no saved state.
        torch.manual_seed(mix(self.recipe.seed, self.step, self.processes.rank))
        rate = learning_rate(self.step, self.recipe.optimizer.learning_rate, self.recipe.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for batch in batches:
            loss = self.engine(batch.to(self.processes.device))
            # DeepSpeed averages over micro-batches; the paper sums over tasks.
            scale = self.data.tasks[batch.task].weight * len(self.tasks)
            self.engine.backward(loss * scale)
            self.engine.step()
            losses.append((batch.task, loss.detach()))
        return losses

    def _batches(self) -> Callable[[int], list[TokenBatch]]:
        parts = self.data.accumulation

        def read(step: int) -> list[TokenBatch]:
            rank, ranks = self.processes.rank, self.processes.world_size
            return [
                task.micro_batch(step, rank, ranks, part, parts)
                for part in range(parts)
                for task in self.tasks.values()
            ]

        return read

    def _log(self, last: int) -> None:
        norm = self.engine.get_global_grad_norm()
        rate = self.engine.optimizer.param_groups[0]["lr"]
        values = self.figures.take(self.step, float(norm or 0.0), float(rate))
        self.monitor.scalars(self.step, self.figures.samples(self.step), values)
        if self.processes.is_first:
            print(self.figures.line(self.step, last, values), flush=True)

    def _evaluate(self) -> None:
        result = evaluate(self.model, self.held_out, self.processes)
        values = {
            f"eval/{figure}/{task}": value
            for task, figures in result.items()
            for figure, value in figures.items()
        }
        self.monitor.scalars(self.step, self.figures.samples(self.step), values)
        if self.processes.is_first:
            summary = {"step": self.step, "heldout": {**_worst_on_clips(result), "tasks": result}}
            write_text_atomically(self.folder / "evaluation.json", json.dumps(summary, indent=2))
            scores = ", ".join(
                f"{task} {figures['loss_nats']:.3f} nats a token "
                f"({figures['below_unigram']:.1%} below unigram)"
                for task, figures in result.items()
            )
            print(f"held out after step {self.step}: {scores}", flush=True)

    def _show(self, show_samples: ShowSamples) -> None:
        if self.processes.is_first:
            corpora = [corpora[0] for corpora in self.inputs.train.values()]
            rates = (corpus.manifest.frames_per_second for corpus in corpora)
            show_samples(
                self.model,
                self.step,
                self.monitor,
                [corpus.grid for corpus in corpora],
                next((rate for rate in rates if rate), None),
            )
        self.processes.barrier()

    def _save(self) -> None:
        start = time.perf_counter()
        state = resume.describe(self.recipe, self.layout, self.inputs, self.processes.world_size)
        path = self.checkpoints.save(self.engine, self.model, self.step, state, self.processes)
        if self.processes.is_first:
            print(f"saved {path} in {time.perf_counter() - start:.1f} s", flush=True)


def _worst_on_clips(result: dict[TaskName, dict[str, float]]) -> dict[str, float]:
    """The figures of the clip task that gains least on the unigrams; of any without clips."""
    clips = [figures for task, figures in result.items() if task != "t2i"]
    return min(clips or result.values(), key=lambda figures: figures["below_unigram"])


def _held_out(recipe: Recipe, inputs: Inputs) -> dict[TaskName, HeldOut]:
    settings = recipe.evaluation
    if settings is None:
        return {}
    return {
        task: HeldOut(
            task, corpora, inputs.bpe, batch_size=settings.batch_size, items=settings.items
        )
        for task, corpora in inputs.held_out.items()
    }


def _write_run_folder(run: Path, recipe: Recipe, inputs: Inputs) -> None:
    """Everything that generation needs later lies in the run, whatever becomes of the originals."""
    prepare_run_folder(run, recipe)
    (run / VQGAN_FILE).parent.mkdir(exist_ok=True)
    save_vqgan(inputs.vqgan, run / VQGAN_FILE)
    inputs.bpe.save(run / BPE_FILE)
