"""Frames to visual tokens, in batches that depend on nothing but the order of the frames."""

from __future__ import annotations

import numpy as np
import torch

from megatron_nuwa.models.vqgan import Vqgan


class BatchEncoder:
    """Encodes a stream of frames with a VQ-GAN, `batch_size` frames at a time.

    One encoder serves one shard: batches begin and end with it, so that its tokens are the same
    whichever rank makes it and whatever was made before.
    """

    def __init__(self, vqgan: Vqgan, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self._vqgan = vqgan
        self._batch_size = batch_size
        self._device = next(vqgan.parameters()).device
        self._waiting: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        """Take the next frames, uint8 (frames, H, W, 3)."""
        self._waiting += list(frames)
        while len(self._waiting) >= self._batch_size:
            self._encode(self._batch_size)

    def finish(self) -> np.ndarray:
        """Encode what waits and return all tokens: uint16 (frames, h, w)."""
        if self._waiting:
            self._encode(len(self._waiting))
        side = self._vqgan.grid_side
        return np.concatenate(self._tokens or [np.empty((0, side, side), np.uint16)])

    @torch.inference_mode()
    def _encode(self, count: int) -> None:
        batch = torch.from_numpy(np.stack(self._waiting[:count])).to(self._device)
        del self._waiting[:count]
        images = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        tokens = self._vqgan.encode(images.contiguous())
        self._tokens.append(tokens.cpu().numpy().astype(np.uint16))


def prepare_device(vqgan: Vqgan, local_rank: int) -> Vqgan:
    """Put the VQ-GAN where it runs, and make its arithmetic the same on every rank.

    On CPUs each rank works with one thread: the sums of a convolution depend on how many threads
    share it, and a corpus must not depend on how many ranks share the machine.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        return vqgan.to(torch.device("cuda", local_rank % torch.cuda.device_count()))
    torch.set_num_threads(1)
    return vqgan
