"""Decode ranks, encode ranks and the queue between them; batches that change no token."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from farm_media import CAPTIONS, tokenize_command, write_manifest
from farm_runs import contents, run_farm

from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.shards import read_sidecar
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import load_vqgan
from preprocessing.__main__ import main
from preprocessing.attempts import Attempts
from preprocessing.communicator import LoneClaims
from preprocessing.decode_worker import DecodedItem, Task
from preprocessing.encode_loop import EncodeLoop, Work
from preprocessing.encoder import Encoders, EncoderSettings, FrameEncoder
from preprocessing.options import TokenizeOptions, load_tools, plan_key, settle
from preprocessing.plan import Plan
from preprocessing.shard_items import read_lines
from preprocessing.sources import read_manifest


@pytest.fixture(scope="module")
def images(media: Path) -> Path:
    rows: list[dict[str, object]] = [
        {"id": n, "media": f"image{n % 6}.png" if n % 9 else "lost.png", "captions": CAPTIONS}
        for n in range(1, 41)
    ]
    return write_manifest(media / "roles.jsonl", rows)


@pytest.mark.parametrize(
    ("ranks", "decode_ranks"),
    [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 1), (4, 3), (5, 2)))],
)
def test_corpus_is_the_same_with_decode_ranks_and_threads(
    images: Path, tools: Path, tmp_path: Path, ranks: int, decode_ranks: int
) -> None:
    lone = tokenize_command(images, tmp_path / "lone", tools, "--items-per-shard", "16")
    assert main(lone) == 0
    expected = contents(tmp_path / "lone")
    roles = ["--decode-ranks-per-encoder", str(decode_ranks), "--decode-threads", "2"]
    command = tokenize_command(images, tmp_path / "roles", tools, "--items-per-shard", "16", *roles)
    done = run_farm(ranks, command)
    assert done.returncode == 0, done.stderr
    # MPI knows that all ranks share this machine.
    encoders = -(-ranks // (decode_ranks + 1))
    assert f"tokenize: {encoders} encoder" in done.stdout
    assert contents(tmp_path / "roles") == expected


def test_tokens_are_the_same_for_all_batch_sizes(images: Path, tools: Path, tmp_path: Path) -> None:
    tokens = []
    for size in (1, 3, 7, 32):
        output = tmp_path / f"batch{size}"
        assert main(tokenize_command(images, output, tools, "--batch-size", str(size))) == 0
        corpus = Corpus(output)
        tokens.append(np.stack([corpus.visual(index) for index in range(len(corpus))]))
    for other in tokens[1:]:
        np.testing.assert_array_equal(other, tokens[0])


def test_every_item_has_the_tokens_that_it_has_alone(tools: Path) -> None:
    settings = EncoderSettings(device="cpu", precision="float32", compiled=False)
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    encoder = FrameEncoder(load_vqgan(tools / "vqgan.safetensors"), settings, 32, 0)
    together = encoder.start(frames).tokens()
    alone = [encoder.start(frames[n : n + 1]).tokens()[0] for n in range(len(frames))]
    np.testing.assert_array_equal(together, np.stack(alone))
    in_parts = FrameEncoder(encoder.vqgan, settings, 4, 0).start(frames).tokens()
    np.testing.assert_array_equal(in_parts, together)


BAD = (2, 3, 9, 25, 28)


class SlowFirstDecoder:
    """Answers the first task only when all others have been answered, the rest at once."""

    def __init__(self, total: int, bad: Collection[int] = ()) -> None:
        self.given: list[int] = []
        self._bad = bad
        self._frames = np.zeros((1, 32, 32, 3), np.uint8)
        self._waiting: list[DecodedItem] = []
        self._first: DecodedItem | None = None
        self._total = total

    def submit(self, task: Task) -> None:
        self.given.append(task.planned.row)
        text = np.zeros((1, 77), np.uint16)
        decoded = DecodedItem(task.ticket, self._frames, text, 1, None, 0.0)
        if task.planned.row in self._bad:
            decoded = DecodedItem(task.ticket, None, None, 0, "it is bad", 0.0)
        if task.planned.row == 0:
            self._first = decoded
        else:
            self._waiting.append(decoded)

    def collect(self) -> DecodedItem | None:
        if self._waiting:
            return self._waiting.pop()
        if len(self.given) == self._total:
            first, self._first = self._first, None
            return first
        return None


@pytest.fixture
def loop_parts(media: Path, tools: Path, tmp_path: Path) -> tuple[Work, FrameEncoder]:
    rows: list[dict[str, object]] = [
        {"id": n, "media": "image0.png", "captions": CAPTIONS[:1]} for n in range(40)
    ]
    manifest = write_manifest(media / "loop.jsonl", rows)
    options = TokenizeOptions(
        source=manifest,
        output=tmp_path,
        vqgan=tools / "vqgan.safetensors",
        bpe=tools / "bpe.json",
        items_per_shard=10,
        batch_size=4,
    )
    vqgan, bpe = load_tools(options)
    plan = Plan(tmp_path / "plan", 10)
    source = read_manifest(manifest)
    plan.write(source, plan_key(options, source))
    settings = settle(options, source, vqgan, bpe)
    work = Work(range(settings.shards), plan, settings, tmp_path, media, {0: Attempts(failed=1)})
    return work, FrameEncoder(vqgan, settings.encoder, 4, 0)


def test_slow_item_blocks_nothing_but_its_batch(
    loop_parts: tuple[Work, FrameEncoder],
) -> None:
    work, encoder = loop_parts
    decoder = SlowFirstDecoder(40, BAD)
    loop = EncodeLoop(work, Encoders(encoder), [decoder], LoneClaims(), lambda: None, 1)
    end = time.monotonic() + 30
    for _ in loop.run():
        assert time.monotonic() < end
        # Back-pressure: no more is given out than the queue holds.
        assert len(decoder.given) - loop.figures.frames <= loop.capacity
    assert sorted(decoder.given) == list(range(40))
    assert loop.figures.items == 40
    assert loop.figures.shards == 4
    # In the order of the manifest, whatever the order in which they came.
    for number in range(4):
        sidecar = read_sidecar(work.output / f"shard-00000{number}.json")
        rows = range(10 * number, 10 * number + 10)
        found = [line["id"] for line in read_lines(work.output, sidecar)]
        assert found == [str(row) for row in rows if row not in BAD]
        assert [failure.id for failure in sidecar.failures] == [str(r) for r in rows if r in BAD]


def test_bfloat16_on_cpu_gives_valid_tokens_and_is_part_of_the_settings(
    images: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "corpus"
    assert main(tokenize_command(images, output, tools, "--precision", "bfloat16")) == 0
    assert main(["verify", str(output), "--full"]) == 0
    capsys.readouterr()
    assert main(tokenize_command(images, output, tools)) == 2
    assert "was begun with precision = bfloat16, and now it is float32" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(
    images: Path, tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    output = tmp_path / "corpus"
    assert main(tokenize_command(images, output, tools, "--device", "cuda")) == 2
    assert "--device cuda needs a GPU" in capsys.readouterr().err
    assert not output.exists()
    on_gpus = EncoderSettings(device="cuda", precision="bfloat16", compiled=True)
    with pytest.raises(UserError, match="encoded on GPUs, and this rank has none"):
        FrameEncoder(load_vqgan(tools / "vqgan.safetensors"), on_gpus, 32, 0)


@pytest.mark.gpu
def test_gpu_encodes_alike_on_every_start(tools: Path) -> None:
    settings = EncoderSettings.chosen()
    assert settings == EncoderSettings(device="cuda", precision="bfloat16", compiled=True)
    frames = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    tokens = [
        FrameEncoder(load_vqgan(tools / "vqgan.safetensors"), settings, 32, 0).start(frames)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(tokens[0].tokens(), tokens[1].tokens())
    exact = load_vqgan(tools / "vqgan.safetensors").double()
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 127.5 - 1
    agreement = (exact.encode(images).numpy() == tokens[0].tokens()).mean()
    assert agreement > 0.9


@pytest.mark.slow
def test_compiled_encoder_gives_the_tokens_of_the_plain_one(tools: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    tokens = [
        FrameEncoder(
            load_vqgan(tools / "vqgan.safetensors"),
            EncoderSettings(device="cpu", precision="float32", compiled=compiled),
            4,
            0,
        )
        .start(frames)
        .tokens()
        for compiled in (False, True)
    ]
    assert tokens[0].shape == tokens[1].shape == (9, 4, 4)
    assert (tokens[0] == tokens[1]).mean() > 0.98
