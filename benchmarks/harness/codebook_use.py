"""How many codes a tokenizer uses, of those that its data could fill."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megatron_nuwa.models.quantizer import kmeans, nearest_codes
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.training.codebook_upkeep import perplexity
from megatron_nuwa.training.frames import to_images

_FRAMES_AT_ONCE = 64
_ITERATIONS = 5


class CodebookUse(NamedTuple):
    """Counts over all vectors that the encoder makes of the training frames, each frame once.

    `used` codes are taken by a vector. `fillable` is what a codebook made for exactly these
    vectors would use: k-means with as many centres, of which those count that a vector is nearest
    to at the end; vectors that are all but equal share one.
    """

    used: int
    fillable: int
    vectors: int
    training_perplexity: float
    fillable_perplexity: float

    @property
    def use(self) -> float:
        """Share of the codes in use among those that could be."""
        return self.used / self.fillable


@torch.no_grad()
def codebook_use(model: Vqgan, frames: np.ndarray) -> CodebookUse:
    """Of a VQ-GAN for pictures, over frames uint8 (frames, H, W, 3) larger than its image size."""
    size, codes = model.config.image_size, model.config.codebook_size
    corner = (frames.shape[1] - size) // 2
    gathered = []
    for start in range(0, len(frames), _FRAMES_AT_ONCE):
        part = np.array(frames[start : start + _FRAMES_AT_ONCE])
        images = to_images(
            torch.from_numpy(part[:, corner : corner + size, corner : corner + size])
        )
        gathered.append(model.quantizer.to_lookup(model.encoder(images)))
    vectors = torch.cat(gathered)
    counts = torch.bincount(nearest_codes(vectors, model.quantizer.lookup_codes()), minlength=codes)
    generator = torch.Generator().manual_seed(0)
    centres = kmeans(
        vectors,
        min(codes, len(vectors)),
        iterations=_ITERATIONS,
        spherical=model.quantizer.normalise_codes,
        generator=generator,
    )
    filled = torch.bincount(nearest_codes(vectors, centres), minlength=len(centres))
    return CodebookUse(
        used=int((counts > 0).sum()),
        fillable=int((filled > 0).sum()),
        vectors=len(vectors),
        training_perplexity=perplexity(counts),
        fillable_perplexity=perplexity(filled),
    )
