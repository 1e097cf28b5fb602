"""Training a VQ-GAN on real files with real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers import ROOT, deepspeed_command, run_command_line
from PIL import Image
from ranks import Ranks
from vqgan_runs import COMMAND, logged, train_here, write_recipe

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.quantizer import VectorQuantizer
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, load_vqgan
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper, perplexity
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.vqgan_recipe import CodebookUpkeep, VqganOptimizer
from megatron_nuwa.training.vqgan_step import learning_rate_factor

# Trains like the command, then writes down what this process ended with.
WITNESS = """
import json, os, sys
from pathlib import Path
from megatron_nuwa.models.vqgan import fingerprint
from megatron_nuwa.training import vqgan_trainer
states = []
class Witnessed(vqgan_trainer.VqganStep):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        states.append(self)
vqgan_trainer.VqganStep = Witnessed
from launch.train_vqgan import main
folder = Path(sys.argv.pop())
main()
(state,) = states
ended = {
    "model": fingerprint(state.tokenizer),
    "codebook": state.model.codebook().tolist(),
    "usage": state.keeper.usage.tolist(),
    "discriminator": [p.sum().item() for p in state.discriminator.parameters()],
}
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures, two clips and two broken files, with their manifests."""
    folder = tmp_path_factory.mktemp("media")
    random = np.random.default_rng(0)
    items = []
    for number in range(20):
        # Shades of one colour, so that a few steps learn something on every batch.
        shades = random.integers(0, 100, (4, 4, 3)) + np.array([150, 60, 0])
        small = Image.fromarray(shades.astype(np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        items.append({"id": str(number), "media": f"{number}.png", "captions": ["colours"]})
    for pattern in ("testsrc", "mandelbrot"):
        subprocess.run(
            [
                *(ffmpeg_program(), "-v", "error", "-f", "lavfi"),
                *("-i", f"{pattern}=size=64x48:rate=8", "-t", "1", folder / f"{pattern}.mp4"),
            ],
            check=True,
        )
        items.append({"id": pattern, "media": f"{pattern}.mp4", "captions": ["a pattern"]})
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    broken = [
        {"id": "broken", "media": "broken.png", "captions": ["half a picture"]},
        {"id": "absent", "media": "absent.mp4", "captions": ["nothing"]},
    ]
    for name, rows in [("train", items[2:] + broken), ("held", items[:2]), ("bad", broken)]:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def straight_run(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 32 steps on two processes under the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("straight")
    witness = folder / "witness.py"
    witness.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WITNESS}")
    done = run_command_line(*deepspeed_command(2, witness, write_recipe(folder, media), folder))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output.txt").write_text(done.stdout)
    return folder


def test_two_processes_lower_the_loss_and_stay_equal(straight_run: Path) -> None:
    reconstruction = logged(straight_run / "run", "train/loss/reconstruction")
    assert len(reconstruction) == 32
    assert max(reconstruction[-4:]) < 0.7 * reconstruction[0]
    first, second = (json.loads((straight_run / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert fingerprint(load_vqgan(straight_run / "run")) == first["model"]


def test_every_term_of_the_loss_is_logged_and_the_discriminator_starts_late(
    straight_run: Path,
) -> None:
    run = straight_run / "run"
    for term in ("", "/reconstruction", "/perceptual", "/codebook", "/commitment"):
        assert len(logged(run, f"train/loss{term}")) == 32
    for tag in ("train/loss/generator", "train/loss/discriminator", "train/adaptive_weight"):
        assert len(logged(run, tag)) == 12
    assert all(weight > 0 for weight in logged(run, "train/adaptive_weight"))
    assert logged(run, "train/lr")[:3] == pytest.approx([0.002, 0.004, 0.004])
    assert len(logged(run, "codebook/restarted")) == 22
    assert all(0 < share <= 1 for share in logged(run, "codebook/used_fraction"))


def test_run_folder_is_complete_and_tells_what_was_left_out(straight_run: Path) -> None:
    run = straight_run / "run"
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "environment.json", "vqgan.safetensors", "evaluation.json"} <= names
    assert {"frames.npy", "held_out_frames.npy", "tensorboard"} <= names
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {"step_00000024", "step_00000032", "latest"}
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["frames"] == 2
    assert evaluation["psnr_db"] == logged(run, "eval/psnr")[-1]
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["eval/used_fraction"] == evaluation["used_fraction"]
    output = (straight_run / "output.txt").read_text()
    assert "2 items cannot be decoded and are left out" in output
    assert "decoded 34 frames of 22 items" in output


def test_stopped_run_resumes_bit_for_bit(straight_run: Path, media: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, media)
    for steps in (22, 32):
        done = run_command_line(*deepspeed_command(2, COMMAND, recipe, f"vqgan.steps={steps}"))
        assert done.returncode == 0, done.stderr[-3000:]
    assert "reusing 34 frames" in done.stdout
    assert "steps 22 to 32" in done.stdout
    resumed, straight = tmp_path / "run", straight_run / "run"
    assert fingerprint(load_vqgan(resumed)) == fingerprint(load_vqgan(straight))
    for tag in ("train/loss", "train/loss/discriminator", "train/grad_norm"):
        assert logged(resumed, tag) == logged(straight, tag)
    saved = [
        torch.load(run / "checkpoints/step_00000032/trainer.pt", weights_only=True)
        for run in (resumed, straight)
    ]
    assert torch.equal(saved[0]["usage"], saved[1]["usage"])
    for place, moments in saved[0]["optimizer"]["state"].items():
        other = saved[1]["optimizer"]["state"][place]
        assert all(torch.equal(moments[name], other[name]) for name in moments)


def test_a_new_run_begins_with_the_weights_of_another(
    straight_run: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "start": str(straight_run / "run/vqgan.safetensors"),
        "codebook": {"kmeans": False, "start_step": 0, "restart_every": 0},
        "optimizer": {"learning_rate": 1e-12},
        "steps": 1,
        "batch_size": 2,
    }
    recipe = write_recipe(tmp_path, media, **changes)
    train_here(monkeypatch, recipe)
    before, after = (load_vqgan(folder / "run").state_dict() for folder in (straight_run, tmp_path))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-9)
    other = f"vqgan.run={tmp_path / 'other'}"
    with pytest.raises(UserError, match=r"with vqgan\.model\.code_dim = 16, but the recipe says 8"):
        train_here(monkeypatch, recipe, other, "vqgan.model.code_dim=8")
    assert not (tmp_path / "other").exists()


def test_frames_are_decoded_by_workers_while_training_in_bf16(media: Path, tmp_path: Path) -> None:
    data = {"cache_frames": False, "workers": 1}
    recipe = write_recipe(tmp_path, media, data=data, steps=5, precision="bf16", batch_size=6)
    done = run_command_line(sys.executable, COMMAND, recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "run" / "frames.npy").exists()
    assert len(logged(tmp_path / "run", "train/loss")) == 5
    # 22 items in 30 draws: the two broken ones come up at least once.
    assert sum(logged(tmp_path / "run", "data/broken_items")) >= 2


def test_sigterm_to_all_processes_saves_and_ends_with_0(media: Path, tmp_path: Path) -> None:
    """The workers get it, too, as from a scheduler, and must not fail the run."""
    data = {"cache_frames": False, "workers": 1}
    recipe = write_recipe(tmp_path, media, data=data, steps=100_000, batch_size=6)
    with Ranks(1, tmp_path / "logs", recipe, script=ROOT / COMMAND) as ranks:
        log = tmp_path / "run/log.jsonl"
        assert ranks.wait_for(lambda: log.exists() and log.stat().st_size), ranks.output()
        [process] = ranks.processes
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        for each in (*workers, process):
            each.send_signal(signal.SIGTERM)
        assert ranks.wait(60) == [0], ranks.output()
        assert "SIGTERM received: the last step is saved" in ranks.output()
    [checkpoint] = (tmp_path / "run/checkpoints").glob("step_*")
    assert len(logged(tmp_path / "run", "train/loss")) == int(checkpoint.name[5:])
    assert not (tmp_path / "run/vqgan.safetensors").exists()
    assert psutil.wait_procs(workers, 30)[1] == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("vqgan.los.perceptual_weight=1", "unknown key 'vqgan.los'; did you mean 'loss'?"),
        ("vqgan.model.image_size=33", "image_size 33 must be a multiple of downsampling 8"),
        ("vqgan.data.decode_size=16", "data.decode_size 16 must be at least model.image_size 32"),
        ("vqgan.data.train=[absent.jsonl]", "manifest absent.jsonl does not exist"),
        ("vqgan.loss.perceptual.network=vgg16", "network 'vgg16' needs weights"),
        ("vqgan.start=runs/other", "set codebook.kmeans to false and codebook.start_step to 0"),
        ("vqgan.model.classes=5", "loss.reconstruction must be cross_entropy with model.classes"),
        ("vqgan.loss.reconstruction=cross_entropy", "must be cross_entropy with model.classes"),
        ("vqgan.data.unlabelled=255", "data.unlabelled belongs to model.classes"),
        ("vqgan.ema_decay=1", "vqgan.ema_decay must be below 1, not 1"),
        ("vqgan=null", "recipe 'tiny' has no section 'vqgan'"),
        ("vqgan.batch_size=0", "vqgan.batch_size must be at least 1, not 0"),
    ],
)
def test_wrong_recipes_are_refused_before_anything_is_written(
    override: str,
    sentence: str,
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError) as caught:
        train_here(monkeypatch, write_recipe(tmp_path, media), override)
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_mistakes_end_the_launched_command_with_one_sentence(media: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, media, data={"train": [str(media / "bad.jsonl")]})
    done = run_command_line(*deepspeed_command(2, COMMAND, recipe))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "training frames: none of the 2 items can be decoded" in errors[0]
    assert "broken.png" in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cached", [True, False])
def test_media_that_cannot_be_decoded_leave_the_folder_as_it_was(
    cached: bool, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": [str(media / "bad.jsonl")], "cache_frames": cached, "workers": 0}
    recipe = write_recipe(tmp_path, media, data=data)
    with pytest.raises(UserError, match=r"training frames: .* decoded; the "):
        train_here(monkeypatch, recipe, f"vqgan.run={tmp_path / 'new/run'}")
    assert not (tmp_path / "new").exists()
    there = tmp_path / "there"
    there.mkdir()
    (there / "recipe.yaml").write_text("name: another\n")
    with pytest.raises(UserError, match=r"training frames: .* decoded; the "):
        train_here(monkeypatch, recipe, f"vqgan.run={there}", "vqgan.data.held_out=[]")
    assert [path.name for path in there.iterdir()] == ["recipe.yaml"]
    assert (there / "recipe.yaml").read_text() == "name: another\n"


def test_checkpoint_of_another_model_is_refused(straight_run: Path, media: Path) -> None:
    recipe = straight_run / "recipe.yaml"
    before = fingerprint(load_vqgan(straight_run / "run"))
    done = run_command_line(sys.executable, COMMAND, recipe, "vqgan.model.codebook_size=64")
    assert done.returncode == 2
    assert "holds a VQ-GAN with other settings than the recipe's vqgan.model" in done.stderr
    assert fingerprint(load_vqgan(straight_run / "run")) == before


def test_help_shows_an_example() -> None:
    done = run_command_line(sys.executable, COMMAND, "--help")
    assert done.returncode == 0
    assert "deepspeed --num_accelerators 2 launch/train_vqgan.py" in done.stdout


def test_dead_codes_move_to_encoder_vectors_and_live_ones_stay() -> None:
    with join_processes():
        quantizer = VectorQuantizer(6, 3)
        settings = CodebookUpkeep(restart_every=1, restart_below=0.5, usage_decay=0.1)
        keeper = CodebookKeeper(quantizer, settings, seed=0)
        before = quantizer.table.detach().clone()
        tokens = torch.tensor([0, 1, 2, 0, 1, 2])
        assert keeper.count(tokens).tolist() == [2, 2, 2, 0, 0, 0]
        vectors = torch.randn(10, 3)
        assert keeper.restart_dead(0, vectors) == 3
        assert torch.equal(quantizer.table[:3], before[:3])
        rows = {tuple(row) for row in vectors.tolist()}
        assert len({tuple(row) for row in quantizer.table[3:].tolist()} & rows) == 3
        # A code that has just moved gets time to be taken.
        assert keeper.restart_dead(1, vectors) == 0


def test_perplexity_counts_the_codes_in_effective_use() -> None:
    assert perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0, 5.0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7.0, 0.0])) == pytest.approx(1)


def test_learning_rate_warms_up_linearly_and_ends_at_zero() -> None:
    settings = VqganOptimizer(warmup_steps=4, decay="cosine")
    factors = [learning_rate_factor(step, 24, settings) for step in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.5)
    assert factors[24] == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "grid_side", "millions"),
    [("vqgan_f16", 21, (80, 84)), ("vqgan_f8", 32, (78, 82)), ("vqgan_seg", 21, (66, 70))],
)
def test_full_size_recipes_build(name: str, grid_side: int, millions: tuple[int, int]) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / f"{name}.yaml")
    assert recipe.vqgan is not None
    with torch.device("meta"):
        model = Vqgan(recipe.vqgan.model)
    assert model.grid_side == grid_side
    assert (model.config.codebook_size, model.config.code_dim) == (12288, 256)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] <= count <= millions[1]
    sides = [recipe.vqgan.model.image_size] * 2
    images = torch.zeros(1, recipe.vqgan.model.image_channels, *sides, device="meta")
    assert model.encoder(images).shape == (1, 256, grid_side, grid_side)
