"""Training VQ-GAN-Seg on real maps of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vqgan_runs import logged, train_here, write_recipe

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.segmentation import class_map, one_hot, palette
from megatron_nuwa.models.vqgan import load_vqgan

CLASSES = 4
SEG: dict[str, Any] = {
    "model": {
        "classes": CLASSES,
        "patch_size": 4,
        "base_channels": 32,
        "lookup_dim": None,
        "normalise_codes": False,
    },
    "loss": {
        "reconstruction": "cross_entropy",
        "perceptual_weight": 0,
        "adversarial_weight": 0,
    },
    "data": {"unlabelled": 255},
    "codebook": {"start_step": 20, "kmeans_vectors": 64, "restart_every": 5},
    "optimizer": {"learning_rate": 0.004},
    "ema_decay": 0.9,
    "steps": 100,
    "batch_size": 8,
    "checkpoint_every": 100,
}


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty maps of halves in two classes, a clip of maps, an item without, one that is broken."""
    folder = tmp_path_factory.mktemp("sketches")
    random = np.random.default_rng(0)
    items: list[dict[str, Any]] = []

    def halves() -> np.ndarray:
        maps = np.full((40, 40), random.integers(CLASSES - 1), np.uint8)
        maps[:, int(random.integers(8, 32)) :] = random.choice([0, 1, 2, 255])
        return maps

    for number in range(30):
        Image.fromarray(halves()).save(folder / f"{number}.png")
        items.append({"id": str(number), "media": "absent.jpg", "sketch": f"{number}.png"})
    np.save(folder / "clip.npy", np.stack([halves() for _ in range(3)]))
    items.append({"id": "clip", "media": "absent.mp4", "sketch": "clip.npy"})
    items.append({"id": "none", "media": "absent.jpg"})
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(folder / "wrong.png")
    items.append({"id": "wrong", "media": "absent.jpg", "sketch": "wrong.png"})
    rows = {"train": items[2:], "held": items[:2], "none": items[31:32]}
    for name, chosen in rows.items():
        text = "".join(json.dumps({**row, "captions": ["halves"]}) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_it_learns_maps_and_tells_accuracy_iou_and_shows_them_in_colours(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    train_here(monkeypatch, write_recipe(tmp_path, sketches, **SEG))
    run = tmp_path / "run"
    shown = capfd.readouterr().out
    assert "decoded 31 frames of 30 items" in shown
    assert "wrong.png has class 9 at row 0, column 0 of map 0" in shown
    entropy = logged(run, "train/loss/reconstruction")
    assert np.mean(entropy[-5:]) < 0.7 * np.mean(entropy[:5])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["frames"] == 2
    assert set(evaluation) == {"pixel_accuracy", "fwiou", "used_fraction", "perplexity", "frames"}
    assert evaluation["pixel_accuracy"] == logged(run, "eval/pixel_accuracy")[-1] > 0.6
    assert 0.4 < evaluation["fwiou"] == logged(run, "eval/fwiou")[-1] <= 1
    assert all(0 <= share <= 1 for share in logged(run, "codebook/dead_fraction"))

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert {"eval/pixel_accuracy", "eval/fwiou"} <= set(board.Tags()["scalars"])
    [picture] = board.Images("reconstructions")[-1:]
    (tmp_path / "shown.png").write_bytes(picture.encoded_image_string)
    pixels = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB"))
    maps = np.load(run / "held_out_frames.npy")[0, 2:34, 2:34]
    model = load_vqgan(run)
    with torch.no_grad():
        tokens = model.encode(one_hot(torch.from_numpy(maps)[None], CLASSES))
        found = class_map(model.decode(tokens))[0].numpy()
    assert np.array_equal(pixels[:32, :32], palette(CLASSES)[maps])
    assert np.array_equal(pixels[32:, :32], palette(CLASSES)[found])


def test_a_discriminator_may_judge_maps_as_well(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = SEG["loss"] | {"adversarial_weight": 0.1, "discriminator_start": 2}
    train_here(monkeypatch, write_recipe(tmp_path, sketches, **(SEG | {"loss": loss, "steps": 5})))
    assert len(logged(tmp_path / "run", "train/loss/discriminator")) == 3
    assert all(weight > 0 for weight in logged(tmp_path / "run", "train/adaptive_weight"))


def test_manifests_without_sketches_are_refused(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SEG["data"] | {"train": [str(sketches / "none.jsonl")]}
    with pytest.raises(UserError, match=r"none\.jsonl: no item has a 'sketch'"):
        train_here(monkeypatch, write_recipe(tmp_path, sketches, **(SEG | {"data": data})))
    assert not (tmp_path / "run").exists()


def test_the_palette_gives_every_class_a_colour_of_its_own() -> None:
    colours = palette(256)
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    assert colours[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_a_recipe_may_have_both_tokenizers_and_the_command_names_one(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, sketches, **(SEG | {"steps": 1}))
    tree = yaml.safe_load(path.read_text())
    tree["sketch_vqgan"] = tree["vqgan"] | {"run": str(tmp_path / "seg")}
    del tree["vqgan"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="has no section 'vqgan'"):
        train_here(monkeypatch, path)
    train_here(monkeypatch, path, "--section", "sketch_vqgan", "sketch_vqgan.batch_size=4")
    with pytest.raises(UserError, match=r"into a new folder with sketch_vqgan\.run=FOLDER"):
        train_here(monkeypatch, path, "--section", "sketch_vqgan", "sketch_vqgan.model.code_dim=7")
    assert load_vqgan(tmp_path / "seg").config.classes == CLASSES
    written = yaml.safe_load((tmp_path / "seg/recipe.yaml").read_text())
    assert written["sketch_vqgan"]["batch_size"] == 4
