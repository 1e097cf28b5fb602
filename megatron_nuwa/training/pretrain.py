"""Pretraining: batch → forward and backward → step → log → maybe evaluate → maybe save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_nuwa.config import dump_settings
from megatron_nuwa.data.batches import SKETCH_TASKS, TaskName, TokenBatch, interleave
from megatron_nuwa.data.sampling import mix
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.parallel.groups import find_place
from megatron_nuwa.training import resume
from megatron_nuwa.training.building import build_engine, complete_config
from megatron_nuwa.training.checkpoint import STATE_FILE, Checkpoints, read_state
from megatron_nuwa.training.costs import unit_costs
from megatron_nuwa.training.drawing import ShowSamples, draw_samples
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.evaluation import (
    as_tags,
    evaluate,
    held_out_items,
    in_words,
    must_be_made_up,
    write_evaluation,
)
from megatron_nuwa.training.faults import clear_faults, written_down
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.guard import BAD_BATCHES_FILE, Guard, Verdict
from megatron_nuwa.training.inputs import task_batches, write_run_folder
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.prefetch import prefetched
from megatron_nuwa.training.preparing import MemoryNeeded, Prepared, prepare, read_whole_layout
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.random_state import restore_random_state, seed_random_state
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.relayout import load
from megatron_nuwa.training.replicas import warn_where_replicas_differ
from megatron_nuwa.training.run_folder import ENVIRONMENT_FILE, RECIPE_FILE, describe_environment
from megatron_nuwa.training.saving import Saver
from megatron_nuwa.training.schedule import learning_rate
from megatron_nuwa.training.skipping import make_skippable
from megatron_nuwa.training.stopping import (
    StopRequested,
    StopSignals,
    raise_if_stopped,
    told_before_the_first_step,
)
from megatron_nuwa.training.watchdog import Watchdog, watched

# After a longer step the processes also look for stop signals between the next one's micro-batches;
# short ones are spared that, because it would have the CPUs wait for the GPUs.
LONG_STEP_SECONDS = 5.0


def pretrain(
    recipe: Recipe,
    layout_path: Path,
    processes: Processes,
    show_samples: ShowSamples | None = None,
    memory_needed: MemoryNeeded | None = None,
    stop: StopSignals | None = None,
) -> None:
    """Train to the end of the recipe's schedule, from the run's newest checkpoint if it has one.

    Every process of the run calls it; `stop` may have taken signals before. Raises `UserError`
    before anything is allocated or written when the recipe, the layout, the nodes, the corpora and
    the tokenizers do not fit together, or where there is less memory than `memory_needed` says.
    """
    if processes.is_first:
        print(processes, flush=True)
    with told_before_the_first_step(stop, processes) as signals:
        _pretrain(recipe, layout_path, processes, show_samples, memory_needed, signals)


def _pretrain(
    recipe: Recipe,
    layout_path: Path,
    processes: Processes,
    show_samples: ShowSamples | None,
    memory_needed: MemoryNeeded | None,
    stop: StopSignals,
) -> None:
    """Raises `StopRequested` where the signal comes before the first step."""
    layout, config = read_whole_layout(recipe, layout_path, processes)
    assert recipe.run is not None
    assert recipe.data is not None
    training: Pretraining | None = None

    def reached() -> int:
        return 0 if training is None else training.step

    seconds = recipe.training.hang_seconds
    with watched(seconds, recipe.run, processes, reached, stop) as (watchdog, go_on):
        prepared = prepare(recipe, layout, config, processes, memory_needed, go_on)
        start = prepared.start
        if processes.is_first:
            said = [] if prepared.weights is None else [prepared.weights.summary()]
            for line in (*start.messages, *said):
                print(line, flush=True)
            clear_faults(recipe.run)
            write_run_folder(recipe.run, recipe, prepared.inputs)
        samples = sum(task.batch_size for task in recipe.data.tasks.values())
        with Monitor(
            recipe.run, enabled=processes.is_first, samples_a_step=samples, step=start.step
        ) as monitor:
            training = Pretraining(recipe, prepared, processes, monitor, stop, watchdog)
            with written_down(recipe.run, processes, reached):
                training.begin(start)
                go_on()
                training.run(show_samples)


class Pretraining:
    """One process's part of a pretraining run."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        processes: Processes,
        monitor: Monitor,
        stop: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        assert recipe.run is not None
        assert recipe.model is not None
        assert recipe.data is not None
        layout, inputs, weights = prepared.layout, prepared.inputs, prepared.weights
        self.recipe, self.inputs = recipe, inputs
        self.processes, self.monitor = processes, monitor
        self.folder = recipe.run
        self.description = resume.describe(recipe, layout, prepared.config, inputs)
        self.tasks = task_batches(recipe, inputs)
        self.place = find_place(layout)
        self.held_out = held_out_items(recipe, inputs, self.place.replica, layout.data)
        full_config = complete_config(
            prepared.config,
            sum(task.micro_batch_count(layout.data) for task in self.tasks.values()),
            layout.data,
            recipe,
        )
        if processes.is_first:
            shown = json.dumps(full_config, indent=2)
            write_text_atomically(self.folder / "ds_config.json", shown)
        grids = {task: batches.grid for task, batches in self.tasks.items()}
        codes = recipe.model.visual_embedding == "codebook"
        sketch_vqgan = inputs.sketch_vqgan if codes else None
        self.engine = build_engine(
            recipe,
            self.place,
            full_config,
            processes.device,
            unit_costs(recipe, grids, layout.cut, processes.device),
            inputs.vqgan.codebook() if codes else None,
            None if weights is None else weights.of,
            None if sketch_vqgan is None else sketch_vqgan.codebook(),
        )
        make_skippable(self.engine.deepspeed, self._should_skip)
        self.stop, self.watchdog = stop, watchdog
        self.engine.between = self._between
        self._asks_between = 1
        self.saver = _saver(recipe, self.engine, processes, self.watchdog.beat)
        self.figures = StepFigures(recipe, self.tasks, processes, self.place.stage)
        self.figures.watch(self.engine.deepspeed.module)
        bad_batches = self.folder / BAD_BATCHES_FILE if processes.is_first else None
        self.guard = Guard(recipe.training.guard, bad_batches)
        self._means: dict[TaskName, float] = {}
        # The same under the names that the guard tells losses apart by.
        self._judged: dict[str, float] = {}
        self._verdict = Verdict(False)
        self.step = 0

    def begin(self, start: resume.Start) -> None:
        """Load the checkpoint that the run continues from, and say how the run begins."""
        if start.checkpoint is not None:
            state = read_state(start.checkpoint)
            load(self.engine, start, state)
            self.step = start.step
            self.guard.restore(state["guard"])
        if self.processes.is_first:
            assert self.recipe.model is not None
            with torch.device("meta"):
                counts = Nuwa(self.recipe.model).parameter_counts()
            print(f"layout {self.place.layout.name}")
            print("  ".join(f"{name} {number / 1e6:.2f} M" for name, number in counts.items()))
            begins = f"continuing after step {self.step}" if self.step else "starting"
            print(f"{begins}; {self.recipe.schedule.in_words(self.step)}", flush=True)
        # At the end, because the above may draw numbers.
        seed_random_state(mix(self.recipe.seed, self.processes.rank) >> 1)
        if start.checkpoint is not None:
            restore_random_state(start.checkpoint, self.processes.rank)

    def run(self, show_samples: ShowSamples | None) -> None:
        """Train until the schedule or `training.stop_at_step` ends, or a signal asks to stop.

        The last state is on the disk then. Raises `StopRequested` where no step was made before.
        """
        recipe = self.recipe
        last = min(recipe.schedule.steps, recipe.training.stop_at_step or recipe.schedule.steps)
        if self.step >= last:
            if self.processes.is_first:
                print(f"nothing to do: step {self.step} of {last} is reached already", flush=True)
            self._make_up_for_evaluation(last)
            return
        first = self.step
        self.watchdog.steps_begin()
        try:
            self._train(last, show_samples)
        except StopRequested as request:
            if self.step == first:
                raise
            if self.processes.is_first:
                print(f"{request} received: saving step {self.step} and ending", flush=True)
            warn_where_replicas_differ(self.engine, self.processes, self.step)
        self.saver.finish(self.step, self._texts())

    def _train(self, last: int, show_samples: ShowSamples | None) -> None:
        recipe = self.recipe
        # What came before, the loading of a checkpoint too, is not the first step's time.
        self.figures.restart_clock()
        for batches in prefetched(self._batches(), range(self.step, last), self.figures):
            self.watchdog.beat()
            begin = time.monotonic()
            self._train_step(batches)
            self.step += 1
            ended = self.step == last
            is_long = time.monotonic() - begin > LONG_STEP_SECONDS
            # The answer comes from the device, and so after the optimizer's update: what stops the
            # step's clock afterwards need not wait for the device again.
            signal_number, is_writing, self._asks_between = self.processes.agree(
                [self.stop.received, int(self.saver.is_writing), int(is_long)]
            )
            self._account()
            if self.step % recipe.training.log_every == 0 or ended:
                self._log(last)
            if not is_writing:
                self.saver.settle()
            if not ended:
                raise_if_stopped(signal_number)
            if self.step % recipe.training.checkpoint_every == 0 or ended:
                warn_where_replicas_differ(self.engine, self.processes, self.step)
                self.saver.save(self.step, self._texts())
            self._look(ended, show_samples)
            self.figures.restart_clock()

    def _train_step(self, batches: list[TokenBatch]) -> None:
        """One optimizer step over the micro-batches of every task (paper Eq. 12)."""
        peak = self.recipe.optimizer.learning_rate
        self.engine.set_rate(learning_rate(self.step, peak, self.recipe.schedule))
        # Dropout depends on the step and the replica alone, so a resume needs no saved state.
        seed = mix(self.recipe.seed, self.step, self.place.replica) >> 1
        self.engine.train_step(batches, seed)

    def _between(self) -> None:
        """Between micro-batches: steps and evaluations may last longer than a signal's grace."""
        self.watchdog.beat()
        if self._asks_between:
            self.stop.check(self.processes)

    def _should_skip(self) -> bool:
        """Judge the step before its optimizer step; DeepSpeed asks on every process."""
        self._means = self.figures.mean_losses(self.engine.losses())
        self._judged = {self._kind(task): loss for task, loss in self._means.items()}
        self._verdict = self.guard.verdict(self._judged)
        self.saver.wait_until_copied()
        return self._verdict.skip

    def _kind(self, task: TaskName) -> str:
        """A task's name where all of its losses are alike, else that of this step's kind.

        A model that has learned to read sketches does far worse in the steps without them.
        """
        if task not in SKETCH_TASKS or self.tasks[task].reads_sketches(self.step):
            return task
        return f"{task} without sketches"

    def _account(self) -> None:
        """Note what became of the step that has just ended."""
        if self.engine.deepspeed.was_step_applied():
            self.figures.add(self._means)
            self.guard.accepted(self._judged)
            return
        self.figures.add_skipped()
        # fp16 drops steps while it looks for a loss scale; that is no fault of the batch.
        if self._verdict.skip or self.place.layout.precision != "fp16":
            reason = self._verdict.reason or "a gradient is not finite"
            if self.processes.is_first:
                path = self.folder / BAD_BATCHES_FILE
                print(f"step {self.step} skipped: {reason}; its items are in {path}", flush=True)
            try:
                self.guard.skipped(self.step, reason, self._judged, self._items(self.step - 1))
            except UserError:
                # The run ends here, on all processes alike.
                self.saver.settle()
                raise

    def _items(self, step: int) -> dict[TaskName, list[list[str]]]:
        """The items of all replicas, on the process that writes them down."""
        if not self.processes.is_first:
            return {}
        replicas = self.place.layout.data
        return {
            name: [task.item_names(step, replica, replicas) for replica in range(replicas)]
            for name, task in self.tasks.items()
        }

    def _batches(self) -> Callable[[int], list[TokenBatch]]:
        replica, replicas = self.place.replica, self.place.layout.data

        def read(step: int) -> list[TokenBatch]:
            return interleave(
                {
                    name: task.micro_batches(step, replica, replicas)
                    for name, task in self.tasks.items()
                }
            )

        return read if self.place.reads_data else lambda step: []

    def _log(self, last: int) -> None:
        engine, rate = self.engine, self.engine.deepspeed.optimizer.param_groups[0]["lr"]
        values = self.figures.take(
            self.step, engine.grad_norm(), float(rate), loss_scale=engine.loss_scale()
        )
        self.monitor.scalars(self.step, values)
        if self.processes.is_first:
            print(self.figures.line(self.step, last, values), flush=True)
            for straggler in self.figures.stragglers():
                print(f"slow: {straggler}", flush=True)

    def _look(self, ended: bool, show_samples: ShowSamples | None) -> None:
        """Evaluate the model and draw samples where that is due."""
        evaluation, samples = self.recipe.evaluation, self.recipe.samples
        evaluates = evaluation and (self.step % evaluation.every == 0 or ended)
        draws = samples and show_samples and self.step % samples.every == 0
        if evaluates or draws:
            # Whatever ends the run in there, a kernel's crash or a killed process too, would do so
            # at every start; so the next one shall begin behind it.
            self.saver.settle()
        if evaluates:
            self._evaluate(ended)
        if draws:
            assert show_samples is not None
            corpora = {task: corpora[0] for task, corpora in self.inputs.train.items()}
            draw_samples(
                show_samples, self.engine, self.processes, self.monitor, self.step, corpora
            )

    def _make_up_for_evaluation(self, last: int) -> None:
        """Evaluate a run that has ended, where it ended before its evaluation did."""
        is_due = self.recipe.evaluation is not None and self.step == last
        if is_due and self.processes.first_tells(lambda: must_be_made_up(self.folder, last)):
            self.watchdog.steps_begin()
            self._evaluate(ended=True)

    def _evaluate(self, ended: bool) -> None:
        # The last one is finished whatever signal comes: nothing else is left to do.
        self._asks_between = int(not ended)
        result = evaluate(self.engine, self.held_out)
        self.monitor.scalars(self.step, as_tags(result))
        if self.processes.is_first:
            write_evaluation(self.folder, self.step, result)
            print(f"held out after step {self.step}: {in_words(result)}", flush=True)

    def _texts(self) -> dict[str, str]:
        """What a checkpoint says about the run beside its state, on the first process."""
        if not self.processes.is_first:
            return {}
        state = {
            "step": self.step,
            **self.description,
            "bounds": self.engine.bounds,
            "adam": self.engine.adam,
            "guard": self.guard.state(),
        }
        return {
            STATE_FILE: json.dumps(state, indent=2),
            RECIPE_FILE: dump_settings(self.recipe),
            ENVIRONMENT_FILE: json.dumps(describe_environment(), indent=2),
        }


def _saver(
    recipe: Recipe, engine: Engine, processes: Processes, on_progress: Callable[[], None]
) -> Saver:
    assert recipe.run is not None
    settings = recipe.training
    checkpoints = Checkpoints(
        recipe.run / "checkpoints", settings.keep_checkpoints, settings.keep_every
    )
    copy_bytes = None if settings.copy_gib is None else int(settings.copy_gib * 2**30)
    return Saver(checkpoints, engine, processes, copy_bytes, on_progress)
