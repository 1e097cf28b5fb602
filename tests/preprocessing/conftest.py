"""Small real media, a small VQ-GAN and a small BPE."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from disks import FailingDisk, MakeDisk, MemoryDisk, unmount
from farm_clips import clip_command, clip_rows
from farm_media import CAPTIONS, WriteClip, write_manifest
from farm_runs import contents
from PIL import Image
from shot_films import changes

from megatron_nuwa.data.text import TextTokenizer, train_bpe
from megatron_nuwa.decoders.ffmpeg_program import ffmpeg_program
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig, save_vqgan
from preprocessing import shot_manifest
from preprocessing.__main__ import main


@pytest.fixture(scope="session")
def write_clip() -> WriteClip:
    """Write a clip whose frame k is grey with level `levels[k]`, `rate` frames a second."""

    def write(
        path: Path,
        levels: list[int],
        rate: float = 10,
        size: tuple[int, int] = (64, 48),
        *codec: str,
    ) -> Path:
        width, height = size
        raw = b"".join(bytes([level]) * (width * height * 3) for level in levels)
        command = [ffmpeg_program(), "-y", "-v", "error", "-nostdin"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
        command += ["-r", str(rate), "-i", "pipe:", *(codec or ("-c:v", "libx264")), str(path)]
        # The pipe is the input here, so -nostdin only keeps ffmpeg from reading commands in it.
        subprocess.run(command, input=raw, check=True)
        return path

    return write


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vqgan.safetensors` (32² → 4×4, 64 codes) and `bpe.json`."""
    folder = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    config = VqganConfig(
        image_size=32,
        downsampling=8,
        base_channels=8,
        residual_blocks=1,
        attention=False,
        codebook_size=64,
        code_dim=8,
        lookup_dim=None,
    )
    save_vqgan(Vqgan(config), folder / "vqgan.safetensors")
    train_bpe(CAPTIONS, 600).save(folder / "bpe.json")
    return folder


@pytest.fixture(scope="session")
def bpe(tools: Path) -> TextTokenizer:
    return TextTokenizer.load(tools / "bpe.json")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `shots` take a network that needs no weights."""
    monkeypatch.setattr(shot_manifest, "load_network", lambda device: changes)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory, write_clip: WriteClip) -> Path:
    """Seven good clips of 8 frames at 10 frames a second, one corrupt, and six images."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(7):
        write_clip(folder / f"clip{number}.mp4", [30 * number + 5 * k for k in range(8)])
    whole = (folder / "clip3.mp4").read_bytes()
    (folder / "corrupt.mp4").write_bytes(whole[: len(whole) // 2])
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"image{number}.png")
    return folder


@pytest.fixture(scope="session")
def clip_manifest(media: Path) -> Path:
    """A manifest of clips, some of them broken."""
    return write_manifest(media / "clips-and-broken-ones.jsonl", clip_rows())


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, clip_manifest: Path, tools: Path
) -> dict[str, bytes]:
    """What a farm that nothing happens to makes of them."""
    output = tmp_path_factory.mktemp("undisturbed") / "corpus"
    assert main(clip_command(clip_manifest, output, tools)) == 0
    return contents(output)


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Make a disk of so many pages."""
    with ExitStack() as disks:

        def make(pages: int) -> MemoryDisk:
            disk = MemoryDisk(tmp_path / "disk", pages)
            disks.callback(unmount, disk.folder)
            return disk

        yield make


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    disk = FailingDisk(tmp_path / "disk")
    yield disk
    unmount(disk.folder)


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """The address of a bucket on a local S3-compatible server, which s3fs talks to."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # fsspec keeps one connection for the whole session, and with it the address.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", "local")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "local")
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            fsspec.filesystem("s3").mkdir("corpora")
            yield "s3://corpora"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def object_store(object_server: str) -> str:
    """An address in the bucket that no other test uses."""
    return f"{object_server}/{uuid.uuid4()}"
