"""Runs that begin with trained weights: other corpora, tasks and grids, some weights frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import ROOT, SmallWorld, lone_process, make_corpus
from safetensors.torch import load_file

from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, load_vqgan, save_vqgan
from megatron_nuwa.training.fine_tuning import resized
from megatron_nuwa.training.pretrain import Pretraining, pretrain
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.trained_model import export, open_trained


@pytest.fixture(scope="module")
def trained(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(small_world, run, "training.stop_at_step=3")
    return run


@pytest.fixture(scope="module")
def large_clips(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 6×6×5 tokens."""
    bpe, vqgan = TextTokenizer.load(small_world.bpe), load_vqgan(small_world.vqgan)
    return make_corpus(tmp_path_factory.mktemp("large") / "clips", (6, 6, 5), 8, bpe, vqgan)


def train(world: SmallWorld, run: Path, *overrides: str, layout: str = "zero1_fp32") -> None:
    recipe = load_recipe(world.recipe, [f"run={run}", *overrides])
    pretrain(recipe, ROOT / f"ds_configs/{layout}.json", lone_process())


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:08d}/model.safetensors")


def starting_weights(
    world: SmallWorld, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> dict[str, torch.Tensor]:
    """What a run would begin with."""
    found: list[dict[str, torch.Tensor]] = []

    def note(training: Pretraining, _show: object) -> None:
        found.append(training.engine.whole_weights())

    monkeypatch.setattr(Pretraining, "run", note)
    train(world, run, *overrides)
    return found[0]


def test_a_new_run_begins_with_the_weights_of_a_run_or_of_its_exported_file(
    small_world: SmallWorld,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "trained.safetensors"
    export(open_trained(trained, "RUN"), file, torch.float32)
    expected = weights_of(trained, 3)
    for source in (trained, file):
        run = tmp_path / f"from_{source.name}"
        start = starting_weights(small_world, run, monkeypatch, f"start.weights={source}", "seed=9")
        assert start.keys() == expected.keys()
        assert all(start[name].equal(value) for name, value in expected.items())
    assert "starting from 82 weights of" in capsys.readouterr().out


def test_other_corpora_tasks_and_grids_keep_the_weights_and_interpolate_positions(
    small_world: SmallWorld,
    trained: Path,
    large_clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = (
        f"start.weights={trained}",
        "model.position_grid=[6, 6, 5]",
        f"data.tasks={{t2v: {{corpora: [{large_clips}], batch_size: 2}}}}",
        f"evaluation.corpora={{t2v: [{large_clips}]}}",
    )
    with monkeypatch.context() as patch:
        start = starting_weights(small_world, tmp_path / "look", patch, *changes)
    before = weights_of(trained, 3)
    for name, value in before.items():
        if name.startswith(("context_positions", "target_positions")):
            assert len(start[name]) == (5 if name.endswith("frames") else 6)
            torch.testing.assert_close(start[name], resized(value, len(start[name])))
        else:
            assert start[name].equal(value), name
    train(small_world, tmp_path / "run", *changes, "training.stop_at_step=2")
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()


def test_positions_are_interpolated_between_the_middles_of_cells() -> None:
    line = torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [3.0, 40.0]])
    assert resized(line, 4).equal(line)
    assert resized(line, 2).tolist() == [[0.5, 15.0], [2.5, 35.0]]
    assert resized(line, 8)[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert resized(line[:1], 3).tolist() == [[0.0, 10.0]] * 3


@pytest.mark.parametrize("layout", ["zero1_fp32", "zero3_bf16"])
def test_frozen_weights_stay_bit_for_bit_and_the_others_learn(
    small_world: SmallWorld, trained: Path, tmp_path: Path, layout: str
) -> None:
    changes = (
        f"start.weights={trained}",
        "optimizer.frozen=[text_*, encoder.*, decoder.0.*.bias, visual_embedding.codes.weight]",
    )
    run = tmp_path / "run"
    for stop in (2, 3):
        train(small_world, run, *changes, f"training.stop_at_step={stop}", layout=layout)
    before, after = weights_of(trained, 3), weights_of(run, 3)
    changed = {name for name in after if not after[name].equal(before[name].to(after[name].dtype))}
    frozen = {
        name
        for name in after
        if name.startswith(("text_", "encoder.")) or name == "visual_embedding.codes.weight"
    }
    frozen |= {n for n in after if n.startswith("decoder.0.") and n.endswith(".bias")}
    assert len(frozen) > 25
    assert changed.isdisjoint(frozen)
    assert "decoder.0.self_attention.query.weight" in changed
    assert "head.weight" in changed
    with pytest.raises(UserError, match=r"optimizer\.frozen = \['text_\*'"):
        train(small_world, run, f"start.weights={trained}", layout=layout)


def test_the_checkpoint_of_a_run_wins_over_the_weights_that_it_began_with(
    small_world: SmallWorld, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(small_world, run, f"start.weights={trained}", "training.stop_at_step=2")
    train(small_world, run, f"start.weights={tmp_path / 'gone'}", "training.stop_at_step=4")
    train(small_world, tmp_path / "whole", f"start.weights={trained}", "training.stop_at_step=4")
    one, other = weights_of(run, 4), weights_of(tmp_path / "whole", 4)
    assert all(one[name].equal(other[name]) for name in one)


def test_another_codebook_needs_fresh_tables(
    small_world: SmallWorld, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    vqgan = Vqgan(load_vqgan(small_world.vqgan).config)
    save_vqgan(vqgan, tmp_path / "vqgan.safetensors")
    bpe = train_bpe(["other words for other pictures"] * 3, 520)
    bpe.save(tmp_path / "bpe.json")
    clips = make_corpus(tmp_path / "clips", (4, 4, 3), 6, bpe, vqgan)
    changes = [
        f"start.weights={trained}",
        f"tokenizers={{vqgan: {tmp_path / 'vqgan.safetensors'}, bpe: {tmp_path / 'bpe.json'}}}",
        f"data.tasks={{t2v: {{corpora: [{clips}], batch_size: 2}}}}",
        f"evaluation.corpora={{t2v: [{clips}]}}",
    ]
    run = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(small_world, run, *changes)
    assert "another VQ-GAN than tokenizers.vqgan" in str(caught.value)
    fresh = "visual_embedding.codes.weight, head.weight"
    assert f"start.fresh=[{fresh}]" in str(caught.value)
    with pytest.raises(UserError, match=r"another BPE than tokenizers\.bpe"):
        train(small_world, run, *changes, f"start.fresh=[{fresh}]")
    assert not run.exists()
    fresh = f"start.fresh=[{fresh}, text_embedding.weight]"
    start = starting_weights(small_world, run, monkeypatch, *changes, fresh)
    assert start["visual_embedding.codes.weight"].equal(vqgan.codebook())
    before = weights_of(trained, 3)
    for name in ("decoder.0.feed_forward.expand.weight", "visual_embedding.projection.weight"):
        assert start[name].equal(before[name])
    assert not start["text_embedding.weight"].equal(before["text_embedding.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("start.weights=nowhere",), "start.weights: nowhere is no pretraining run"),
        (("model.heads=4",), "trained with model.heads = 2, but the recipe says 4; set it to 2"),
        (("model.width=64",), "trained with model.width = 32, but the recipe says 64"),
        (("model.tie_head=true",), "trained with model.tie_head = False"),
        (("model.text_vocabulary=600",), "text_embedding.weight is (540, 32) in"),
        (("start.fresh=[haed.weight]",), "'haed.weight' fits no weight; the nearest is 'head."),
        (("optimizer.frozen=[encodr.*]",), "optimizer.frozen: 'encodr.*' fits no weight"),
        (("optimizer.frozen=['*']",), "optimizer.frozen leaves nothing to train in the model"),
        (("start.wieghts=x",), "unknown key 'start.wieghts'; did you mean 'weights'?"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_fit_is_one_sentence(
    small_world: SmallWorld,
    trained: Path,
    tmp_path: Path,
    changes: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(UserError) as caught:
        train(small_world, tmp_path / "run", f"start.weights={trained}", *changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
