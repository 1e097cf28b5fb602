"""Runs whose encoder reads sketches: what they start from, keep, continue as and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLASSES, ROOT, SmallWorld, lone_process
from safetensors.torch import load_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import Request, generate, prepare, task_named
from megatron_nuwa.generation.trained import open_generator
from megatron_nuwa.models.vqgan import Vqgan, fingerprint, load_vqgan, save_vqgan
from megatron_nuwa.training.pretrain import Pretraining, pretrain
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.trained_model import export, open_trained


def train(world: SmallWorld, run: Path, *overrides: str, tasks: tuple[str, ...] = ()) -> None:
    settings = [*world.sketch_overrides(*tasks), f"run={run}", "training.stop_at_step=2"]
    recipe = load_recipe(world.recipe, [*settings, *overrides])
    pretrain(recipe, ROOT / "ds_configs/zero1_fp32.json", lone_process())


@pytest.fixture(scope="module")
def run(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of five tasks, evaluated on sketches."""
    run = tmp_path_factory.mktemp("sketches") / "run"
    held_out = f"evaluation.corpora={{s2i: ['{small_world.sketched_images}']}}"
    train(small_world, run, held_out, "data.caption_dropout=0", tasks=("s2i", "s2v"))
    return run


def test_a_run_learns_from_sketches_and_keeps_their_tokenizer(
    small_world: SmallWorld, run: Path
) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    tags = {name for line in lines for name in line}
    for name in ("train/loss/s2i", "train/perplexity/s2v", "eval/below_unigram/s2i", "speed/mfu"):
        assert name in tags
    assert json.loads((run / "evaluation.json").read_text())["heldout"]["tasks"].keys() == {"s2i"}
    kept = load_vqgan(run / "tokenizers/sketch_vqgan.safetensors")
    assert fingerprint(kept) == fingerprint(load_vqgan(small_world.sketch_vqgan))
    weights = load_file(run / "checkpoints/step_00000002/model.safetensors")
    codes = weights["sketch_embedding.codes.weight"]
    # Two steps of Adam away from the tokenizer's codes.
    assert 0 < (codes - kept.codebook()).abs().max() < 0.01


def test_its_file_carries_all_that_a_sketch_needs(
    run: Path, small_world: SmallWorld, tmp_path: Path
) -> None:
    file = tmp_path / "sketches.safetensors"
    export(open_trained(run, "RUN"), file, torch.float32)
    maps = np.random.default_rng(0).integers(0, CLASSES, (3, 16, 16), np.uint8)
    request = Request(task_named("s2v"), sketch=maps)
    tokens = []
    for source in (run, file):
        generator = open_generator(source, "--run")
        assert generator.sketch_vqgan is not None
        ours = fingerprint(generator.sketch_vqgan)
        assert ours == fingerprint(load_vqgan(small_world.sketch_vqgan))
        prepared = prepare(generator, [request])
        assert [context.kind for context in prepared.contexts] == ["sketch"]
        tokens.append(generate(generator, prepared, SamplingSettings()))
    assert tokens[0].shape == (1, 48)
    assert tokens[0].equal(tokens[1])


def test_a_run_continues_with_its_own_sketch_tokenizer_only(
    small_world: SmallWorld, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_vqgan(small_world.sketch_vqgan).config
    torch.manual_seed(9)
    save_vqgan(Vqgan(config), tmp_path / "other.safetensors")
    other = f"tokenizers.sketch_vqgan={tmp_path / 'other.safetensors'}"
    with pytest.raises(UserError, match=r"another tokenizers\.sketch_vqgan than the recipe's"):
        train(small_world, run, other)
    train(small_world, run, "data.caption_dropout=0", tasks=("s2i", "s2v"))
    assert "nothing to do: step 2 of 2" in capsys.readouterr().out


def test_a_model_without_sketches_is_trained_further_to_read_them(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain"
    recipe = load_recipe(small_world.recipe, [f"run={plain}", "training.stop_at_step=1"])
    pretrain(recipe, ROOT / "ds_configs/zero1_fp32.json", lone_process())
    assert not (plain / "tokenizers/sketch_vqgan.safetensors").exists()
    assert open_trained(plain, "RUN").sketch_vqgan() is None
    found: list[dict[str, torch.Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "run", lambda t, _: found.append(t.engine.whole_weights()))
        train(small_world, tmp_path / "tuned", f"start.weights={plain}", tasks=("s2v",))
    told = capsys.readouterr().out
    assert "82 weights of" in told
    assert "it reads no sketches, so their embedding begins anew" in told
    [start] = found
    before = load_file(plain / "checkpoints/step_00000001/model.safetensors")
    assert all(start[name].equal(value) for name, value in before.items())
    codes = load_vqgan(small_world.sketch_vqgan).codebook()
    assert start["sketch_embedding.codes.weight"].equal(codes)
    # And back: what is not needed is left behind.
    train(small_world, tmp_path / "tuned", f"start.weights={plain}", tasks=("s2v",))
    back = [f"run={tmp_path / 'back'}", f"start.weights={tmp_path / 'tuned'}"]
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "run", lambda t, _: None)
        pretrain(
            load_recipe(small_world.recipe, back),
            ROOT / "ds_configs/zero1_fp32.json",
            lone_process(),
        )
    assert "its embedding of sketches is left behind" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.sketch_codebook_size=null"], "task s2i reads sketches, but model.sketch_codebook"),
        (["tokenizers.sketch_vqgan=null"], "size is 16, but the recipe names no tokenizers.sketch"),
        (["tokenizers.sketch_vqgan={vqgan}"], "is a VQ-GAN of pictures; name a VQ-GAN-Seg"),
        (["tokenizers.vqgan={sketch_vqgan}"], "is a VQ-GAN of sketches; name one of pictures"),
        (["model.sketch_codebook_size=17"], "size is 17, but the VQ-GAN-Seg {sketch_vqgan} has 16"),
        (["model.sketch_code_dim=7"], "the codes of the VQ-GAN-Seg {sketch_vqgan} have 6 numbers"),
        (["tokenizers.sketch_vqgan={coarse}"], "has grids of 2² tokens, but the VQ-GAN {vqgan}"),
        (["tokenizers.sketch_vqgan={other}"], "with another VQ-GAN-Seg than {other}"),
        (
            ["data.tasks.s2i.corpora=['{images}']"],
            "task s2i reads sketches, and corpus {images} has none; tokenize it with --sketch",
        ),
        (["data.tasks.s2i.corpora=['{sketched_clips}']"], "task s2i needs images, but corpus"),
        (
            ["evaluation.corpora={{s2v: ['{clips}']}}"],
            "task s2v reads sketches, and corpus {clips} has none",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    small_world: SmallWorld, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    config = load_vqgan(small_world.sketch_vqgan).config
    save_vqgan(Vqgan(config), tmp_path / "other.safetensors")
    coarse = config.model_copy(update={"downsampling": 8})
    save_vqgan(Vqgan(coarse), tmp_path / "coarse.safetensors")
    names = {key: str(value) for key, value in vars(small_world).items()}
    names |= {key: f"{tmp_path / key}.safetensors" for key in ("other", "coarse")}
    with pytest.raises(UserError) as caught:
        train(
            small_world,
            tmp_path / "run",
            *(each.format_map(names) for each in overrides),
            tasks=("s2i",),
        )
    assert sentence.format_map(names) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
