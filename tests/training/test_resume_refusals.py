"""A run that is started again with another recipe: what differs is named, and nothing changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld, lone_process, make_corpus

from megatron_nuwa.data.text import TextTokenizer
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sha256_of
from megatron_nuwa.models.vqgan import load_vqgan, save_vqgan
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe


@pytest.fixture(scope="module")
def run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has one checkpoint."""
    run = tmp_path_factory.mktemp("refused") / "run"
    start(small_world, run)
    return run


@pytest.fixture(scope="module")
def others(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Another codebook with its corpus, and a corpus of the run's tokenizers with other items."""
    folder = tmp_path_factory.mktemp("others")
    bpe, vqgan = TextTokenizer.load(small_world.bpe), load_vqgan(small_world.vqgan)
    paths = {"ITEMS": make_corpus(folder / "items", (4, 4, 3), 9, bpe, vqgan)}
    for weight in vqgan.parameters():
        weight.data.mul_(1.1)
    paths["VQGAN"] = folder / "vqgan.safetensors"
    save_vqgan(vqgan, paths["VQGAN"])
    paths["CLIPS"] = make_corpus(folder / "clips", (4, 4, 3), 10, bpe, vqgan)
    return paths


def start(world: SmallWorld, run: Path, *overrides: str, layout: str = "zero1_fp32") -> None:
    recipe = load_recipe(world.recipe, [f"run={run}", "training.stop_at_step=1", *overrides])
    pretrain(recipe, ROOT / f"ds_configs/{layout}.json", lone_process())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.decoder_layers=3",), "model.decoder_layers = 2, but now it is 3; set it back"),
        (
            ("model.video_extent=[1,1,1]",),
            "model.video_extent = [3, 3, 3], but now it is [1, 1, 1]",
        ),
        (("model.codebook_size=33",), "model.codebook_size is 33, but the VQ-GAN"),
        (
            ("data.tasks.t2v.corpora=[ITEMS]",),
            "data.tasks.t2v.corpora that held other items than the recipe's do now; name those",
        ),
        (
            (
                "tokenizers.vqgan=VQGAN",
                "data.tasks={t2v: {corpora: [CLIPS], batch_size: 2}}",
                "evaluation.corpora={t2v: [CLIPS]}",
            ),
            "another tokenizers.vqgan than the recipe's; name that one",
        ),
        (("data.tasks.t2v.batch_size=4",), "data.tasks.t2v.batch_size = 2, but now it is 4"),
        (("data.tasks.t2v.weight=2",), "data.tasks.t2v.weight = 1.0, but now it is 2.0"),
        (("optimizer.betas=[0.5, 0.9]",), "optimizer.betas = [0.9, 0.999]"),
        (("seed=4",), "seed = 3, but now it is 4"),
        # What decides which samples a step has, and what is read of them.
        (("data.shuffle_window=1",), "data.shuffle_window = None, but now it is 1"),
        (("data.caption_dropout=0.5",), "data.caption_dropout = 0."),
        (("data.tasks.t2v.corpus_weights=[1]",), "corpus_weights = None, but now it is [1.0]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_difference_is_named_with_what_to_do_and_nothing_is_overwritten(
    small_world: SmallWorld,
    run: Path,
    others: dict[str, Path],
    changes: tuple[str, ...],
    message: str,
) -> None:
    before = {path: sha256_of(path) for path in run.rglob("*") if path.is_file()}
    for name, path in others.items():
        changes = tuple(change.replace(name, str(path)) for change in changes)
    with pytest.raises(UserError) as caught:
        start(small_world, run, *changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "was trained with" in str(caught.value):
        assert f"run=FOLDER start.weights={run}" in str(caught.value)
    assert {path: sha256_of(path) for path in run.rglob("*") if path.is_file()} == before


def test_a_task_less_and_another_precision_are_differences_too(
    small_world: SmallWorld, run: Path
) -> None:
    tasks = f"{{t2v: {{corpora: [{small_world.clips}], batch_size: 2}}}}"
    with pytest.raises(UserError, match=r"data\.tasks\.t2i, which the recipe leaves out; add it"):
        start(small_world, run, f"data.tasks={tasks}")
    with pytest.raises(UserError, match="precision = fp32, but now it is bf16"):
        start(small_world, run, layout="zero1_bf16")


def test_how_batches_are_cut_and_a_moved_corpus_are_none(
    small_world: SmallWorld, run: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(small_world.clips, tmp_path / "moved")
    copy = shutil.copytree(run, tmp_path / "run")
    changes = (f"data.tasks.v2v.corpora=[{moved}]", "data.accumulation=2")
    start(small_world, copy, *changes, "training.stop_at_step=2")
    assert (copy / "checkpoints/step_00000002").is_dir()
