"""Many frames through a VQ-GAN: in bounded memory, with the bits of all at once, each once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_nuwa.generation import parts, token_memory
from megatron_nuwa.generation.tasks import Request, prepare, task_named
from megatron_nuwa.generation.trained import Generator
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig

FRAMES, SIDE, CLASSES = 33, 64, 5


@pytest.fixture(scope="module")
def larger(generator: Generator) -> Generator:
    """VQ-GANs of a size at which convolutions have several kernels."""
    torch.manual_seed(1)
    config = VqganConfig(image_size=SIDE, downsampling=8, base_channels=32, codebook_size=256)
    maps = config.model_copy(update={"classes": CLASSES})
    return replace(generator, vqgan=Vqgan(config).eval(), sketch_vqgan=Vqgan(maps).eval())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for what the block computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh(generator: Generator) -> Generator:
    """The same, that has encoded nothing yet."""
    return replace(generator, encoded=token_memory.TokenMemory())


def sizes_seen(vqgan: Vqgan) -> list[int]:
    """Grows by the batch size of every pass through the encoder."""
    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))

    vqgan.encoder.register_forward_pre_hook(note)
    return sizes


@pytest.mark.parametrize("what", ["frames", "sketches"])
@pytest.mark.parametrize("most", [4, 16])
def test_frames_go_in_parts_and_come_out_bit_for_bit(
    larger: Generator, monkeypatch: pytest.MonkeyPatch, what: str, most: int
) -> None:
    random = np.random.default_rng(2)
    assert larger.sketch_vqgan is not None
    if what == "frames":
        frames = random.integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)

        def work() -> np.ndarray:
            return fresh(larger).encode_frames(frames).numpy()
    else:
        maps = random.integers(0, CLASSES, (1, FRAMES, SIDE, SIDE)).astype(np.uint8)

        def work() -> np.ndarray:
            return fresh(larger).sketch_context(maps).tokens.numpy()

    sizes = sizes_seen(larger.sketch_vqgan if what == "sketches" else larger.vqgan)
    # oneDNN shares the frames of a batch out among threads, which changes the last bits.
    with threads(1):
        monkeypatch.setattr(parts, "_PIXELS_AT_ONCE", FRAMES * SIDE * SIDE)
        whole = work()
        assert sizes == [FRAMES]
        sizes.clear()
        monkeypatch.setattr(parts, "_PIXELS_AT_ONCE", most * SIDE * SIDE)
        assert np.array_equal(work(), whole)
    assert sum(sizes) == FRAMES
    assert 1 < min(sizes) <= max(sizes) <= most


@pytest.mark.parametrize("count", [1, 2])
def test_a_pictures_bits_do_not_depend_on_what_it_is_decoded_with(
    larger: Generator, count: int
) -> None:
    tokens = torch.from_numpy(np.random.default_rng(6).integers(0, 256, (8, 64)))
    with threads(count):
        pictures = larger.pixels(tokens, Grid(8, 8, 1))
        for n in (1, 2, 3):
            assert np.array_equal(larger.pixels(tokens[:n], Grid(8, 8, 1)), pictures[:n])
        clips = larger.pixels(tokens.view(2, -1), Grid(8, 8, 4))
    assert np.array_equal(clips.reshape(pictures.shape), pictures)


def test_no_more_than_16_frames_of_the_papers_size_go_at_once() -> None:
    sizes: list[int] = []

    def work(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part

    frames = torch.arange(640).view(640, 1)
    assert torch.equal(parts.in_parts(work, frames, 336 * 336), frames)
    assert max(sizes) == 16
    parts.in_parts(work, frames[:3], 4096 * 4096)
    assert sizes[-3:] == [1, 1, 1]


def test_many_samples_of_a_clip_encode_it_once(generator: Generator) -> None:
    """Over several batches, as the command makes them."""
    generator = fresh(generator)
    random = np.random.default_rng(3)
    clips = random.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    region = np.zeros((1, 16, 16), bool)
    region[:, 8:] = True
    sizes = sizes_seen(generator.vqgan)
    known = []
    for clip in clips:
        for first in range(0, 64, 8):
            requests = [
                Request(task_named("tv2v"), seed, "a red square", clip.copy(), region)
                for seed in range(first, first + 8)
            ]
            prepared = prepare(generator, requests)
            assert prepared.known is not None
            known.append(prepared.known)
    assert sizes == [3, 3]
    expected = [fresh(generator).encode_frames(clip) for clip in clips]
    assert all(torch.equal(each, expected[0].expand(8, -1)) for each in known[:8])
    assert all(torch.equal(each, expected[1].expand(8, -1)) for each in known[8:])


def test_many_samples_of_a_sketch_encode_it_once(generator: Generator) -> None:
    generator = fresh(generator)
    assert generator.sketch_vqgan is not None
    maps = np.random.default_rng(4).integers(0, CLASSES, (2, 3, 16, 16)).astype(np.uint8)
    sizes = sizes_seen(generator.sketch_vqgan)
    requests = [Request(task_named("s2v"), seed, sketch=maps[seed % 2]) for seed in range(8)]
    contexts = [prepare(generator, requests).contexts[0].tokens for _ in range(2)]
    assert sizes == [3, 3]
    expected = fresh(generator).sketch_context(maps).tokens
    assert torch.equal(contexts[0], expected.repeat(4, 1))
    assert torch.equal(contexts[0], contexts[1])


def test_another_vqgan_encodes_anew(generator: Generator, larger: Generator) -> None:
    frames = np.random.default_rng(5).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    generator.encode_frames(frames)
    other = replace(generator, vqgan=larger.vqgan)
    assert torch.equal(other.encode_frames(frames), fresh(larger).encode_frames(frames))


def test_what_is_kept_of_media_is_bounded(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_memory, "_MOST", 3)
    memory = token_memory.TokenMemory()
    for number in range(10):
        medium = np.full((2, 2), number)
        assert memory.tokens(generator.vqgan, medium, torch.from_numpy)[0, 0] == number
        assert len(memory._kept) <= 3
