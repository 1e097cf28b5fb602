"""Corpora with sketches: the tokens of VQ-GAN-Seg beside the media's, on any number of ranks."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from farm_media import CAPTIONS, write_manifest
from farm_runs import contents, run_farm
from PIL import Image

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.decoders import DecodeSettings, decode_sketch
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.segmentation import one_hot
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, load_vqgan, save_vqgan
from preprocessing.__main__ import main
from preprocessing.filters import FilterSettings
from preprocessing.isolation import Demands, SketchSettings, decode_alone, decode_item
from preprocessing.sources import SourceItem
from preprocessing.state import FarmFolder

CLASSES, SIDE = 5, 16
CLIPS = ["--frames", "4", "--fps", "5", "--items-per-shard", "3"]


@pytest.fixture(scope="module")
def sketch_tools(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tools, and `sketch.safetensors`, `other.safetensors` (16² → 4×4) and a coarser one."""
    folder = tmp_path_factory.mktemp("sketch_tools")
    shutil.copytree(tools, folder, dirs_exist_ok=True)
    config = VqganConfig(
        image_size=SIDE,
        downsampling=4,
        base_channels=8,
        residual_blocks=1,
        attention=False,
        codebook_size=32,
        code_dim=6,
        lookup_dim=None,
        classes=CLASSES,
    )
    coarse = config.model_copy(update={"downsampling": 8})
    for seed, (name, each) in enumerate(
        {"sketch": config, "other": config, "coarse": coarse}.items()
    ):
        torch.manual_seed(seed)
        save_vqgan(Vqgan(each), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory, media: Path) -> Path:
    """The media with sketches, `clips.jsonl` and `images.jsonl`."""
    folder = tmp_path_factory.mktemp("sketched")
    shutil.copytree(media, folder, dirs_exist_ok=True)
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for number in range(7):
        coarse = random.integers(0, CLASSES, (4, 6, 8), np.uint8)
        maps = coarse.repeat(8, 1).repeat(8, 2)
        if number % 2:
            np.save(folder / f"clip{number}.npy", maps)
        else:
            write_gif(folder / f"clip{number}.gif", maps)
        name = f"clip{number}.{'npy' if number % 2 else 'gif'}"
        rows.append(row(f"c{number}", f"clip{number}.mp4", name))
    np.save(folder / "short.npy", maps[:3])
    rows.insert(2, row("short", "clip0.mp4", "short.npy"))
    write_manifest(folder / "clips.jsonl", rows)
    for number in range(6):
        coarse = random.integers(0, CLASSES, (5, 6), np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(10, 1)).save(folder / f"image{number}.map.png")
    return folder


def row(name: str, medium: str, sketch: str | None) -> dict[str, object]:
    return {"id": name, "media": medium, "captions": CAPTIONS[:1], "sketch": sketch}


def write_gif(path: Path, maps: np.ndarray) -> None:
    palette = [value for number in range(256) for value in (number, 90, 255 - number)]
    frames = []
    for each in maps:
        frame = Image.fromarray(each)
        frame.putpalette(palette)
        frames.append(frame)
    settings = {"save_all": True, "append_images": frames[1:], "duration": 200, "optimize": False}
    frames[0].save(path, palette=bytes(palette), **settings)


def arguments(source: Path, output: Path, tools: Path, *more: str | Path) -> list[str]:
    files = {"--vqgan": "vqgan.safetensors", "--bpe": "bpe.json"}
    if "--sketch-vqgan" not in more:
        files["--sketch-vqgan"] = "sketch.safetensors"
    named = [part for option, name in files.items() for part in (option, str(tools / name))]
    return ["tokenize", str(source), "--output", str(output), *named, *map(str, more)]


def failures(corpus: Path) -> dict[str, str]:
    lines = (corpus / "failures.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def corpus(sketches: Path, sketch_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips with their sketches, in three shards; one process."""
    folder = tmp_path_factory.mktemp("corpora") / "clips"
    assert main(arguments(sketches / "clips.jsonl", folder, sketch_tools, *CLIPS)) == 0
    assert main(["verify", str(folder), "--full"]) == 0
    return folder


def test_sketches_are_byte_identical_on_several_ranks(
    corpus: Path, sketches: Path, sketch_tools: Path, tmp_path: Path
) -> None:
    """Two that encode, one of which also decodes."""
    output = tmp_path / "ranks"
    more = (*CLIPS, "--decode-ranks-per-encoder", "1")
    done = run_farm(3, arguments(sketches / "clips.jsonl", output, sketch_tools, *more))
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(corpus)


def test_sketch_tokens_are_those_of_the_vqgan_and_visual_ones_stay(
    corpus: Path, sketches: Path, sketch_tools: Path, tmp_path: Path
) -> None:
    read = Corpus(corpus)
    assert read.manifest.sketch_codebook_size == 32
    assert failures(corpus) == {"short": failures(corpus)["short"]}
    assert "short.npy has 3 maps, and 4 are needed" in failures(corpus)["short"]
    vqgan = load_vqgan(sketch_tools / "sketch.safetensors")
    settings = DecodeSettings(image_size=SIDE, frames=4, frames_per_second=5)
    names = [read.item(index)["id"] for index in range(7)]
    assert names == [f"c{n}" for n in range(7)]
    for index in range(7):
        path = sketches / f"clip{index}.{'npy' if index % 2 else 'gif'}"
        maps, _ = decode_sketch(path, settings, CLASSES)
        with torch.inference_mode():
            alone = vqgan.encode(one_hot(torch.tensor(maps), CLASSES)).flatten()
        # Batches differ, and with them the last bits of the sums.
        assert (read.sketch(index) == alone.numpy()).mean() > 0.95
    assert len(np.unique(np.stack([read.sketch(index) for index in range(7)]))) > 5

    without = tmp_path / "without"
    command = arguments(sketches / "clips.jsonl", without, sketch_tools, *CLIPS)
    place = command.index("--sketch-vqgan")
    del command[place : place + 2]
    assert main(command) == 0
    plain = Corpus(without)
    # A batch without the failed item's frames would be another one.
    same = [n for n in range(len(plain)) if plain.item(n)["id"] != "short"]
    for index, other in enumerate(same):
        np.testing.assert_array_equal(read.visual(index), plain.visual(other))
    assert not plain.has_sketches
    assert "sketch" not in (without / "corpus.json").read_text()
    assert "sketch" not in (without / "settings.json").read_text()


def test_report_shows_sketches_and_what_their_tokens_keep(corpus: Path) -> None:
    page = FarmFolder(corpus).report.read_text(encoding="utf-8")
    # Six items: frames, sketch, and what becomes of both.
    assert page.count("data:image/webp;base64,") == 24
    assert page.count("of the sketch's pixels right") == 6


def test_every_hostile_sketch_fails_its_item_alone(
    sketches: Path, sketch_tools: Path, tmp_path: Path
) -> None:
    whole = (sketches / "image1.map.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), CLASSES, np.uint8)).save(tmp_path / "class.png")
    Image.new("L", (20_000, 20_000)).save(tmp_path / "huge.png", compress_level=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "colours.png")
    np.save(tmp_path / "two.npy", np.zeros((2, 8, 8), np.uint8))
    np.save(tmp_path / "halves.npy", np.zeros((8, 8)))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    marked = np.zeros((16, 16), np.uint8)
    marked[:8] = 255
    Image.fromarray(marked).save(tmp_path / "marked.png")
    reasons = {
        "cut.png": "cut.png cannot be decoded as an image",
        "class.png": "class.png has class 5 at row 0, column 0 of map 0",
        "huge.png": "huge.png cannot be decoded as an image",
        "colours.png": "colours.png is no map of classes",
        "two.npy": "two.npy has more than one map, but belongs to an image",
        "halves.npy": "halves.npy must hold integers",
        "objects.npy": "objects.npy is not a readable .npy file",
        "nowhere.png": "nowhere.png does not exist",
    }
    image = str(sketches / "image0.png")
    rows = [row(name, image, str(tmp_path / name)) for name in reasons]
    rows += [row("none", image, None), row("marked", image, str(tmp_path / "marked.png"))]
    rows += [row(f"good{n}", image, str(sketches / f"image{n}.map.png")) for n in range(3)]
    manifest = write_manifest(tmp_path / "hostile.jsonl", rows)
    output = tmp_path / "corpus"
    command = arguments(manifest, output, sketch_tools, "--attempts", "1", "--no-report")
    assert main([*command, "--sketch-unlabelled", "255"]) == 0
    read = Corpus(output)
    names = [read.item(n)["id"] for n in range(len(read))]
    assert names == ["marked", "good0", "good1", "good2"]
    found = failures(output)
    assert found.pop("none") == "item 'none' has no sketch, which --sketch-vqgan asks for"
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name], found[name]
        assert "\n" not in found[name]
    assert main(["verify", str(output), "--full"]) == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--sketch-vqgan", "{tools}/other.safetensors"], "was begun with another VQ-GAN-Seg"),
        (["--sketch-unlabelled", "255"], "begun with sketch_unlabelled = None, and now it is 255"),
        (None, "was begun with sketches (--sketch-vqgan)"),
    ],
)
def test_a_rerun_with_other_sketches_is_refused(
    corpus: Path,
    sketches: Path,
    sketch_tools: Path,
    more: list[str] | None,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(corpus)
    added = [each.format(tools=sketch_tools) for each in more or []]
    command = arguments(sketches / "clips.jsonl", corpus, sketch_tools, *CLIPS, *added)
    if more is None:
        place = command.index("--sketch-vqgan")
        del command[place : place + 2]
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert contents(corpus) == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--sketch-vqgan": "vqgan"}, "is a VQ-GAN of pictures; name a VQ-GAN-Seg"),
        ({"--sketch-vqgan": "coarse"}, "has grids of 2² tokens, but --vqgan"),
        ({"--vqgan": "sketch"}, "is a VQ-GAN of sketches; name one of pictures"),
        ({"--sketch-vqgan": None, "--sketch-unlabelled": "255"}, "but no --sketch-vqgan"),
    ],
)
def test_tokenizers_that_do_not_fit_write_nothing(
    sketches: Path,
    sketch_tools: Path,
    tmp_path: Path,
    changes: dict[str, str | None],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(sketches / "clips.jsonl", tmp_path / "none", sketch_tools, *CLIPS)
    for option, value in changes.items():
        if option in command:
            place = command.index(option)
            del command[place : place + 2]
        if value is not None:
            file = sketch_tools / f"{value}.safetensors"
            command += [option, str(file) if file.exists() else value]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_a_process_of_its_own_gives_the_same_maps(sketches: Path) -> None:
    item = SourceItem("c", sketches / "clip1.mp4", ("a",), sketch=sketches / "clip1.npy", end=0.6)
    settings = DecodeSettings(image_size=32, frames=4, frames_per_second=5, short_clips="pad")
    wanted = SketchSettings(image_size=SIDE, classes=CLASSES, codebook_size=8)
    demands = Demands(settings, DEFAULT_LIMITS, FilterSettings(), wanted)
    here, there = decode_item(item, demands), decode_alone(item, demands)
    assert here.real == there.real == 3
    assert here.maps is not None
    assert there.maps is not None
    np.testing.assert_array_equal(here.frames, there.frames)
    np.testing.assert_array_equal(here.maps, there.maps)
    assert here.maps.shape == (4, SIDE, SIDE)
    # The clip's last frame is repeated, and with it the map of that frame, not the next one.
    np.testing.assert_array_equal(here.maps[3], here.maps[2])
    assert (here.maps[2] != here.maps[1]).any()
    lone = SourceItem("c", item.media, ("a",))
    for decode in (decode_item, decode_alone):
        with pytest.raises(UserError, match="item 'c' has no sketch"):
            decode(lone, demands)


def test_folders_and_tars_bring_their_sketches(
    sketches: Path, sketch_tools: Path, tmp_path: Path
) -> None:
    folder, tar_path = tmp_path / "folder", tmp_path / "samples.tar"
    folder.mkdir()
    with tarfile.open(tar_path, "w") as tar:
        for number in range(3):
            picture, map_ = (sketches / f"image{number}{end}" for end in (".png", ".map.png"))
            stack = io.BytesIO()
            np.save(stack, np.asarray(Image.open(map_)))
            for name, content in {
                "png": picture.read_bytes(),
                "txt": CAPTIONS[0].encode(),
                "sketch.npy": stack.getvalue(),
            }.items():
                (folder / f"{number}.{name}").write_bytes(content)
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = []
    for source in (folder, tar_path):
        output = tmp_path / f"corpus_{source.name}"
        assert main(arguments(source, output, sketch_tools, "--no-report")) == 0
        read = Corpus(output)
        found.append([read.sketch(index).tolist() for index in range(3)])
    assert found[0] == found[1]


def test_near_duplicates_leave_the_others_their_sketches(
    sketches: Path, sketch_tools: Path, tmp_path: Path
) -> None:
    shown: Sequence[int] = (0, 1, 0, 2)
    rows = [
        row(f"i{place}", str(sketches / f"image{n}.png"), str(sketches / f"image{place}.map.png"))
        for place, n in enumerate(shown)
    ]
    manifest = write_manifest(tmp_path / "alike.jsonl", rows)
    filters = tmp_path / "filters.yaml"
    filters.write_text(yaml.safe_dump({"near_duplicates": {"distance": 4}}))
    read = []
    for name, more in (("all", ()), ("few", ("--filters", str(filters)))):
        command = arguments(manifest, tmp_path / name, sketch_tools, "--no-report", *more)
        assert main(command) == 0
        read.append(Corpus(tmp_path / name))
    every, few = read
    assert [few.item(n)["id"] for n in range(len(few))] == ["i0", "i1", "i3"]
    for index, other in enumerate((0, 1, 3)):
        np.testing.assert_array_equal(few.sketch(index), every.sketch(other))
