"""launch/generate.py: every task from files to files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from helpers import run_command_line
from PIL import Image, ImageSequence

from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation import tasks
from megatron_nuwa.generation.trained import open_generator
from megatron_nuwa.parallel import accelerator
from megatron_nuwa.training.checkpoint import Checkpoints, read_manifest

PROMPT, OTHER = "a red square moves left", "a blue circle stays <b>&amp;</b>"


def text_of(path: Path) -> dict:
    """What a file says about itself."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return dict(picture.text)  # type: ignore[attr-defined]
    if path.suffix == ".gif":
        with Image.open(path) as picture:
            return json.loads(picture.info["comment"])
    ffmpeg = [ffmpeg_program(), "-v", "error", "-i", path, "-f", "ffmetadata", "-"]
    written = subprocess.run(ffmpeg, check=True, capture_output=True, text=True).stdout
    comment = re.search(r"^comment=(.*)$", written, re.MULTILINE)
    assert comment is not None
    return json.loads(re.sub(r"\\(.)", r"\1", comment[1]))


def pictures(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(opened)])


class Page(HTMLParser):
    """The addresses and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "iframe", "object")
        if "src" in values:
            self.sources.append(str(values["src"]))
        if tag == "a":
            self.links.append(str(values["href"]))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_generation_does_not_fall_back_to_the_cpu_where_a_gpu_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accelerator, "_NVIDIA_DRIVER", tmp_path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(UserError, match=r"an NVIDIA driver is here .* but CUDA does not work"):
        open_generator(tmp_path / "run", "--run")
    for device, choice in ((torch.device("cpu"), None), (None, "cpu")):
        if choice:
            monkeypatch.setenv("DS_ACCELERATOR", choice)
        with pytest.raises(UserError, match=r"^--run"):
            open_generator(tmp_path / "run", "--run", device)


def test_the_command_line_runs_as_documented(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_command_line(
        *(sys.executable, "launch/generate.py", "t2i", "--run", run, "--output", output),
        *("--prompt", PROMPT, "--samples", "2", "--guidance", "2", "--top-k", "8"),
    )
    assert done.returncode == 0, done.stderr
    assert "wrote 2 images" in done.stdout
    assert sorted(path.name for path in output.iterdir()) == [
        *("0000.png", "0001.png", "index.html", "samples.json", "sheet.png")
    ]
    wrong = run_command_line(sys.executable, "launch/generate.py", "i2v", "--run", run)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: task 'i2v' is unknown; did you mean")
    assert len(wrong.stderr.splitlines()) == 1


def test_help_has_an_example_of_every_task(command: ModuleType) -> None:
    assert command.__doc__ is not None
    for name in command.TASKS:
        assert f"launch/generate.py {name} --run RUN" in command.__doc__


WITH_PROMPT = ("--prompt", PROMPT)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("t2i", WITH_PROMPT),
        ("i2i", ("--image", "photo.png", "--region", "0.5,0,1,1")),
        ("ti2i", ("--image", "photo.png", "--mask", "photo-mask.png", *WITH_PROMPT)),
        ("s2i", ("--sketch", "sketch.png")),
        ("t2v", (*WITH_PROMPT, "--top-p", 0.9)),
        ("s2v", ("--sketch", "sketch.npy")),
        ("s2v", ("--sketch", "sketch.png")),
        ("v2v", ("--clip", "clip.mp4", "--keep-frames", 2)),
        ("v2v", ("--image", "photo.png")),
        ("tv2v", ("--clip", "clip.mp4", "--mask", "clip-mask.png", *WITH_PROMPT)),
        ("tv2v", ("--clip", "clip.mp4", "--mask", "moving-mask.gif", *WITH_PROMPT)),
        ("tv2v", ("--clip", "clip.mp4", "--mask", "moving-mask.npy", *WITH_PROMPT)),
        ("tv2v", ("--clip", "clip.mp4", "--region-frames", "1:2", *WITH_PROMPT)),
    ],
    ids=str,
)
def test_every_file_says_how_it_was_made(
    generate, run: Path, media: Path, tmp_path: Path, task: str, arguments: tuple
) -> None:
    filled = [media / str(a) if (media / str(a)).is_file() else a for a in arguments]
    entries = generate(task, *filled, "--seed", 7, "--samples", 2, "--batch-size", 1)
    assert len(entries) == 2
    checkpoint, _ = Checkpoints(run / "checkpoints", keep=1).newest()
    assert checkpoint is not None
    suffixes = [".png"] if task.endswith("2i") else [".gif", ".mp4"]
    for number, entry in enumerate(entries):
        assert [Path(name).suffix for name in entry["files"]] == suffixes
        for name in entry["files"]:
            said = text_of(tmp_path / "out" / name)
            assert said["task"] == task
            assert said["prompt"] == (PROMPT if "--prompt" in arguments else "None")
            assert int(said["seed"]) == 7 + number
            assert float(said["temperature"]) == 1.0
            assert Path(said["checkpoint"]) == checkpoint
            assert int(said["step"]) == 2
            assert said["sha256"] == read_manifest(checkpoint)["model.safetensors"]["sha256"]
            for argument, key in (
                ("--image", "given"),
                ("--clip", "given"),
                ("--mask", "mask"),
                ("--sketch", "sketch"),
            ):
                if argument in arguments:
                    assert said[key] == str(media / arguments[arguments.index(argument) + 1])
    if task.endswith("2v"):
        assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "out/0000.mp4"))[0] == 3


def test_the_same_seed_gives_the_same_files_at_any_batch_size(generate, tmp_path: Path) -> None:
    contents = []
    for size in (1, 3):
        generate("t2i", "--prompt", PROMPT, "--samples", 3, "--batch-size", size)
        contents.append([(tmp_path / f"out/000{n}.png").read_bytes() for n in range(3)])
    assert contents[0] == contents[1]


def test_what_a_mask_keeps_are_the_files_tokens_and_with_keep_pixels_its_pixels(
    generate,
    command: ModuleType,
    run: Path,
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []

    def recorded(*arguments: object, **named: object) -> torch.Tensor:
        written.append(tasks.generate(*arguments, **named))  # type: ignore[arg-type]
        return written[-1]

    monkeypatch.setattr(command, "generate", recorded)
    arguments = ("i2i", "--image", media / "photo.png", "--mask", media / "photo-mask.png")
    generate(*arguments)
    with Image.open(media / "photo.png") as photo:
        # 24 × 20 loses two columns at each side, and becomes 16².
        fitted = np.asarray(photo.resize((16, 16), Image.Resampling.BICUBIC, (2, 0, 22, 20)))
    given = open_generator(run, "--run").encode_frames(fitted[None]).view(4, 4)
    tokens = written[0].view(4, 4)
    assert torch.equal(tokens[:, :2], given[:, :2])
    assert not torch.equal(tokens[:, 2:], given[:, 2:])
    drawn = pictures(tmp_path / "out/0000.png")[0]
    generate(*arguments, "--keep-pixels")
    kept = pictures(tmp_path / "out/0000.png")[0]
    assert np.array_equal(kept[:, :8], fitted[:, :8])
    assert np.array_equal(kept[:, 8:], drawn[:, 8:])


def test_batches_of_prompts_and_pictures_are_all_combined(
    generate, media: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text(f"{OTHER}\n\n")
    entries = generate(
        *("ti2i", "--image", media / "photo.png", "--image", media / "all.png"),
        *("--prompt", PROMPT, "--prompts", listed, "--region", "0,0,0.5,0.5"),
    )
    found = [(Path(entry["given"]).name, entry["prompt"]) for entry in entries]
    assert found == [
        (name, prompt) for name in ("photo.png", "all.png") for prompt in (PROMPT, OTHER)
    ]
    sheet = pictures(tmp_path / "out/sheet.png")
    assert sheet.shape == (1, 32, 32, 3)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(generate, tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_bytes(f"\ufeff{PROMPT}\r\n{OTHER}\r\n".encode())
    assert [entry["prompt"] for entry in generate("t2i", "--prompts", listed)] == [PROMPT, OTHER]


def test_of_several_files_of_prompts_all_are_read(generate, tmp_path: Path) -> None:
    first, second, empty = (tmp_path / f"{number}.txt" for number in range(3))
    first.write_text(f"{PROMPT}\n")
    second.write_text(f"{OTHER}\n")
    files = ("--prompts", first, "--prompts", second)
    entries = generate("t2i", *files, "--prompt", "a green circle")
    assert [entry["prompt"] for entry in entries] == ["a green circle", PROMPT, OTHER]
    empty.write_text("\n")
    with pytest.raises(UserError, match=r"^--prompts .*2\.txt holds no text$"):
        generate("t2i", *files, "--prompts", empty)


def test_a_longer_clip_has_as_many_frames_as_asked_for(
    generate, media: Path, tmp_path: Path
) -> None:
    for task, start in (("t2v", WITH_PROMPT), ("v2v", ("--clip", media / "clip.mp4"))):
        (entry,) = generate(task, *start, "--frames", 7, "--overlap", 2)
        assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "out/0000.mp4"))[0] == 7
        assert text_of(tmp_path / "out/0000.gif")["frames"] == 7
        assert entry["overlap"] == 2


def test_the_best_of_many_are_kept_and_say_their_score(
    generate, command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Brightness:
        def scores(self, pixels: np.ndarray, prompts: list[str]) -> list[float]:
            assert len(pixels) == len(prompts) == 5
            return [float(sample.mean()) for sample in pixels]

    asked = []
    monkeypatch.setattr(
        command.ClipRanker, "load", lambda *arguments: asked.append(arguments) or Brightness()
    )
    prompts = ("--prompt", PROMPT, "--prompt", OTHER)
    generate("t2i", *prompts, "--samples", 5)
    light = [float(pictures(tmp_path / f"out/000{n}.png").mean()) for n in range(10)]
    weights = ("--clip-weights", "clip.safetensors")
    entries = generate("t2i", *prompts, "--samples", 2, "--best-of", 5, *weights)
    assert asked[0][:2] == (Path("clip.safetensors"), "ViT-B-32")
    seeds = [entry["seed"] for entry in entries]
    expected = [sorted(range(5), key=lambda n: -light[n + first])[:2] for first in (0, 5)]
    assert seeds == [*expected[0], *expected[1]]
    said = text_of(tmp_path / "out/0000.png")
    assert float(said["clip_score"]) == pytest.approx(max(light[:5]))
    assert said["best_of"] == "5"
    assert f"CLIP {max(light[:5]):.3f}" in Page((tmp_path / "out/index.html").read_text()).words


def test_the_gallery_shows_what_was_given_beside_what_came_of_it(
    generate, media: Path, tmp_path: Path
) -> None:
    generate(
        *("ti2i", "--image", media / "photo.png", "--region", "0.5,0,1,1", "--samples", 2),
        *("--prompt", PROMPT, "--prompt", OTHER, "--guidance", 2.5),
    )
    text = (tmp_path / "out/index.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"url\(|@import|https?:", text)
    # For each prompt the given picture and two samples.
    assert len(page.sources) == 2 * 3
    assert set(page.links) == {f"000{n}.png" for n in range(4)} | {"samples.json"}
    assert all((tmp_path / "out" / link).is_file() for link in page.links)
    for words in (PROMPT, OTHER, "photo.png", "Image manipulation by text", "2.5", "seed 1"):
        assert words in page.words
    assert "<b>&amp;amp;" not in text.replace("&lt;b&gt;", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("i2v",), "task 'i2v' is unknown; did you mean"),
        (("t2i",), "task t2i (text to image) needs --prompt"),
        (("t2v", "--prompt", "x", "--clip", "clip.mp4"), "takes no --clip"),
        (("v2v", "--clip", "clip.mp4", "--guidance", "2"), "takes no --guidance"),
        (("v2v", "--clip", "clip.mp4", "--region", "0,0,1,0.5"), "takes no --region"),
        (("tv2v", "--prompt", "x", "--clip", "clip.mp4"), "needs --region or --mask"),
        (("i2i", "--image", "photo.png", "--region-frames", "0:1"), "takes no --region-frames"),
        (("t2i", "--run", "nowhere", "--prompt", "x"), "--run: nowhere is no pretraining run"),
        (("t2v", "--prompt", "word " * 100), "at most 77 are allowed"),
        (("t2v", "--prompt", " "), "is empty"),
        (("t2v", "--prompts", "gone.txt"), "--prompts gone.txt cannot be read"),
        (("t2v", "--prompt", "x", "--top-p", "2"), "--top-p must be"),
        (("t2i", "--prompt", "x", "--frames", "4"), "takes no --frames"),
        (("t2v", "--prompt", "x", "--frames", "9", "--overlap", "3"), "overlap must be 1 to 2"),
        (("t2i", "--prompt", "x", "--best-of", "4"), "give it and --clip-weights together"),
        (
            ("t2i", "--prompt", "x", "--best-of", "4", "--clip-weights", "gone.pt"),
            "there is no file of CLIP weights gone.pt",
        ),
        (
            ("t2i", "--prompt", "x", "--samples", "0"),
            "--samples must be a whole number of at least 1, not 0",
        ),
        (("v2v", "--clip", "gone.mp4"), "gone.mp4 does not exist"),
        (("v2v", "--clip", "clip.mp4", "--keep-frames", "3"), "--keep-frames 3 leaves nothing"),
        (("v2v", "--image", "photo.png", "--keep-frames", "2"), "--image is one frame, and"),
        (("i2i", "--image", "photo.png", "--region", "1,2,3"), "must be four numbers"),
        (
            ("i2i", "--image", "photo.png", "--region", "0,0,1,1", "--fit", "exact"),
            "photo.png is 24 × 20 pixels, and the model draws 16 × 16",
        ),
        (
            ("i2i", "--image", "small-mask.png", "--region", "0,0,1,1"),
            "small-mask.png is 12 × 10 pixels, and the model draws 16 × 16: give one",
        ),
        (("i2i", "--image", "photo.png", "--mask", "all.png"), "the mask keeps nothing"),
        (("i2i", "--image", "photo.png", "--mask", "nothing.png"), "the mask keeps everything"),
        (("i2i", "--image", "photo.png", "--mask", "gone.png"), "gone.png does not exist"),
        (
            ("i2i", "--image", "photo.png", "--mask", "small-mask.png"),
            "small-mask.png is 12 × 10 pixels, but MEDIA/photo.png is 24 × 20",
        ),
        (
            ("i2i", "--image", "clip.mp4", "--region", "0,0,1,0.5"),
            "clip.mp4 is a video, and an image is needed here",
        ),
        (
            ("tv2v", "--clip", "photo.png", "--prompt", "x", "--region", "0,0,1,0.5"),
            "photo.png is an image, and a video is needed here",
        ),
        (
            (
                *("tv2v", "--clip", "clip.mp4", "--prompt", "x", "--frames", "4"),
                *("--mask", "moving-mask.npy", "--region-frames", "1:"),
            ),
            "the mask has 3 frames: give one for all, or one for each of the 4",
        ),
        (("s2i",), "task s2i (sketch to image) needs --sketch"),
        (("s2i", "--sketch", "photo-mask.png"), "photo-mask.png has class 255"),
        (("s2i", "--sketch", "sketch.npy"), "sketch.npy has more than one map"),
        (("s2i", "--run", "PLAIN", "--sketch", "sketch.png"), "was not trained on sketches"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    generate,
    media: Path,
    run_without_sketches: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    arguments = tuple(str(run_without_sketches) if a == "PLAIN" else a for a in arguments)
    filled = [str(media / a) if a.endswith((".png", ".mp4", ".npy")) else a for a in arguments]
    with pytest.raises(UserError) as caught:
        generate(*filled)
    assert message.replace("MEDIA", str(media)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["vqgan.safetensors", "bpe.json", "sketch_vqgan.safetensors"])
def test_a_checkpoint_without_its_tokenizer_is_named(
    generate, run: Path, tmp_path: Path, name: str
) -> None:
    file = run / "tokenizers" / name
    moved = file.rename(tmp_path / name)
    try:
        with pytest.raises(UserError, match=f"{name} (does not exist|cannot be read)"):
            generate("t2i", "--prompt", PROMPT)
    finally:
        moved.rename(file)
