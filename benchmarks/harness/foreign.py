"""Other packages' closest calls: no dependencies, and not quite the same function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock, patch

from torch import Tensor, nn

from benchmarks.harness.cases import Case, Load
from benchmarks.harness.unavailable import UnavailableError

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

_TORCHVISION = ("torchvision", *(f"torchvision.{m}" for m in ("transforms", "datasets", "utils")))


def natten_call(case: Case, load: Load) -> Call:
    """Neighborhood attention with the same widths.

    Causal along frames it keeps half of the window's frames, the query's own among them; an image
    has no such axis, and so no causal form.
    """
    grid, context, extent, causal = case.geometry
    if grid != context:
        raise UnavailableError("needs queries and keys on one grid")
    try:
        import natten
    except ImportError as error:
        raise UnavailableError(f"natten cannot be imported: {error}") from error
    # Without a GPU it has FlexAttention alone, and refuses to compile it.
    options = {"backend": "flex-fna"} if load.device.type == "cpu" else {}
    if grid.s == 1:
        window = (extent.h, extent.w)
        return lambda q, k, v: natten.na2d(q, k, v, window, **options)
    assert extent.s is not None
    frames = extent.s // 2 + 1 if causal else extent.s
    volume = (frames, extent.h, extent.w)
    return lambda q, k, v: natten.na3d(q, k, v, volume, is_causal=(causal, False, False), **options)


def sparse_3dna_call(case: Case, load: Load) -> Call:
    """nuwa-pytorch's module on the queries alone; it projects them to keys and values itself."""
    grid, context, extent, causal = case.geometry
    if grid != context or grid.h != grid.w:
        raise UnavailableError("is self-attention over square frames")
    module = _sparse_3dna_class()(
        dim=load.heads * load.head_size,
        video_shape=(grid.s, grid.h, grid.w),
        kernel_size=(extent.s, extent.h, extent.w),
        heads=load.heads,
        dim_head=load.head_size,
        causal=causal,
    ).to(load.device, load.dtype)

    return lambda q, k, v: module(q.flatten(2)).unflatten(2, (load.heads, -1))


def _sparse_3dna_class() -> type[nn.Module]:
    module: type[nn.Module] = import_nuwa_pytorch().Sparse3DNA
    return module


def import_nuwa_pytorch() -> Any:
    """The module of nuwa-pytorch's layers and sampler; `UnavailableError` where there is none."""
    # The package imports torchvision for its VQ-GAN; a placeholder serves where that is missing
    # or does not fit this torch, since attention and sampler never touch it.
    stands_in = {name: MagicMock() for name in _TORCHVISION if name not in sys.modules}
    try:
        with patch.dict(sys.modules, stands_in):
            from nuwa_pytorch import nuwa_pytorch
    except ImportError as error:
        raise UnavailableError(f"nuwa-pytorch cannot be imported: {error}") from error
    return nuwa_pytorch
