"""A VQ-GAN's checkpoints: averaged weights, manifests, and what is done about damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vqgan_runs import logged, train_here, write_recipe

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.quantizer import VectorQuantizer
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, load_vqgan
from megatron_nuwa.training.checkpoint import check
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.vqgan_average import WeightAverage
from megatron_nuwa.training.vqgan_recipe import CodebookUpkeep

STEPS: dict[str, Any] = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures and their manifests."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    items = []
    for number in range(8):
        shades = random.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(shades).resize((40, 40)).save(folder / f"{number}.png")
        items.append({"id": str(number), "media": f"{number}.png", "captions": ["colours"]})
    for name, rows in (("train", items[2:]), ("held", items[:2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 3, 6 and 9, and its recipe beside it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        loss = {"discriminator_start": 4, "perceptual_weight": 0.0}
        codebook = {"start_step": 2, "kmeans_vectors": 64}
        recipe = write_recipe(folder, pictures, loss=loss, codebook=codebook, **STEPS)
        train_here(patch, recipe)
    return folder


def copied(run: Path, to: Path) -> tuple[Path, str]:
    """A copy of the run to be damaged, and the override that names it."""
    shutil.copytree(run / "run", to / "run")
    return to / "run", f"vqgan.run={to / 'run'}"


def test_checkpoints_are_whole_and_hold_trained_weights_beside_their_average(run: Path) -> None:
    folders = sorted((run / "run/checkpoints").glob("step_*"))
    assert [folder.name for folder in folders] == [f"step_0000000{step}" for step in (3, 6, 9)]
    for folder in folders:
        check(folder)
    tokenizer = load_vqgan(folders[-1]).state_dict()
    trained = load_file(folders[-1] / "weights.safetensors")
    assert tokenizer.keys() == trained.keys()
    assert not torch.equal(tokenizer["decoder.conv_out.bias"], trained["decoder.conv_out.bias"])
    written = load_vqgan(run / "run").state_dict()
    assert all(torch.equal(written[name], value) for name, value in tokenizer.items())
    evaluation = json.loads((run / "run/evaluation.json").read_text())
    assert evaluation["ssim"] == logged(run / "run", "eval/ssim")[-1]


@pytest.mark.parametrize("file", ["trainer.pt", "weights.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_nothing_is_lost(
    file: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    copy, override = copied(run, tmp_path)
    damaged = copy / "checkpoints/step_00000009" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    train_here(monkeypatch, run / "recipe.yaml", override)
    shown = capfd.readouterr().out
    assert f"{file} " in shown
    assert "using the one before" in shown
    assert "steps 6 to 9" in shown
    before, after = (load_vqgan(folder).state_dict() for folder in (run / "run", copy))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_nothing_is_trained_where_all_checkpoints_are_damaged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, override = copied(run, tmp_path)
    for trainer in copy.glob("checkpoints/*/trainer.pt"):
        trainer.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"trainer\.pt was changed or cut short\), and .* no other"):
        train_here(monkeypatch, run / "recipe.yaml", override)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("vqgan.loss.adversarial_weight=0", "was trained with a discriminator"),
        ("vqgan.loss.discriminator_channels=16", "with another discriminator or optimizer"),
    ],
)
def test_another_recipe_s_checkpoint_is_refused(
    change: str, sentence: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=sentence):
        train_here(monkeypatch, run / "recipe.yaml", change)


def test_averaging_may_begin_and_end_with_a_resume(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, override = copied(run, tmp_path)
    trained = load_file(copy / "checkpoints/step_00000009/weights.safetensors")
    shutil.rmtree(copy / "checkpoints/step_00000006")
    tiny = "vqgan.optimizer.learning_rate=1e-12"
    changes = (override, tiny, "vqgan.codebook.restart_every=0")
    train_here(monkeypatch, run / "recipe.yaml", *changes, "vqgan.steps=10", "vqgan.ema_decay=null")
    found = load_vqgan(copy).state_dict()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    train_here(monkeypatch, run / "recipe.yaml", *changes, "vqgan.steps=11", "vqgan.ema_decay=0.9")
    found = load_vqgan(copy).state_dict()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert (copy / "checkpoints/step_00000011/weights.safetensors").is_file()


def test_a_full_disk_costs_a_checkpoint_and_the_last_one_ends_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from megatron_nuwa.training import vqgan_trainer

    def fails(checkpoints: object, step: int, state: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vqgan_trainer, "save_checkpoint", fails)
    other = f"vqgan.run={tmp_path / 'run'}"
    with pytest.raises(UserError, match=r"step 9 could not be saved in .*make room there"):
        train_here(monkeypatch, run / "recipe.yaml", other)
    shown = capfd.readouterr().out
    assert "warning: step 3 could not be saved" in shown
    assert "training goes on" in shown


def test_bf16_leaves_weights_averages_and_moments_in_fp32(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (f"vqgan.run={tmp_path / 'run'}", "vqgan.precision=bf16", "vqgan.steps=6")
    train_here(monkeypatch, run / "recipe.yaml", *changes)
    folder = tmp_path / "run/checkpoints/step_00000006"
    for file in ("vqgan", "weights", "discriminator"):
        kinds = {value.dtype for value in load_file(folder / f"{file}.safetensors").values()}
        assert kinds == {torch.float32}
    moments = torch.load(folder / "trainer.pt", weights_only=True)["optimizer"]["state"]
    assert {value.dtype for each in moments.values() for value in each.values()} == {torch.float32}
    # It did compute in bf16: the same steps in fp32 end elsewhere, though not far away.
    straight = load_file(run / "run/checkpoints/step_00000006/weights.safetensors")
    mixed = load_file(folder / "weights.safetensors")
    name = "encoder.conv_in.weight"
    assert not torch.equal(straight[name], mixed[name])


def test_the_average_is_the_exponential_one_with_a_short_memory_at_first() -> None:
    config = VqganConfig(
        image_size=8, downsampling=8, base_channels=8, residual_blocks=1, codebook_size=4
    )
    model = Vqgan(config)
    average = WeightAverage(model, 0.5)
    expected = model.decoder.conv_out.bias.detach().double()
    for update in range(20):
        with torch.no_grad():
            model.decoder.conv_out.bias += torch.randn(3)
        average.update()
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.decoder.conv_out.bias.detach()
    found = average.model.decoder.conv_out.bias.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    average.begin()
    assert torch.equal(average.model.decoder.conv_out.bias, model.decoder.conv_out.bias)


def test_codes_that_move_move_in_the_average_too() -> None:
    with join_processes():
        trained, average = VectorQuantizer(6, 3), VectorQuantizer(6, 3)
        settings = CodebookUpkeep(restart_every=1, restart_below=0.5, usage_decay=0.1)
        keeper = CodebookKeeper(trained, settings, seed=0, average=average)
        before = average.table.detach().clone()
        keeper.count(torch.tensor([0, 1, 2, 0, 1, 2]))
        assert float(keeper.dead_fraction()) == 0.5
        keeper.restart_dead(0, torch.randn(10, 3))
        assert torch.equal(average.table[3:], trained.table[3:])
        assert torch.equal(average.table[:3], before[:3])
