"""Each of the eight tasks, from a request to tokens, with a small model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CAPTIONS

from megatron_nuwa.data.text import NO_CAPTION
from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.sampling import SamplingSettings
from megatron_nuwa.generation.tasks import TASKS, Request, generate, grid_of, prepare, task_named
from megatron_nuwa.generation.trained import Generator, make_generator
from megatron_nuwa.grid import Grid

CLASSES, SIDE, FRAMES = 5, 16, 3
RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
CLIP = RANDOM.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
RIGHT_HALF = np.zeros((1, SIDE, SIDE), bool)
RIGHT_HALF[..., SIDE // 2 :] = True
SKETCH = RANDOM.integers(0, CLASSES, (FRAMES, SIDE, SIDE)).astype(np.uint8)


def request(name: str, seed: int = 0, **changes: object) -> Request:
    """A whole request of a task."""
    task = task_named(name)
    pixels = None
    if task.given != "nothing":
        pixels = PICTURE if task.target == "image" else CLIP
        pixels = CLIP[:1] if task.given == "frames" else pixels
    fields: dict[str, object] = {
        "prompt": CAPTIONS[0] if task.reads == "text" else NO_CAPTION,
        "pixels": pixels,
        "region": RIGHT_HALF if task.given == "region" else None,
        "sketch": SKETCH[: grid_frames(name)] if task.reads == "sketch" else None,
    }
    return Request(task, seed, **{**fields, **changes})  # type: ignore[arg-type]


def grid_frames(name: str) -> int:
    return 1 if task_named(name).target == "image" else FRAMES


def sample(generator: Generator, *requests: Request) -> torch.Tensor:
    return generate(generator, prepare(generator, requests), SamplingSettings())


def test_the_eight_tasks_are_those_of_the_paper() -> None:
    table = {name: (task.target, task.reads, task.given) for name, task in TASKS.items()}
    assert table == {
        "t2i": ("image", "text", "nothing"),
        "s2i": ("image", "sketch", "nothing"),
        "i2i": ("image", "none", "region"),
        "ti2i": ("image", "text", "region"),
        "t2v": ("clip", "text", "nothing"),
        "s2v": ("clip", "sketch", "nothing"),
        "v2v": ("clip", "none", "frames"),
        "tv2v": ("clip", "text", "region"),
    }


@pytest.mark.parametrize("name", TASKS)
def test_every_task_writes_its_grid_and_repeats_by_its_seed(
    generator: Generator, name: str
) -> None:
    grid = Grid(4, 4, grid_frames(name))
    assert grid_of(generator, TASKS[name]) == grid
    together = sample(generator, request(name, 1), request(name, 2))
    assert together.shape == (2, grid.cells)
    assert torch.equal(sample(generator, request(name, 1))[0], together[0])
    assert not torch.equal(together[0], together[1])
    assert generator.pixels(together, grid).shape == (2, grid.s, SIDE, SIDE, 3)


@pytest.mark.parametrize("name", ["i2i", "ti2i", "tv2v"])
def test_kept_regions_come_out_unchanged_token_for_token(generator: Generator, name: str) -> None:
    random = np.random.default_rng(5)
    regions = [RIGHT_HALF]
    for share in (0.01, 0.05):
        regions.append(random.random((grid_frames(name), SIDE, SIDE)) < share)
    requests = [request(name, 3, region=region) for region in regions]
    prepared = prepare(generator, requests)
    tokens = generate(generator, prepared, SamplingSettings())
    given = generator.encode_frames(requests[0].pixels)  # type: ignore[arg-type]
    for row, region in enumerate(regions):
        # Independent of `touched`: a cell of 4 × 4 pixels is kept when none of them is drawn on.
        cells = region.reshape(-1, 4, 4, 4, 4).any((2, 4))
        kept = ~np.broadcast_to(cells, (grid_frames(name), 4, 4)).flatten()
        assert 0 < kept.sum() < len(kept)
        assert torch.equal(tokens[row, kept], given[kept])
        assert not torch.equal(tokens[row, ~kept], given[~kept])


def test_the_given_frames_are_kept_token_for_token(generator: Generator) -> None:
    for count in (1, 2):
        tokens = sample(generator, request("v2v", pixels=CLIP[:count]))
        given = generator.encode_frames(CLIP[:count])
        assert torch.equal(tokens[0, : 16 * count], given)


def test_the_encoder_reads_text_a_sketch_or_none(generator: Generator) -> None:
    none = generator.text_context([NO_CAPTION])
    for name, task in TASKS.items():
        (context,) = prepare(generator, [request(name)]).contexts
        assert context.kind == ("sketch" if task.reads == "sketch" else "text")
        if task.reads == "none":
            assert torch.equal(context.tokens, none.tokens)
        elif task.reads == "text":
            assert not torch.equal(context.tokens, none.tokens)
        else:
            assert context.grid == Grid(4, 4, grid_frames(name))


@pytest.mark.parametrize("name", ["s2i", "s2v"])
def test_another_sketch_gives_another_picture(generator: Generator, name: str) -> None:
    other = ((SKETCH[: grid_frames(name)] + 1) % CLASSES).astype(np.uint8)
    first, second = request(name), request(name, sketch=other)
    tokens = sample(generator, first, second)
    assert not torch.equal(tokens[0], tokens[1])


def test_one_sketch_or_mask_stands_for_all_frames(generator: Generator) -> None:
    still = request("s2v", sketch=SKETCH[:1])
    repeated = request("s2v", sketch=SKETCH[:1].repeat(FRAMES, 0))
    assert torch.equal(sample(generator, still), sample(generator, repeated))
    moving = request("tv2v", region=RIGHT_HALF.repeat(FRAMES, 0))
    assert torch.equal(sample(generator, request("tv2v")), sample(generator, moving))


@pytest.mark.parametrize("name", ["t2v", "s2v", "v2v", "tv2v"])
@pytest.mark.parametrize("frames", [2, 8])
def test_a_video_may_have_another_length_than_the_models(
    generator: Generator, name: str, frames: int
) -> None:
    random = np.random.default_rng(7)
    pixels = random.integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)
    sketch = random.integers(0, CLASSES, (frames, SIDE, SIDE)).astype(np.uint8)
    changes: dict[str, object] = {}
    if name == "tv2v":
        changes = {"pixels": pixels, "region": random.random((frames, SIDE, SIDE)) < 0.03}
    if name == "s2v":
        changes = {"sketch": sketch}
    prepared = prepare(generator, [request(name, **changes)], frames, overlap=1)
    assert prepared.grid == Grid(4, 4, frames)
    tokens = generate(generator, prepared, SamplingSettings())
    assert tokens.shape == (1, 16 * frames)
    if prepared.is_known is not None and prepared.known is not None:
        assert torch.equal(tokens[prepared.is_known], prepared.known[prepared.is_known])
    if name == "s2v":
        windows = [context.tokens for context in prepared.contexts]
        assert len(windows) == (1 if frames == 2 else 4)
        whole = generator.sketch_context(np.concatenate([sketch, sketch[-1:]])[None, :9]).tokens
        for place, window in enumerate(windows):
            assert torch.equal(window[0, :32], whole[0, 32 * place : 32 * place + 32])


@pytest.mark.parametrize(
    ("name", "frames", "overlap", "message"),
    [
        ("t2i", 3, None, "task t2i writes images"),
        ("v2v", 1, None, "1 frames are too few for task v2v"),
        ("t2v", 9, 3, "overlap must be 1 to 2 frames"),
        ("s2v", 9, None, "the sketch has 3 frames: give one for all, or one for each of the 9"),
        ("tv2v", 9, None, "the clip has 3 frames, and 9 are to be changed"),
    ],
)
def test_a_wrong_length_is_one_clear_sentence(
    generator: Generator, name: str, frames: int, overlap: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(generator, [request(name)], frames, overlap)


def test_a_model_of_images_says_that_it_makes_no_clips(generator: Generator) -> None:
    image = Grid(4, 4, 1)
    still = replace(generator, grids=dict.fromkeys(TASKS, image), clip_grid=image)
    for name, frames in (("t2v", 2), ("v2v", 2), ("v2v", None)):
        with pytest.raises(UserError) as caught:
            prepare(still, [request(name)], frames)
        assert (
            str(caught.value) == f"task {name} makes clips, and the model makes single frames only"
        )
    assert prepare(still, [request("t2v")]).grid == image
    assert prepare(still, [request("t2i")]).grid == image


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t2i", {"prompt": "word " * 100}, "at most 77 are allowed"),
        ("t2v", {"prompt": ""}, "is empty"),
        ("i2i", {"pixels": None}, "task i2i needs an image to start from"),
        ("tv2v", {"pixels": None}, "task tv2v needs a clip to start from"),
        ("i2i", {"pixels": PICTURE[:, :12]}, "the image is 16 × 12 pixels, and the model's"),
        ("tv2v", {"pixels": CLIP[:2]}, "the clip has 2 frames, and 3 are to be changed"),
        ("v2v", {"pixels": CLIP}, "3 given frames leave nothing to generate in a clip of 3"),
        ("i2i", {"region": None}, "task i2i needs a region that is made new"),
        ("i2i", {"region": ~RIGHT_HALF & RIGHT_HALF}, "the mask keeps everything"),
        ("ti2i", {"region": RIGHT_HALF | ~RIGHT_HALF}, "the mask keeps nothing"),
        ("tv2v", {"region": RIGHT_HALF.repeat(2, 0)}, "the mask has 2 frames"),
        ("s2i", {"sketch": None}, "task s2i needs a sketch"),
        ("s2v", {"sketch": SKETCH[:2]}, "the sketch has 2 frames"),
        ("s2i", {"sketch": SKETCH[:1, :8]}, "the sketch is 16 × 8 pixels"),
        ("s2i", {"sketch": SKETCH[:1] + 3}, "knows the classes 0 to 4"),
    ],
)
def test_a_wrong_request_is_one_clear_sentence(
    generator: Generator, name: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(generator, [request(name, **changes)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_sketches_says_so(generator: Generator) -> None:
    with pytest.raises(UserError, match="trained on sketches, which this one was not"):
        prepare(replace(generator, sketch_vqgan=None), [request("s2v")])


def test_an_unknown_task_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"task 'ti2v' is unknown; did you mean t.*s2v, v2v, tv2v"):
        task_named("ti2v")
    assert task_named("T2V") is TASKS["t2v"]


def test_every_task_has_the_grid_and_the_rate_that_it_was_trained_on(generator: Generator) -> None:
    def made(**trained: tuple[Grid, float | None]) -> Generator:
        grids = {task: grid for task, (grid, _) in trained.items()}
        rates = {task: rate for task, (_, rate) in trained.items()}
        return make_generator(generator.model, generator.vqgan, generator.bpe, grids, rates)

    short, clip, image, large = Grid(4, 4, 2), Grid(4, 4, 3), Grid(4, 4, 1), Grid(3, 2, 1)
    of_all = made(v2v=(short, 2.0), s2i=(large, None), t2i=(image, None), t2v=(clip, 8.0))
    for name, grid, rate in (
        *(("t2v", clip, 8.0), ("v2v", short, 2.0), ("tv2v", clip, 8.0), ("s2v", clip, 8.0)),
        *(("t2i", image, 8.0), ("s2i", large, 8.0), ("i2i", image, 8.0), ("ti2i", image, 8.0)),
    ):
        own = of_all.for_task(name)
        assert grid_of(of_all, TASKS[name]) == grid_of(own, TASKS[name]) == grid
        assert own.picture_size == (4 * grid.h, 4 * grid.w)
        if TASKS[name].target == "clip":
            assert (own.clip_grid, own.frames_per_second) == (grid, rate)
            assert name == "s2v" or prepare(of_all, [request(name, 1)], 3).window == grid
    # A task that was not trained is like the nearest one of its kind.
    of_sketches = made(s2v=(short, 2.0))
    assert {of_sketches.grids[name] for name in ("s2v", "t2v", "v2v", "tv2v")} == {short}
    assert of_sketches.for_task("tv2v").frames_per_second == 2.0
    assert {of_sketches.grids[name] for name in ("t2i", "i2i")} == {image}
    of_images = made(t2i=(image, None))
    assert of_images.grids["v2v"] == clip
    assert of_images.frames_per_second == 2.5
