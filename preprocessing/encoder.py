"""Frames to visual tokens: the VQ-GAN's side of the farm."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.config import Settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.models.vqgan import Vqgan
from megatron_nuwa.parallel.accelerator import default_device

Precision = Literal["float32", "bfloat16"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

# Where and how fast Inductor compiles, which may differ from rank to rank.
_NOT_ARITHMETIC = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")


class EncoderSettings(Settings):
    """What decides the bits of the encoder's arithmetic, and with them the tokens.

    With `compiled`, batches are filled up to one shape, so that there is one compiled program.
    """

    device: Literal["cpu", "cuda"]
    precision: Precision
    compiled: bool

    @classmethod
    def chosen(
        cls,
        device: DeviceChoice = "auto",
        precision: Precision | None = None,
        compiled: bool | None = None,
    ) -> EncoderSettings:
        """The settings asked for; None is float32 on CPUs, bfloat16 and compiled on GPUs.

        Raises `UserError` where "cuda" is asked for and there is none, and where "auto" would fall
        back to the CPU although a GPU is meant.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "--device cuda needs a GPU that PyTorch can use, and there is none here; leave "
                "--device out, or run where there is one"
            )
        # The choice is frozen with the corpus: a driver that is broken today must not make it.
        cuda = (default_device().type if device == "auto" else device) == "cuda"
        return cls(
            device="cuda" if cuda else "cpu",
            precision=precision or ("bfloat16" if cuda else "float32"),
            compiled=cuda if compiled is None else compiled,
        )


def engine(settings: EncoderSettings, gpu: int) -> str:
    """What this process encodes with: tokens of two of them may differ in a few places.

    On a GPU the variables are named, too, that choose its arithmetic from outside of PyTorch's
    settings. Raises `UserError` where that is a GPU, and this process has none.
    """
    if settings.device != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"CPU ({capability}), PyTorch {torch.__version__}"
    _check_gpu()
    # PyTorch may be built for another cuDNN than the one that is loaded.
    names = [
        torch.cuda.get_device_name(gpu),
        f"PyTorch {torch.__version__}",
        f"cuDNN {torch.backends.cudnn.version()}",
    ]
    return ", ".join([*names, *_outside_arithmetic(settings.compiled)])


def _outside_arithmetic(compiled: bool) -> list[str]:
    """Variables with their values that change what a GPU computes, whatever PyTorch is told."""
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name == "NVIDIA_TF32_OVERRIDE"
        or (compiled and name.startswith("TORCHINDUCTOR_") and name not in _NOT_ARITHMETIC)
    ]


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError(
            "the corpus is encoded on GPUs, and this rank has none; start the farm only on "
            "machines with GPUs, or tokenize with --device cpu"
        )


@dataclass(frozen=True)
class EncodedBatch:
    """A batch under work; on a GPU the processor goes on meanwhile."""

    _tokens: Tensor
    _event: torch.cuda.Event | None

    def is_ready(self) -> bool:
        """Whether `tokens` would not wait."""
        return self._event is None or bool(self._event.query())

    def tokens(self) -> np.ndarray:
        """The tokens, uint16 (frames, h, w)."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.numpy().astype(np.uint16)


class FrameEncoder:
    """Encodes batches of frames or maps; the same batch gives the same tokens on every rank."""

    def __init__(
        self,
        vqgan: Vqgan,
        settings: EncoderSettings,
        most: int,
        gpu: int,
        channels_last: bool | None = None,
    ) -> None:
        """`most` is how many frames go through the VQ-GAN at once; `gpu` is this process's number
        of the GPU, where it encodes on one.

        `channels_last` None is what the device's convolutions want: true on GPUs. Raises
        `UserError` where the settings ask for a GPU that this process does not have.
        """
        self._most = most
        self._settings = settings
        last = settings.device == "cuda" if channels_last is None else channels_last
        self._layout = torch.channels_last if last else torch.contiguous_format
        self.vqgan = _placed(vqgan, settings, gpu, self._layout)
        self._device = next(self.vqgan.parameters()).device
        # Two programs: the features are of the chosen precision, the search is in float32.
        self._features: Callable[[Tensor], Tensor] = self._encoded
        self._search: Callable[[Tensor], Tensor] = self.vqgan.quantizer.tokens_of
        if settings.compiled:
            self._features = _compiled(self._features)
            self._search = _compiled(self._search)

    @torch.inference_mode()
    def start(self, frames: np.ndarray) -> EncodedBatch:
        """Begin to encode frames, uint8 (frames, H, W, 3), or maps (frames, H, W) for a VQ-GAN-Seg.

        Classes outside the VQ-GAN's are the caller's mistake: they are encoded as no class at all.
        """
        count, cuda = len(frames), self._settings.device == "cuda"
        if self._settings.compiled and (rest := -count % self._most):
            frames = np.concatenate([frames, np.zeros((rest, *frames.shape[1:]), np.uint8)])
        batch = torch.from_numpy(frames)
        if cuda:
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        tokens = torch.cat([self._tokens(part) for part in batch.split(self._most)])[:count]
        if not cuda:
            return EncodedBatch(tokens, None)
        fetched = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        fetched.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return EncodedBatch(fetched, event)

    def _tokens(self, frames: Tensor) -> Tensor:
        bfloat16 = self._settings.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16):
            features = self._features(frames)
        return self._search(features.float())

    def _encoded(self, frames: Tensor) -> Tensor:
        classes = self.vqgan.config.classes
        if classes is None:
            images = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        else:
            # Not `segmentation.one_hot`, which looks at the values: a compiled program cannot.
            numbers = torch.arange(classes, device=frames.device).view(1, -1, 1, 1)
            images = (frames.unsqueeze(1) == numbers).float()
        features: Tensor = self.vqgan.encoder(images.contiguous(memory_format=self._layout))
        return features


@dataclass(frozen=True)
class Encoders:
    """What items are encoded with: their frames, and their sketches where they have any."""

    frames: FrameEncoder
    sketches: FrameEncoder | None = None


def _compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return cast(Callable[[Tensor], Tensor], torch.compile(function, dynamic=False))


def make_arithmetic_the_same() -> None:
    """Have every process of one kind of GPU take the same kernels, whatever else runs there.

    cuDNN and Inductor would otherwise time several, which sum in different orders, and take the
    fastest of the moment.
    """
    # Imported here because it takes a second, which CPUs need not spend.
    from torch._inductor import config as inductor

    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Not every version has it, and to set what it does not know is an error.
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def _placed(
    vqgan: Vqgan, settings: EncoderSettings, gpu: int, layout: torch.memory_format
) -> Vqgan:
    """Put the VQ-GAN where it runs, and make its arithmetic the same on every rank.

    Each rank works with one thread. On CPUs the sums of a convolution depend on how many threads
    share it, and a corpus must not depend on how many ranks share the machine; beside a GPU, a
    rank's threads, one a core, would only take the cores from its decode ranks.
    """
    torch.set_num_threads(1)
    if settings.device == "cuda":
        _check_gpu()
        make_arithmetic_the_same()
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)
        vqgan = vqgan.to(device)
    # PyTorch declares this form of `to` for tensors only.
    return vqgan.to(memory_format=layout)  # type: ignore[call-overload]
