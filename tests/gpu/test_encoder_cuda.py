"""The VQ-GAN's encoder as it is compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nuwa.models.quantizer import nearest_codes
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@torch.no_grad()
def test_compiled_features_are_those_in_float64() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    config = VqganConfig(image_size=64, downsampling=8, base_channels=32, code_dim=16)
    encoder = Vqgan(config).eval().encoder.cuda().to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 64, 64, device="cuda") * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    found = torch.compile(encoder, dynamic=False)(images)
    expected = encoder.double()(images.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_compiled_search_writes_no_distances() -> None:
    vectors = torch.randn(2700, 8, device="cuda")
    codes = torch.randn(12288, 8, device="cuda")
    search = torch.compile(nearest_codes, dynamic=False)
    search(vectors, codes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = search(vectors, codes)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < vectors.shape[0] * codes.shape[0] * 4 / 10
    distances = torch.cdist(vectors.double(), codes.double())
    nearest = distances.gather(1, found[:, None])[:, 0]
    torch.testing.assert_close(nearest, distances.amin(dim=1), rtol=1e-5, atol=1e-6)


# An encode rank's tokens, of frames and weights that are the same in every process.
ENCODE = """
import sys
import numpy as np
import torch
from megatron_nuwa.models.vqgan import Vqgan, VqganConfig
from preprocessing.encoder import EncoderSettings, FrameEncoder

torch.manual_seed(0)
config = VqganConfig(image_size=96, downsampling=8, base_channels=64, codebook_size=4096)
settings = EncoderSettings(device=sys.argv[1], precision=sys.argv[2], compiled=True)
encoder = FrameEncoder(Vqgan(config).eval(), settings, 32, 0)
frames = np.random.default_rng(0).integers(0, 256, (32, 96, 96, 3), np.uint8)
np.save(sys.argv[3], encoder.start(frames).tokens())
"""


def tokens_of_processes(folder: Path, count: int, device: str, precision: str) -> list[np.ndarray]:
    """Of processes that run at the same time, each with a compiler's cache of its own."""
    outputs = [folder / f"{number}.npy" for number in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENCODE, device, precision, output],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(output.with_suffix(".cache"))},
        )
        for output in outputs
    ]
    assert [process.wait(500) for process in processes] == [0] * count
    return [np.load(output) for output in outputs]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_ranks_agree_on_every_token_though_each_compiles_alone(
    tmp_path: Path, precision: str
) -> None:
    """Alone on the GPU and beside another, where what is fastest differs."""
    (tmp_path / "alone").mkdir()
    [alone] = tokens_of_processes(tmp_path / "alone", 1, "cuda", precision)
    assert len(np.unique(alone)) > 100
    for beside in tokens_of_processes(tmp_path, 2, "cuda", precision):
        assert np.array_equal(beside, alone)
