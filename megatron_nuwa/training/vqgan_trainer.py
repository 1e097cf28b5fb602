"""Training a VQ-GAN from a recipe: the loop, its log, its evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

from torch.utils.data import Dataset

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan, save_vqgan
from megatron_nuwa.training.checkpoint import Checkpoints
from megatron_nuwa.training.faults import clear_faults, written_down
from megatron_nuwa.training.frames import Batch, MediaFrames, Sample
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.progress import track
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.run_folder import prepare_run_folder, taken_back
from megatron_nuwa.training.stopping import (
    StopRequested,
    StopSignals,
    raise_if_stopped,
    told_before_the_first_step,
)
from megatron_nuwa.training.vqgan_checkpoint import (
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron_nuwa.training.vqgan_evaluation import (
    VqganEvaluation,
    comparison,
    evaluate_vqgan,
    held_out_frames,
)
from megatron_nuwa.training.vqgan_figures import FigureWindow
from megatron_nuwa.training.vqgan_inputs import kmeans_batches, open_dataset, training_batches
from megatron_nuwa.training.vqgan_recipe import VqganRecipe
from megatron_nuwa.training.vqgan_step import VqganStep
from megatron_nuwa.training.watchdog import Watchdog, watched

_SHOWN_RECONSTRUCTIONS = 8
_EVALUATION_WORKERS = 4


def train_vqgan(
    recipe: VqganRecipe,
    whole_recipe: Recipe,
    processes: Processes,
    train: MediaFrames,
    held_out: MediaFrames | None,
    stop: StopSignals | None = None,
) -> VqganEvaluation | None:
    """Train from the run's newest checkpoint to its last step; returns the final evaluation.

    None without held-out frames, and where SIGTERM or SIGUSR1 ended the training early; `stop` may
    have taken signals before. Every process of the run calls it.

    Leaves `RUN/vqgan.safetensors` and, with held-out frames, `RUN/evaluation.json`. Raises
    `UserError` for settings that do not fit, media that cannot be decoded, a foreign run folder.
    """
    if recipe.batch_size % processes.world_size:
        raise UserError(
            f"{recipe.section}.batch_size {recipe.batch_size} must be a multiple of the number of "
            f"processes, {processes.world_size}"
        )
    with told_before_the_first_step(stop, processes) as signals:
        return _train_vqgan(recipe, whole_recipe, processes, train, held_out, signals)
    return None


def _train_vqgan(
    recipe: VqganRecipe,
    whole_recipe: Recipe,
    processes: Processes,
    train: MediaFrames,
    held_out: MediaFrames | None,
    stop: StopSignals,
) -> VqganEvaluation | None:
    """Raises `StopRequested` where the signal comes before the first step."""
    training: VqganTraining | None = None

    def reached() -> int:
        return 0 if training is None else training.step

    seconds = whole_recipe.training.hang_seconds
    with watched(seconds, recipe.run, processes, reached, stop) as (watchdog, go_on):
        start = processes.first_then_all(lambda: _start(recipe))
        state = VqganStep(recipe, whole_recipe.seed, processes)
        step = _resume(state)
        go_on()
        # Only now: a run that is refused must not change the folder of the one it does not fit.
        with taken_back(recipe.run) if processes.is_first else nullcontext():
            if processes.is_first:
                prepare_run_folder(recipe.run, whole_recipe, f"{recipe.section}.run")
                clear_faults(recipe.run)
            processes.barrier()
            held = None
            if held_out is not None:
                place = recipe.run / "held_out_frames.npy"
                held = open_dataset(recipe, held_out, place, processes, go_on)
            frames = open_dataset(recipe, train, recipe.run / "frames.npy", processes, go_on)
        if step == 0 and start is not None:
            state.begin_with(start)
        _announce(state, step, frames)
        with Monitor(
            recipe.run,
            enabled=processes.is_first,
            samples_a_step=recipe.batch_size,
            step=step,
        ) as monitor:
            training = VqganTraining(
                state, step, whole_recipe.seed, frames, held, monitor, stop, watchdog
            )
            with written_down(recipe.run, processes, reached):
                go_on()
                return training.run()


class VqganTraining:
    """One process's part of a VQ-GAN's training."""

    def __init__(
        self,
        state: VqganStep,
        step: int,
        seed: int,
        frames: Dataset[Sample],
        held_out: Dataset[Sample] | None,
        monitor: Monitor,
        stop: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self.state, self.step, self.seed = state, step, seed
        self.recipe, self.processes = state.recipe, state.processes
        self.frames, self.held_out = frames, held_out
        self.monitor, self.stop, self.watchdog = monitor, stop, watchdog
        self.window = FigureWindow(self.recipe.model.codebook_size, self.processes)

    def run(self) -> VqganEvaluation | None:
        """Train to the end; returns the evaluation there, None where a signal has ended it."""
        recipe, processes = self.recipe, self.processes
        self.watchdog.steps_begin()
        try:
            self._train()
        except StopRequested as request:
            self._say(f"{request} received: the last step is saved")
            processes.barrier()
            return None
        evaluation = None if self.held_out is None else self._evaluate(self.held_out)
        if processes.is_first:
            if evaluation:
                text = json.dumps(evaluation.figures(), indent=2)
                write_text_atomically(recipe.run / "evaluation.json", text + "\n")
            save_vqgan(self.state.tokenizer, recipe.run / "vqgan.safetensors")
            print(f"VQ-GAN written to {recipe.run / 'vqgan.safetensors'}", flush=True)
        processes.barrier()
        return evaluation

    def _train(self) -> None:
        """Raises `StopRequested`, with the last step saved, after a signal."""
        recipe, processes, window = self.recipe, self.processes, self.window
        batches: Iterator[Batch] = self._batches()
        if processes.is_first:
            batches = track(batches, "training the VQ-GAN", total=recipe.steps, done=self.step)
        for batch in batches:
            self.watchdog.beat()
            figures, counts = self.state(self.step, batch.images(processes.device))
            signal_number = processes.agree([self.stop.received])[0]
            window.add(figures, counts, batch.broken)
            self.step += 1
            step, last = self.step, self.step == recipe.steps
            if step % recipe.log_every == 0 or last:
                means = window.close(recipe.batch_size)
                self.monitor.scalars(step, means)
                self._say(_line(step, recipe.steps, means))
            if step % recipe.checkpoint_every == 0 or last or signal_number:
                _save(self.state, step, must=bool(last or signal_number))
            if last:
                return
            raise_if_stopped(signal_number)
            # After the save: an evaluation that fails would meet its step again at every start.
            if self.held_out and recipe.evaluate_every and step % recipe.evaluate_every == 0:
                self._evaluate(self.held_out)
            window.restart_clock()

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps left; on the way, the codes are placed by k-means.

        One loader of training frames at a time: each has its own workers.
        """
        recipe, placed_at = self.recipe, self.recipe.codebook.start_step
        if recipe.codebook.kmeans and self.step <= placed_at < recipe.steps:
            yield from self._batches_between(self.step, placed_at)
            self.watchdog.beat()
            self._say(f"step {placed_at}: placing {recipe.model.codebook_size} codes by k-means")
            with closing(kmeans_batches(recipe, self.seed, self.processes, self.frames)) as frames:
                self.state.start_codebook(placed_at, frames)
        yield from self._batches_between(self.step, recipe.steps)

    def _batches_between(self, first: int, end: int) -> Iterator[Batch]:
        batches = training_batches(self.recipe, self.seed, self.processes, self.frames, first, end)
        for step, batch in enumerate(batches, start=first):
            if step == first:
                # Its workers have started meanwhile, which takes seconds.
                self.window.restart_clock()
            yield batch

    def _evaluate(self, held_out: Dataset[Sample]) -> VqganEvaluation:
        """Reconstruct the held-out frames, log the figures and some pictures."""
        state, recipe, step = self.state, self.recipe, self.step
        device = self.processes.device
        per_process = max(1, recipe.batch_size // self.processes.world_size)
        # Beside the training's own, which wait meanwhile.
        workers = min(recipe.data.loading_workers, _EVALUATION_WORKERS)
        beat = self.watchdog.beat
        found = evaluate_vqgan(state.tokenizer, held_out, per_process, device, workers, beat)
        if self.processes.is_first:
            total = len(held_out)  # type: ignore[arg-type]
            spread = range(0, total, max(1, total // _SHOWN_RECONSTRUCTIONS))
            shown = held_out_frames(
                state.tokenizer, held_out, spread[:_SHOWN_RECONSTRUCTIONS], device
            )
            self.monitor.images("reconstructions", step, comparison(state.tokenizer, shown))
        figures = {f"eval/{name.removesuffix('_db')}": v for name, v in found.figures().items()}
        del figures["eval/frames"]
        self.monitor.scalars(step, figures)
        self._say(_evaluation_line(step, found))
        return found

    def _say(self, line: str) -> None:
        if self.processes.is_first:
            print(line, flush=True)


def _start(recipe: VqganRecipe) -> Vqgan | None:
    """The trained VQ-GAN that a new run begins with."""
    if recipe.start is None or _checkpoints(recipe).all():
        return None
    start = load_vqgan(recipe.start)
    # Its networks take pictures of any size.
    theirs, ours = (c.model_dump(exclude={"image_size"}) for c in (start.config, recipe.model))
    for field, value in theirs.items():
        if ours[field] != value:
            raise UserError(
                f"{recipe.section}.start: {recipe.start} was trained with "
                f"{recipe.section}.model.{field} = {value}, but the recipe says {ours[field]}; "
                f"set it to {value}"
            )
    return start


def _resume(state: VqganStep) -> int:
    """Take up the newest whole checkpoint; returns its step, 0 without any."""
    processes, section = state.processes, state.recipe.section
    checkpoints = _checkpoints(state.recipe)

    def find() -> Path | None:
        # Reading all files once is enough.
        return find_checkpoint(checkpoints, section) if processes.is_first else None

    mine = processes.first_then_all(find)
    found = processes.first_tells(lambda: mine)
    return 0 if found is None else processes.first_then_all(lambda: load_checkpoint(found, state))


def _checkpoints(recipe: VqganRecipe) -> Checkpoints:
    return Checkpoints(recipe.run / "checkpoints", recipe.keep_checkpoints)


def _announce(state: VqganStep, step: int, frames: Dataset[Sample]) -> None:
    model, recipe = state.model.config, state.recipe
    if state.processes.is_first:
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
        print(
            f"VQ-GAN of {parameters / 1e6:.1f} M parameters: {model.image_size}² pixels to "
            f"{model.grid_side}² tokens, {model.codebook_size} codes\n"
            f"{len(frames)} frames or items; steps {step} to {recipe.steps} on "  # type: ignore[arg-type]
            f"{state.processes.world_size} processes",
            flush=True,
        )


def _save(state: VqganStep, step: int, must: bool) -> None:
    """Save on the first process; a failure is told, and ends all where the state `must` be kept."""
    checkpoints = _checkpoints(state.recipe)
    failure = None
    if state.processes.is_first:
        try:
            save_checkpoint(checkpoints, step, state)
        except OSError as error:
            failure = f"step {step} could not be saved in {checkpoints.folder} ({error})"
    if must:
        failure = failure and f"{failure}; make room there and start the run again"
        state.processes.raise_first(failure)
    elif failure:
        print(
            f"warning: {failure}; training goes on, and the checkpoints before it are untouched",
            flush=True,
        )


def _line(step: int, steps: int, figures: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {figures.get('train/loss', math.nan):.4f}  "
        f"reconstruction {figures.get('train/loss/reconstruction', math.nan):.4f}  "
        f"codes used {figures['codebook/used_fraction']:.0%}  "
        f"{figures['speed/images_per_second']:.1f} images/s"
    )


def _evaluation_line(step: int, found: VqganEvaluation) -> str:
    forms = {
        "psnr_db": "PSNR {:.2f} dB",
        "ssim": "SSIM {:.4f}",
        "pixel_accuracy": "pixel accuracy {:.2%}",
        "fwiou": "FWIoU {:.2%}",
    }
    quality = ", ".join(forms[name].format(value) for name, value in found.quality.items())
    return (
        f"step {step}  held out: {quality}, codes used {found.used_fraction:.0%}, perplexity "
        f"{found.perplexity:.0f}, {found.frames} frames"
        + (f", {found.broken} of them in place of broken ones" if found.broken else "")
    )
