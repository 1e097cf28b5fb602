"""Samples of the model in training: TensorBoard and RUN/samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.generation.media import contact_sheet, write_gif, write_png
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.trained import Generator, make_generator
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import Nuwa
from megatron_nuwa.models.vqgan import load_vqgan
from megatron_nuwa.training.drawing import ShowSamples
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.recipe import Recipe
from megatron_nuwa.training.run_folder import BPE_FILE, VQGAN_FILE


def make_sample_shower(recipe: Recipe) -> ShowSamples | None:
    """A function that draws the recipe's prompts; None when the recipe asks for no samples."""
    settings, run = recipe.samples, recipe.run
    if settings is None or run is None:
        return None
    sampling = SamplingSettings(
        settings.temperature, settings.top_k, settings.top_p, settings.guidance
    )

    def show(
        model: Nuwa,
        step: int,
        monitor: Monitor,
        grids: Mapping[str, Grid],
        frames_per_second: Mapping[str, float | None],
    ) -> None:
        device = model.begin.vector.device
        generator = make_generator(
            model,
            load_vqgan(run / VQGAN_FILE).to(device),
            TextTokenizer.load(run / BPE_FILE),
            grids,
            frames_per_second,
        )
        folder = run / "samples"
        folder.mkdir(exist_ok=True)
        was_training = model.training
        model.eval()
        try:
            kinds = {task[-2:] for task in grids}
            for task in ("t2i", "t2v"):
                if task[-2:] in kinds:
                    show_task(generator.for_task(task), task, step, monitor, folder)
        finally:
            # Training goes on with it, whatever happened here.
            model.train(was_training)

    def show_task(
        generator: Generator, name: str, step: int, monitor: Monitor, folder: Path
    ) -> None:
        grid = generator.grids[name]
        seeds = [settings.seed + number for number in range(len(settings.prompts))]
        clips = generator.pixels(generator.generate(settings.prompts, grid, seeds, sampling), grid)
        origin = {"prompts": " | ".join(settings.prompts), "step": step, "seed": settings.seed}
        write_png(folder / f"step_{step:08d}_{name}.png", contact_sheet(clips), origin)
        if grid.s == 1:
            monitor.images(f"samples/{name}", step, clips[:, 0])
            return
        monitor.video(f"samples/{name}", step, clips, generator.frames_per_second)
        for number, clip in enumerate(clips):
            path = folder / f"step_{step:08d}_{name}_{number}.gif"
            write_gif(path, clip, generator.frames_per_second, origin)

    return show
