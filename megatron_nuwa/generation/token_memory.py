"""Tokens of what was encoded before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from torch import Tensor

from megatron_nuwa.models.vqgan import Vqgan

# A clip's tokens take some 35 kB.
_MOST = 256


class TokenMemory:
    """Keeps the tokens of media by their content, so that many samples of one encode it once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def tokens(
        self, vqgan: Vqgan, medium: np.ndarray, encode: Callable[[np.ndarray], Tensor]
    ) -> Tensor:
        """What `encode` gives for the medium with this VQ-GAN, or gave for an equal one.

        It is not to be written to.
        """
        medium = np.ascontiguousarray(medium)
        key = (vqgan, medium.shape, medium.dtype.str, hashlib.sha256(medium.data).digest())
        found = self._kept.get(key)
        if found is None:
            found = encode(medium)
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[key] = found
        return found
