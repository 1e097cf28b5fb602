"""The VQ-GAN's encoder as it is compiled for GPUs."""

from __future__ import annotations

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
