"""What a pretraining reads: corpora and tokenizers, checked against the model and each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nuwa.data.batches import IMAGE_TASKS, SKETCH_TASKS, TaskBatches, TaskName
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, load_vqgan, save_vqgan
from megatron_nuwa.training.recipe import DataSettings, Recipe
from megatron_nuwa.training.run_folder import (
    BPE_FILE,
    SKETCH_VQGAN_FILE,
    VQGAN_FILE,
    prepare_run_folder,
)


@dataclass(frozen=True)
class Inputs:
    """Open corpora of every task, held-out ones apart, and the tokenizers that wrote them."""

    vqgan: Vqgan
    bpe: TextTokenizer
    train: dict[TaskName, list[Corpus]]
    held_out: dict[TaskName, list[Corpus]]
    # None for a model that reads no sketches.
    sketch_vqgan: Vqgan | None = None


def open_inputs(recipe: Recipe) -> Inputs:
    """Open everything that the recipe names.

    Raises `UserError` for the first thing that does not fit.
    """
    assert recipe.tokenizers is not None
    assert recipe.data is not None
    assert recipe.model is not None
    vqgan = load_vqgan(recipe.tokenizers.vqgan)
    if vqgan.config.classes is not None:
        raise UserError(
            f"tokenizers.vqgan {recipe.tokenizers.vqgan} is a VQ-GAN of sketches; name one of "
            "pictures, and this one in tokenizers.sketch_vqgan"
        )
    bpe = TextTokenizer.load(recipe.tokenizers.bpe)
    if vqgan.config.codebook_size != recipe.model.codebook_size:
        raise UserError(
            f"model.codebook_size is {recipe.model.codebook_size}, but the VQ-GAN "
            f"{recipe.tokenizers.vqgan} has {vqgan.config.codebook_size} codes"
        )
    if bpe.vocabulary_size > recipe.model.text_vocabulary:
        raise UserError(
            f"model.text_vocabulary is {recipe.model.text_vocabulary}, but the BPE "
            f"{recipe.tokenizers.bpe} has {bpe.vocabulary_size} entries"
        )
    sketch_vqgan = _open_sketch_vqgan(recipe, vqgan)
    checker = _CorpusChecker(recipe, fingerprint(vqgan), bpe, sketch_vqgan)
    held_out = recipe.evaluation.corpora if recipe.evaluation else {}
    return Inputs(
        vqgan=vqgan,
        bpe=bpe,
        train={
            task: checker.open_all(task, settings.corpora)
            for task, settings in recipe.data.tasks.items()
        },
        held_out={task: checker.open_all(task, paths) for task, paths in held_out.items()},
        sketch_vqgan=sketch_vqgan,
    )


def _open_sketch_vqgan(recipe: Recipe, vqgan: Vqgan) -> Vqgan | None:
    """VQ-GAN-Seg, held against the model and the VQ-GAN of pictures; None without sketches."""
    assert recipe.tokenizers is not None
    assert recipe.data is not None
    assert recipe.model is not None
    model, path = recipe.model, recipe.tokenizers.sketch_vqgan
    held_out = recipe.evaluation.corpora if recipe.evaluation else {}
    for task in (*recipe.data.tasks, *held_out):
        if task in SKETCH_TASKS and model.sketch_codebook_size is None:
            raise UserError(
                f"task {task} reads sketches, but model.sketch_codebook_size is null; set it and "
                "tokenizers.sketch_vqgan, or leave the task out"
            )
    if path is None:
        if model.sketch_codebook_size is None:
            return None
        raise UserError(
            f"model.sketch_codebook_size is {model.sketch_codebook_size}, but the recipe names no "
            "tokenizers.sketch_vqgan; name the VQ-GAN-Seg that wrote the corpora's sketches"
        )
    sketch_vqgan = load_vqgan(path)
    config = sketch_vqgan.config
    if config.classes is None:
        raise UserError(
            f"tokenizers.sketch_vqgan {path} is a VQ-GAN of pictures; name a VQ-GAN-Seg, trained "
            "with vqgan.model.classes"
        )
    if config.codebook_size != model.sketch_codebook_size:
        raise UserError(
            f"model.sketch_codebook_size is {model.sketch_codebook_size or 'null'}, but the "
            f"VQ-GAN-Seg {path} has {config.codebook_size} codes"
        )
    if model.visual_embedding == "codebook" and config.code_dim != model.sketch_code_dim:
        raise UserError(
            f"model.sketch_code_dim is {model.sketch_code_dim}, but the codes of the VQ-GAN-Seg "
            f"{path} have {config.code_dim} numbers"
        )
    if config.grid_side != vqgan.grid_side:
        raise UserError(
            f"the VQ-GAN-Seg {path} has grids of {config.grid_side}² tokens, but the VQ-GAN "
            f"{recipe.tokenizers.vqgan} has {vqgan.grid_side}²; they must have the same"
        )
    return sketch_vqgan


def task_batches(recipe: Recipe, inputs: Inputs) -> dict[TaskName, TaskBatches]:
    """The batches of all tasks that the recipe trains."""
    data = recipe.data
    assert data is not None
    return {
        task: TaskBatches(
            task,
            inputs.train[task],
            inputs.bpe,
            seed=recipe.seed,
            batch_size=settings.batch_size,
            caption_dropout=data.caption_dropout,
            corpus_weights=settings.corpus_weights,
            micro_batch_tokens=data.micro_batch_tokens,
            accumulation=data.accumulation,
            shuffle_window=data.shuffle_window,
            read_ahead=data.read_ahead,
        )
        for task, settings in data.tasks.items()
    }


def write_run_folder(run: Path, recipe: Recipe, inputs: Inputs) -> None:
    """Everything that generation needs later lies in the run, whatever becomes of the originals."""
    prepare_run_folder(run, recipe)
    (run / VQGAN_FILE).parent.mkdir(exist_ok=True)
    save_vqgan(inputs.vqgan, run / VQGAN_FILE)
    if inputs.sketch_vqgan is not None:
        save_vqgan(inputs.sketch_vqgan, run / SKETCH_VQGAN_FILE)
    inputs.bpe.save(run / BPE_FILE)


def check_batches(data: DataSettings, replicas: int) -> None:
    """Raise `UserError` where a task's batch has no equal shares for all replicas."""
    parts = replicas * data.accumulation
    divisor = f"{replicas} data-parallel replicas"
    if data.accumulation > 1:
        divisor += f" × {data.accumulation} accumulation"
    for task, settings in data.tasks.items():
        if settings.batch_size % parts:
            lower = settings.batch_size // parts * parts
            nearest = [str(size) for size in (lower, lower + parts) if size]
            raise UserError(
                f"data.tasks.{task}.batch_size {settings.batch_size} does not divide by "
                f"{divisor}; use {' or '.join(nearest)}"
            )


class _CorpusChecker:
    def __init__(
        self,
        recipe: Recipe,
        vqgan_fingerprint: str,
        bpe: TextTokenizer,
        sketch_vqgan: Vqgan | None,
    ) -> None:
        assert recipe.tokenizers is not None
        assert recipe.model is not None
        self._model: NuwaConfig = recipe.model
        self._expected = {
            "vqgan": (vqgan_fingerprint, "VQ-GAN", recipe.tokenizers.vqgan),
            "bpe": (bpe.fingerprint, "BPE", recipe.tokenizers.bpe),
        }
        self._sketch: dict[str, tuple[str, str, Path | None]] = {}
        if sketch_vqgan is not None:
            path = recipe.tokenizers.sketch_vqgan
            self._sketch["sketch"] = (fingerprint(sketch_vqgan), "VQ-GAN-Seg", path)

    def open_all(self, task: TaskName, paths: Sequence[str]) -> list[Corpus]:
        corpora = [self._open(task, path) for path in paths]
        first = corpora[0]
        for corpus in corpora:
            if corpus.grid != first.grid:
                raise UserError(
                    f"task {task}: corpus {corpus.address} has grid {tuple(corpus.grid)}, but "
                    f"{first.address} has {tuple(first.grid)}; corpora of one task must share a "
                    "grid"
                )
        return corpora

    def _open(self, task: TaskName, path: str) -> Corpus:
        corpus = Corpus(path)
        name = corpus.address
        if corpus.manifest.codebook_size != self._model.codebook_size:
            raise UserError(
                f"corpus {name} was written with a codebook of {corpus.manifest.codebook_size}, "
                f"but model.codebook_size is {self._model.codebook_size}"
            )
        if task in SKETCH_TASKS and not corpus.has_sketches:
            raise UserError(
                f"task {task} reads sketches, and corpus {name} has none; tokenize it with "
                "--sketch-vqgan"
            )
        expected = self._expected | (self._sketch if task in SKETCH_TASKS else {})
        for kind, (value, tokenizer, source) in expected.items():
            if getattr(corpus.manifest.fingerprints, kind) != value:
                field = "sketch_vqgan" if kind == "sketch" else kind
                raise UserError(
                    f"corpus {name} was written with another {tokenizer} than {source}; tokenize "
                    f"it again, or name the {tokenizer} that wrote it in tokenizers.{field}"
                )
        grid, largest = corpus.grid, self._model.position_grid
        if any(side > most for side, most in zip(grid, largest, strict=True)):
            raise UserError(
                f"corpus {name} has grid {tuple(grid)}, larger than model.position_grid "
                f"{tuple(largest)}; set that to {list(grid)}, or tokenize with "
                f"--frames {largest[2]} or fewer"
            )
        if (grid.s == 1) != (task in IMAGE_TASKS):
            raise UserError(
                f"task {task} needs {'clips' if grid.s == 1 else 'images'}, but corpus {name} "
                f"holds grids of {grid.s} frame{'s' if grid.s > 1 else ''}"
            )
        if len(corpus) == 0:
            raise UserError(f"corpus {name} holds no items; tokenize a source into it first")
        return corpus
