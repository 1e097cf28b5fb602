"""Training a VQ-GAN from a recipe: the loop, its log, its evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_nuwa.config import Settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan, save_vqgan
from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.frames import (
    Batch,
    CachedFrames,
    CacheReport,
    DecodedFrames,
    MediaFrames,
    Sample,
    batches,
    cache_frames,
)
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.progress import track
from megatron_nuwa.training.run_folder import prepare_run_folder
from megatron_nuwa.training.stopping import StopRequested, StopSignals, raise_if_stopped
from megatron_nuwa.training.vqgan_checkpoint import load_checkpoint, save_checkpoint
from megatron_nuwa.training.vqgan_evaluation import (
    VqganEvaluation,
    comparison,
    evaluate_vqgan,
    held_out_images,
)
from megatron_nuwa.training.vqgan_recipe import VqganRecipe
from megatron_nuwa.training.vqgan_step import VqganStep

_SHOWN_RECONSTRUCTIONS = 8
# Batches for the k-means start come from another shuffle than the training's.
_KMEANS_SEED = 1_000_003


def train_vqgan(
    recipe: VqganRecipe,
    whole_recipe: Settings,
    seed: int,
    processes: Processes,
    train: MediaFrames,
    held_out: MediaFrames | None,
) -> VqganEvaluation | None:
    """Train from the run's newest checkpoint to its last step; returns the final evaluation.

    None without held-out frames, and where SIGTERM or SIGUSR1 ended the training early.

    Leaves `RUN/vqgan.safetensors` and, with held-out frames, `RUN/evaluation.json`. Raises
    `UserError` for settings that do not fit, media that cannot be decoded, a foreign run folder.
    """
    if recipe.batch_size % processes.world_size:
        raise UserError(
            f"vqgan.batch_size {recipe.batch_size} must be a multiple of the number of processes, "
            f"{processes.world_size}"
        )
    start = processes.first_then_all(lambda: _start(recipe))
    if processes.is_first:
        prepare_run_folder(recipe.run, whole_recipe)
    processes.barrier()
    frames = _dataset(recipe, train, recipe.run / "frames.npy", processes)
    held = None
    if held_out is not None:
        held = _dataset(recipe, held_out, recipe.run / "held_out_frames.npy", processes)
    state = VqganStep(recipe, seed, processes)
    if start is not None:
        state.model.load_state_dict(start.state_dict())
    step = load_checkpoint(recipe.run, state)
    _announce(state, step, frames)
    samples = step * recipe.batch_size
    with (
        Monitor(recipe.run, enabled=processes.is_first, step=step, samples=samples) as monitor,
        StopSignals(processes) as stop,
    ):
        try:
            evaluation = _run_steps(state, seed, step, frames, held, monitor, stop)
        except StopRequested as request:
            if processes.is_first:
                print(f"{request} received: the last step is saved", flush=True)
            processes.barrier()
            return None
    if processes.is_first:
        if evaluation:
            text = json.dumps(evaluation._asdict(), indent=2)
            write_text_atomically(recipe.run / "evaluation.json", text + "\n")
        save_vqgan(state.model, recipe.run / "vqgan.safetensors")
        print(f"VQ-GAN written to {recipe.run / 'vqgan.safetensors'}", flush=True)
    processes.barrier()
    return evaluation


def _start(recipe: VqganRecipe) -> Vqgan | None:
    """The trained VQ-GAN that a new run begins with."""
    if recipe.start is None or (recipe.run / "checkpoints" / "latest").is_file():
        return None
    start = load_vqgan(recipe.start)
    # Its networks take pictures of any size.
    theirs, ours = (c.model_dump(exclude={"image_size"}) for c in (start.config, recipe.model))
    for field, value in theirs.items():
        if ours[field] != value:
            raise UserError(
                f"vqgan.start: {recipe.start} was trained with vqgan.model.{field} = {value}, but "
                f"the recipe says {ours[field]}; set it to {value}"
            )
    return start


def _run_steps(
    state: VqganStep,
    seed: int,
    step: int,
    frames: Dataset[Sample],
    held_out: Dataset[Sample] | None,
    monitor: Monitor,
    stop: StopSignals,
) -> VqganEvaluation | None:
    """Train from `step` to the end; returns the evaluation at the end.

    Raises `StopRequested`, with the last step saved, after a signal.
    """
    recipe, processes = state.recipe, state.processes
    say = print if processes.is_first else _say_nothing
    window = _Window(recipe.model.codebook_size, processes)
    loader = _training_batches(recipe, seed, processes, frames, step, recipe.steps)
    if processes.is_first:
        loader = track(loader, "training the VQ-GAN", total=recipe.steps, done=step)
    for batch in loader:
        if step == recipe.codebook.start_step and recipe.codebook.kmeans:
            say(f"step {step}: placing {recipe.model.codebook_size} codes by k-means", flush=True)
            state.start_codebook(step, _kmeans_images(recipe, seed, processes, frames))
        figures, counts = state(step, batch.images)
        window.add(figures, counts, batch.broken)
        step += 1
        last = step == recipe.steps
        if step % recipe.log_every == 0 or last:
            means = window.close(recipe.batch_size)
            monitor.scalars(step, step * recipe.batch_size, means)
            say(_line(step, recipe.steps, means), flush=True)
        if held_out and recipe.evaluate_every and step % recipe.evaluate_every == 0 and not last:
            say(_evaluation_line(step, _evaluate(state, held_out, step, monitor)), flush=True)
        signal_number = processes.agree([stop.received])[0]
        due = step % recipe.checkpoint_every == 0 or last or signal_number
        if processes.is_first and due:
            save_checkpoint(recipe.run, step, state, recipe.keep_checkpoints)
        if not last:
            raise_if_stopped(signal_number)
    if held_out is None:
        return None
    evaluation = _evaluate(state, held_out, step, monitor)
    say(_evaluation_line(step, evaluation), flush=True)
    return evaluation


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


def _say_nothing(line: str, flush: bool) -> None:
    """Stands for `print` on all processes but the first."""


class _Window:
    """Figures between two log lines, over all processes."""

    def __init__(self, codebook_size: int, processes: Processes) -> None:
        self._codebook_size = codebook_size
        self._processes = processes
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._times: dict[str, int] = {}
        self._counts = torch.zeros(self._codebook_size, device=self._processes.device)
        self._broken = 0
        self._steps = 0
        self._start = time.monotonic()

    def add(self, figures: dict[str, Tensor], counts: Tensor, broken: int) -> None:
        """Take in one step: its figures, the codes' counts, the broken items passed over."""
        for tag, value in figures.items():
            self._sums[tag] = self._sums.get(tag, torch.zeros(())) + value.float().cpu()
            self._times[tag] = self._times.get(tag, 0) + 1
        self._counts += counts
        self._broken += broken
        self._steps += 1

    def close(self, batch_size: int) -> dict[str, float]:
        """Means since the last call; called by all processes together."""
        tags = sorted(self._sums)
        means = torch.stack([self._sums[tag] / self._times[tag] for tag in tags])
        means = means.to(self._processes.device)
        broken = torch.tensor(float(self._broken), device=self._processes.device)
        dist.all_reduce(means)
        dist.all_reduce(broken)
        figures = dict(zip(tags, (means / self._processes.world_size).tolist(), strict=True))
        figures["codebook/perplexity"] = perplexity(self._counts)
        figures["codebook/used_fraction"] = float((self._counts > 0).double().mean())
        seconds = time.monotonic() - self._start
        figures["speed/images_per_second"] = self._steps * batch_size / seconds
        figures["data/broken_items"] = float(broken)
        self._clear()
        return figures


def _dataset(
    recipe: VqganRecipe, media: MediaFrames, cache: Path, processes: Processes
) -> Dataset[Sample]:
    if not recipe.data.cache_frames:
        return DecodedFrames(media)

    def decode() -> CacheReport:
        return cache_frames(media, cache, f"decoding {media.name}")

    # The others find the first one's frames, or decode their own where no disk is shared.
    report = processes.first_then_all(decode)
    if processes.is_first:
        _tell_cache(report, media, cache)
    return CachedFrames(cache)


def _tell_cache(report: CacheReport, media: MediaFrames, cache: Path) -> None:
    verb = "reusing" if report.reused else "decoded"
    print(f"{media.name}: {verb} {report.frames} frames of {report.items} items in {cache}")
    if report.failures:
        print(
            f"{media.name}: {len(report.failures)} items cannot be decoded and are left out; "
            f"the first: {report.failures[0]}",
            flush=True,
        )


def _training_batches(
    recipe: VqganRecipe,
    seed: int,
    processes: Processes,
    frames: Dataset[Sample],
    first_step: int,
    steps: int,
) -> Iterator[Batch]:
    return batches(
        frames,
        image_size=recipe.model.image_size,
        flip=recipe.data.flip,
        seed=seed,
        batch_size=recipe.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        first_step=first_step,
        steps=steps,
        workers=0 if recipe.data.cache_frames else recipe.data.workers,
    )


def _kmeans_images(
    recipe: VqganRecipe, seed: int, processes: Processes, frames: Dataset[Sample]
) -> Iterator[Tensor]:
    enough = recipe.codebook.kmeans_vectors + recipe.model.codebook_size
    other_seed = seed + _KMEANS_SEED
    for batch in _training_batches(recipe, other_seed, processes, frames, 0, enough):
        yield batch.images


def _evaluate(
    state: VqganStep, held_out: Dataset[Sample], step: int, monitor: Monitor
) -> VqganEvaluation:
    """Reconstruct the held-out frames, log the figures and some pictures."""
    recipe, device = state.recipe, state.processes.device
    per_process = max(1, recipe.batch_size // state.processes.world_size)
    found = evaluate_vqgan(state.model, held_out, per_process, device)
    if state.processes.is_first:
        total = len(held_out)  # type: ignore[arg-type]
        spread = range(0, total, max(1, total // _SHOWN_RECONSTRUCTIONS))[:_SHOWN_RECONSTRUCTIONS]
        shown = held_out_images(state.model, held_out, spread, device)
        monitor.images("reconstructions", step, comparison(state.model, shown))
    monitor.scalars(
        step,
        step * recipe.batch_size,
        {
            "eval/psnr": found.psnr_db,
            "eval/used_fraction": found.used_fraction,
            "eval/perplexity": found.perplexity,
        },
    )
    return found


def _line(step: int, steps: int, figures: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {figures['train/loss/total']:.4f}  "
        f"reconstruction {figures['train/loss/reconstruction']:.4f}  "
        f"codes used {figures['codebook/used_fraction']:.0%}  "
        f"{figures['speed/images_per_second']:.1f} images/s"
    )


def _evaluation_line(step: int, found: VqganEvaluation) -> str:
    return (
        f"step {step}  held out: PSNR {found.psnr_db:.2f} dB, codes used "
        f"{found.used_fraction:.0%}, perplexity {found.perplexity:.0f}, {found.frames} frames"
    )
