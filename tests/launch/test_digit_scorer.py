"""The scorer of moving digits, the commands around it and its page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.moving_digits import report
from launch.moving_digits.classifier import DigitClassifier, train_classifier
from launch.moving_digits.handwriting import read_handwriting
from launch.moving_digits.media import write_media
from launch.moving_digits.motion_reading import read_motion
from launch.moving_digits.motions import DIGITS, MOTIONS, Scene, image_caption, scenes
from launch.moving_digits.results import read_goals
from launch.moving_digits.scorer import Scorer, Share, main, score_all
from launch.moving_digits.sizes import SIZES
from launch.moving_digits.stages import TASKS, digit_stages, folder_of
from launch.moving_digits.world import World, draw, path, world_of
from launch.workflow.display import Display
from launch.workflow.plan import BPE_VOCABULARY, moved
from launch.workflow.runner import Runner, StageRecord, log_tail, read_record, record_path
from megatron_nuwa.data.text import train_bpe
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, save_vqgan
from megatron_nuwa.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train-clips": 2, "heldout-clips": 64, "heldout-images": 10}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def classifier(world: World) -> DigitClassifier:
    return train_classifier(read_handwriting(world.digit, held_out=False), world)


def clip_of(world: World, scene: Scene, random: np.random.Generator) -> np.ndarray:
    ink = read_handwriting(world.digit, held_out=True).random_sample(scene.digit, random)
    return draw(world, ink, path(world, scene.motion, random))


def test_real_held_out_clips_are_read_right(world: World, classifier: DigitClassifier) -> None:
    digits, random = read_handwriting(world.digit, held_out=True), np.random.default_rng(0)
    right_digits, right_motions = 0, 0
    for number, (ink, label) in enumerate(zip(digits.ink, digits.labels, strict=True)):
        motion = MOTIONS[number % len(MOTIONS)]
        clip = draw(world, ink, path(world, motion, random))
        right_digits += int(classifier.read(clip).sum(0).argmax()) == label
        right_motions += read_motion(clip, world).motion == motion
    assert right_digits / len(digits) >= 0.97
    assert right_motions == len(digits)


def test_the_classifier_is_the_same_every_time(world: World) -> None:
    digits = read_handwriting(world.digit, held_out=False)
    few = replace(digits, ink=digits.ink[:80], labels=digits.labels[:80])
    first, second = (train_classifier(few, world, steps=3) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_move_as_a_caption_says_is_no_motion(world: World) -> None:
    random = np.random.default_rng(1)
    clip = clip_of(world, Scene(3, "left", "up"), random)
    assert read_motion(clip, world).motion == ("left", "up")
    assert read_motion(clip[::-1], world).motion == ("down", "right")
    still = np.repeat(clip[:1], world.frames, axis=0)
    empty = np.zeros_like(clip)
    vanishing = np.concatenate([clip[:3], empty[3:]])
    late = clip[[0, 1, 2, 3, 3]]
    jumping = clip[[0, 2, 2, 3, 4]]
    turning_early = np.concatenate([clip[:2], np.roll(clip[2:], (-4, 4), axis=(1, 2))])
    for wrong in (still, empty, vanishing, late, jumping, turning_early):
        assert read_motion(wrong, world).motion is None


def test_an_empty_frame_says_nothing_about_the_digit(
    world: World, classifier: DigitClassifier
) -> None:
    empty = np.zeros((2, world.side, world.side, 3), np.uint8)
    assert np.exp(classifier.read(empty)) == pytest.approx(0.1)


def test_shares_have_wilsons_interval() -> None:
    # Wilson (1927) for 8 of 10, as any table of the interval has it.
    assert Share(right=8, of=10).interval == pytest.approx((0.490, 0.943), abs=5e-4)
    assert Share(right=0, of=20).interval == pytest.approx((0.0, 0.161), abs=5e-4)
    assert Share(right=0, of=0).value == 0


def write_samples(folder: Path, media: Path, captions: Sequence[str]) -> None:
    """Real held-out clips as if they had been generated for these captions."""
    folder.mkdir(parents=True)
    entries = []
    for number, caption in enumerate(captions):
        name = f"{number:04d}.mp4"
        shutil.copy(media / f"heldout-clips/{number:06d}.mp4", folder / name)
        entries.append({"prompt": caption, "files": [f"{number:04d}.gif", name]})
    (folder / "samples.json").write_text(json.dumps(entries))


def write_task(folder: Path, media: Path) -> None:
    """One sample of a task: a real item, said to be made of itself or of its sketch."""
    folder.mkdir()
    is_clip = folder.name.endswith("v")
    item = "heldout-clips/000000" if is_clip else "heldout-images/000000"
    made, map_ = ("0.mp4", ".npy") if is_clip else ("0.png", "-sketch.png")
    source = media / f"{item}{Path(made).suffix}"
    shutil.copy(source, folder / made)
    reads_sketch = folder.name.startswith("s")
    given = {"sketch": f"{media / item}{map_}"} if reads_sketch else {"given": str(source)}
    entry = {"prompt": "none", "files": [made], **given}
    (folder / "samples.json").write_text(json.dumps([entry]))


@pytest.fixture(scope="module")
def run(
    world: World, classifier: DigitClassifier, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose samples for held-out captions are real clips, and half of the others swapped."""
    output = tmp_path_factory.mktemp("run")
    write_media(output / "media", world, COUNTS, seed=0)
    held_out = [scene.caption for scene in scenes(held_out=True)]
    write_samples(output / "samples/held-out_captions", output / "media", held_out)
    swapped = [*held_out[16:], *held_out[:16]]
    write_samples(output / "samples/trained_captions", output / "media", swapped)
    images = output / "samples/images"
    images.mkdir()
    for number in range(10):
        shutil.copy(output / f"media/heldout-images/{number:06d}.png", images / f"{number}.png")
    entries = [{"prompt": f"the digit {n}", "files": [f"{n}.png"]} for n in range(10)]
    (images / "samples.json").write_text(json.dumps(entries))
    for task in TASKS:
        write_task(output / "samples" / task, output / "media")
    torch.manual_seed(0)
    config = VqganConfig(
        image_size=36, downsampling=4, base_channels=8, codebook_size=16, attention=False
    )
    (output / "vqgan").mkdir()
    save_vqgan(Vqgan(config), output / "vqgan/vqgan.safetensors")
    names = ("held-out captions", "trained captions", "images")
    folders = {name: output / "samples" / folder_of(name) for name in names}
    scores = score_all(Scorer(world, classifier), output / "media", Vqgan(config).eval(), folders)
    (output / "scores.json").write_text(scores.model_dump_json())
    return output


def test_right_samples_score_and_swapped_ones_do_not(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    by_name = {score["name"]: score["readings"] for score in scores["samples"]}
    goals = {goal.name: goal for goal in read_goals(SIZES["cpu"], run)}
    assert goals["Right digit"].met
    assert goals["Right motion"].met
    # An untrained VQ-GAN loses everything, and the scorer says so.
    assert not goals["The scorer reads digits"].met
    assert not goals["The scorer reads motions"].met
    assert not goals["Time"].met
    assert len(by_name["trained captions"]) == 32
    assert all(r["digit"] != r["read_digit"] for r in by_name["trained captions"][:4])
    assert sum(r["digit"] == r["read_digit"] for r in by_name["images"]) >= 9


def test_the_page_shows_samples_confusions_and_commands(run: Path) -> None:
    (run / "pretrain").mkdir()
    lines = [{"step": s, "train/loss/t2v": 3.0 / s, "eval/loss_nats/t2v": 3.1 / s} for s in (1, 2)]
    (run / "pretrain/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"loss_nats": 1.5, "unigram_entropy_nats": 3.0, "below_unigram": 0.5}
    (run / "pretrain/evaluation.json").write_text(
        json.dumps({"heldout": {"tasks": {"t2v": figures}}})
    )
    record = StageRecord(
        name="media", title="Draw", state="done", key="k", commands=["a <command>"], log="l"
    )
    record_path(run, "media").parent.mkdir()
    record_path(run, "media").write_text(record.model_dump_json())
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    clips = sum(task.endswith("v") for task in TASKS)
    assert page.count("data:image/webp") == 32 + 2 * 8 + 2 * clips
    assert page.count("data:image/png") == 10 + 2 * (len(TASKS) - clips)
    assert "a &lt;command&gt;" in page
    assert f"{scenes(held_out=True)[0].caption}<" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    with Image.open(run / "poster.gif") as poster:
        assert poster.n_frames >= World().frames
        assert poster.width > 6 * 100


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        read_goals(SIZES["cpu"], tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        report.render_report(SIZES["cpu"], tmp_path / "absent")


def test_the_scorer_refuses_samples_without_a_name(tmp_path: Path) -> None:
    arguments = ["--samples", "folder", "--media", "m", "--vqgan", "v"]
    with pytest.raises(UserError, match="must have the form NAME=FOLDER"):
        main([*arguments, "--output", str(tmp_path / "scores.json")])


@pytest.mark.parametrize("name", SIZES)
def test_stages_fit_together_and_their_recipes_load(name: str) -> None:
    size = SIZES[name]
    recipe = load_recipe(size.recipe)
    assert recipe.run == size.output / "pretrain"
    assert (
        world_of(recipe, size.digit, size.step, size.raster).side == recipe.vqgan.model.image_size
    )  # type: ignore[union-attr]
    captions = [scene.caption for scene in scenes(held_out=False)]
    captions += [image_caption(digit) for digit in range(DIGITS)]
    bpe = train_bpe(captions, BPE_VOCABULARY)
    assert recipe.model.text_vocabulary == bpe.vocabulary_size  # type: ignore[union-attr]
    written = {size.recipe, Path("launch/moving_digits/report.html.j2")}
    for stage in digit_stages(size, size.output):
        assert set(stage.inputs) <= written
        written |= set(stage.outputs)


@pytest.mark.parametrize("name", SIZES)
def test_another_output_folder_reaches_every_command(name: str) -> None:
    size = SIZES[name]
    assert list(moved(size.recipe, size.output, size.output)) == []
    recipe = load_recipe(size.recipe, list(moved(size.recipe, size.output, Path("elsewhere"))))
    assert "runs/" not in recipe.model_dump_json()
    for stage in digit_stages(size, Path("elsewhere")):
        for command in stage.commands:
            assert "elsewhere" in " ".join(command)
            assert str(size.output) not in " ".join(command)


def test_a_recipe_whose_digits_cannot_move_is_refused() -> None:
    recipe = load_recipe(SIZES["cpu"].recipe, ["model.position_grid=[9,9,4]"])
    with pytest.raises(UserError, match="frames must be odd"):
        world_of(recipe, 16, 4, 4)
    with pytest.raises(UserError, match="has no section 'vqgan'"):
        world_of(Recipe(name="empty"), 16, 4, 4)


@pytest.mark.slow
def test_one_command_trains_samples_and_scores(tmp_path: Path) -> None:
    tree = yaml.safe_load(SIZES["cpu"].recipe.read_text())
    tree["vqgan"] |= {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2}
    tree["schedule"]["steps"] = 3
    tree["evaluation"] |= {"every": 3, "items": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    size = replace(
        SIZES["cpu"], recipe=tmp_path / "recipe.yaml", train=256, held_out=32, samples=(1, 1, 1)
    )
    output = tmp_path / "run"
    runner = Runner(output, Display(Console(quiet=True), log_tail))
    stages = digit_stages(size, output)
    runner.run(stages)
    assert (output / "report.html").is_file()
    assert (output / "poster.gif").is_file()
    goals = {goal.name: goal for goal in read_goals(size, output)}
    assert goals["Time"].met
    # Three steps teach nothing, and the scorer must not see digits that move where there are none.
    assert not goals["Right digit"].met
    assert not goals["Right motion"].met
    for stage in stages:
        assert runner.is_done(stage, read_record(output, stage.name), runner.key(stage))
