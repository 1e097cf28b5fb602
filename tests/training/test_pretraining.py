"""Pretraining with real processes under the deepspeed launcher."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld, deepspeed_command, lone_process, run_command_line
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_nuwa.errors import FailedProcessError, UserError
from megatron_nuwa.training.checkpoint import read_state
from megatron_nuwa.training.evaluation import HeldOut
from megatron_nuwa.training.pretrain import Pretraining, pretrain
from megatron_nuwa.training.recipe import load_recipe

SCRIPT = "launch/pretrain.py"
LOSS_TAGS = ("train/loss", "train/loss/t2i", "train/loss/v2v", "train/loss/t2v", "train/grad_norm")


def train(world: SmallWorld, run: Path, processes: int, *extra: str) -> str:
    command = deepspeed_command(processes, SCRIPT, world.recipe, f"run={run}", *extra)
    done = run_command_line(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_here(world: SmallWorld, run: Path, *overrides: str, layout: Path | None = None) -> None:
    """One process, this one."""
    recipe = load_recipe(world.recipe, [f"run={run}", *overrides])
    pretrain(recipe, layout or recipe.training.deepspeed_config, lone_process())


def losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[line[tag] for tag in LOSS_TAGS] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps on two processes."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(small_world, run, 2)
    return run


def test_stop_after_ten_steps_and_resume_equals_twenty_bit_for_bit(
    small_world: SmallWorld, undisturbed: Path, tmp_path: Path
) -> None:
    train(small_world, tmp_path / "run", 2, "training.stop_at_step=10")
    assert len(losses(tmp_path / "run")) == 10
    output = train(small_world, tmp_path / "run", 2)
    assert "continuing after step 10" in output
    assert losses(tmp_path / "run") == losses(undisturbed)
    weights, expected = (
        load_file(run / "checkpoints/step_00000020/model.safetensors")
        for run in (tmp_path / "run", undisturbed)
    )
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in weights)
    # The guard's memory of losses, too.
    guard, expected_guard = (
        read_state(run / "checkpoints/step_00000020")["guard"]
        for run in (tmp_path / "run", undisturbed)
    )
    assert guard == expected_guard
    assert guard["taken"] == 20


def test_two_processes_train_like_one(
    small_world: SmallWorld, undisturbed: Path, tmp_path: Path
) -> None:
    train_here(small_world, tmp_path / "run")
    for one, two in zip(losses(tmp_path / "run"), losses(undisturbed), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert losses(undisturbed)[-1][0] < losses(undisturbed)[0][0] - 0.5


def test_bf16_stays_near_fp32_and_accumulation_changes_nothing(
    small_world: SmallWorld, undisturbed: Path, tmp_path: Path
) -> None:
    train_here(small_world, tmp_path / "half", layout=ROOT / "ds_configs/zero1_bf16.json")
    for half, full in zip(losses(tmp_path / "half"), losses(undisturbed), strict=True):
        assert half[0] == pytest.approx(full[0], rel=2e-3)
    train_here(small_world, tmp_path / "parts", "data.accumulation=2")
    for parts, whole in zip(losses(tmp_path / "parts"), losses(undisturbed), strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


def test_run_folder_holds_what_the_design_says(undisturbed: Path) -> None:
    for name in (
        "recipe.yaml",
        "ds_config.json",
        "environment.json",
        "log.jsonl",
        "checkpoints/latest",
        "checkpoints/step_00000020/manifest.json",
        "tokenizers/vqgan.safetensors",
        "tokenizers/bpe.json",
        "evaluation.json",
    ):
        assert (undisturbed / name).is_file(), name
    assert (undisturbed / "checkpoints/latest").read_text().strip() == "step_00000020"
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        *LOSS_TAGS,
        "train/lr",
        "train/perplexity/t2v",
        "speed/tokens_per_second",
        "speed/mfu",
        "speed/data_wait_fraction",
        "memory/allocated_gib",
        "eval/below_unigram/v2v",
    } <= tags
    by_samples = EventAccumulator(str(undisturbed / "tensorboard/by_samples"))
    by_samples.Reload()
    assert [event.step for event in by_samples.Scalars("train/loss")][:2] == [8, 16]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    small_world: SmallWorld,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_here(small_world, tmp_path / "run", "training.stop_at_step=2")
    whole = tmp_path / "run/checkpoints/step_00000002"
    damaged = tmp_path / "run/checkpoints/step_00000003"
    shutil.copytree(whole, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train_here(small_world, tmp_path / "run", "training.stop_at_step=2")
    output = capsys.readouterr().out
    assert f"checkpoint {damaged} is damaged (model.safetensors was changed or cut short)" in output
    assert "step 2 of 2 is reached already" in output


def test_another_recipe_is_refused_once_and_nothing_changes(
    small_world: SmallWorld, undisturbed: Path, tmp_path: Path
) -> None:
    """On two processes: the message comes once, and neither process hangs."""
    train_here(small_world, tmp_path / "run", "training.stop_at_step=1")
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    command = deepspeed_command(2, SCRIPT, small_world.recipe, f"run={tmp_path / 'run'}", "seed=4")
    done = run_command_line(*command)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "seed = 3, but now it is 4" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_a_corpus_at_an_address_is_trained_on_like_one_in_a_folder(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_NUWA_CACHE", str(tmp_path / "cache"))
    for place in ("", "local://"):
        images = f"{place}{small_world.images}"
        named = [
            f"data.tasks={{t2i: {{corpora: ['{images}'], batch_size: 4}}}}",
            f"evaluation.corpora={{t2i: ['{images}']}}",
        ]
        run = tmp_path / f"run{place[:5]}"
        for last in (2, 3):
            train_here(small_world, run, *named, f"training.stop_at_step={last}")
    lines = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "runlocal")
    ]
    tags = ("train/loss", "eval/loss_nats/t2i")
    here, there = ([line[tag] for line in of for tag in tags if tag in line] for of in lines)
    assert here == there
    # Two starts of an evaluation each.
    assert len(here) == 5


def test_a_corpus_at_an_address_is_named_by_it(small_world: SmallWorld, tmp_path: Path) -> None:
    for name, reason in (("memory://no/where", "/no/where"), ("nope://no/where", "not known")):
        with pytest.raises(UserError) as caught:
            train_here(small_world, tmp_path / "run", f"data.tasks.t2i.corpora=['{name}']")
        assert f"corpus {name} has no corpus.json that " in str(caught.value)
        assert reason in str(caught.value)


def evaluated_step(run: Path) -> int:
    return int(json.loads((run / "evaluation.json").read_text())["step"])


@pytest.mark.parametrize("moment", ["the last step", "its evaluation"])
def test_a_signal_at_the_last_step_leaves_its_evaluation_to_be_finished(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    room, name = (Pretraining, "_train_step") if moment == "the last step" else (HeldOut, "batches")
    act, calls = getattr(room, name), []

    def disturbed(*arguments: object) -> object:
        calls.append(name)
        result = act(*arguments)
        # Before the processes agree on the second of two steps, or between two tasks' items.
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(room, name, disturbed)
    train_here(small_world, tmp_path / "run", "training.stop_at_step=2")
    assert "held out after step 2: t2i " in capsys.readouterr().out
    assert evaluated_step(tmp_path / "run") == 2


def test_an_evaluation_that_a_crash_cut_short_is_made_up_for_once(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def crash(held_out: HeldOut) -> None:
        raise RuntimeError("crashed")

    one, other = tmp_path / "one", tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "batches", crash)
        for run in (one, other, other):
            with pytest.raises(FailedProcessError, match="crashed"):
                train_here(small_world, run, "training.stop_at_step=1")
        # The third start is not ended by it any more.
        train_here(small_world, other, "training.stop_at_step=1")
        assert not (other / "evaluation.json").exists()
    train_here(small_world, one, "training.stop_at_step=1")
    assert evaluated_step(one) == 1
    capsys.readouterr()
    train_here(small_world, one, "training.stop_at_step=1")
    assert "held out" not in capsys.readouterr().out
    train_here(small_world, one, "training.stop_at_step=2")
    assert evaluated_step(one) == 2


def change_corpus(world: SmallWorld, folder: Path, **changes: object) -> Path:
    """A copy of the clip corpus whose manifest says something else."""
    shutil.copytree(world.clips, folder)
    manifest = json.loads((folder / "corpus.json").read_text())
    manifest.update(changes)
    (folder / "corpus.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.wdith=64",), "unknown key 'model.wdith'; did you mean 'width'?"),
        (("model.codebook_size=31",), "model.codebook_size is 31, but the VQ-GAN"),
        (("model.text_vocabulary=300",), "model.text_vocabulary is 300, but the BPE"),
        (("model.position_grid=[4, 4, 2]",), "larger than model.position_grid (4, 4, 2)"),
        (("data.tasks.t2i.corpora=[CLIPS]",), "task t2i needs images, but corpus"),
        (("data.tasks.t2v.corpora=[OTHER_VQGAN]",), "was written with another VQ-GAN"),
        (("data.tasks.t2v.corpora=[nowhere]",), "nowhere"),
        (("data.tasks.t2v.batch_size=3", "data.accumulation=2"), "use 2 or 4"),
        (("tokenizers.bpe=nothing.json",), "nothing.json"),
        (("model.heads=5",), "model.width 32 is not a multiple of model.heads 5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    small_world: SmallWorld, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    other = change_corpus(
        small_world,
        tmp_path / "other_vqgan",
        fingerprints={"vqgan": "1" * 64, "bpe": "1" * 64, "decode": "1" * 64},
    )
    named = [
        override.replace("CLIPS", str(small_world.clips)).replace("OTHER_VQGAN", str(other))
        for override in overrides
    ]
    with pytest.raises(UserError) as caught:
        train_here(small_world, tmp_path / "run", *named)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["optimizer", "train_batch_size"])
def test_layout_that_repeats_the_recipe_is_refused(
    small_world: SmallWorld, tmp_path: Path, key: str
) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({key: 1}))
    with pytest.raises(UserError, match=f"'{key}' is set by the recipe"):
        train_here(small_world, tmp_path / "run", layout=layout)
