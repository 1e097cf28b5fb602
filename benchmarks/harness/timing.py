"""Times and peak memory of a call on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A call that takes long is repeated less often: its spread is small beside its length. One that
# is over at once is repeated more often: a single interruption would move its median.
_MOST_SECONDS = 2.0
_LEAST_SECONDS = 0.3
_MOST_REPEATS_OF_SHORT_CALLS = 500


class Clock(ABC):
    """Marks in time on one device; a mark is taken where the device's work has got to."""

    @abstractmethod
    def before_repeat(self) -> None:
        """Bring caches into the same state before every repeat."""

    @abstractmethod
    def mark(self) -> Any:
        """Now, in the order of the device's work."""

    @abstractmethod
    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks."""

    def foreign_seconds(self) -> float:
        """Processor time that others have taken so far, where that disturbs the clock."""
        return 0.0

    @abstractmethod
    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory that the call holds at once beyond what was held before it."""


class CpuClock(Clock):
    """Wall time. Caches stay warm, as they are inside a model's step."""

    def before_repeat(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def foreign_seconds(self) -> float:
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except (OSError, IndexError):
            return 0.0
        user, nice, system, _idle, _waiting, irq, soft_irq, stolen = map(int, fields)
        busy = (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - own.user - own.system

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """From the kernel's high-water mark of resident memory, so native buffers count too."""
        try:
            # Freed memory that malloc keeps would hide what the call takes.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            call()
            return max(_resident("VmHWM") - before, 0)
        except (OSError, AttributeError):
            return None


class CudaClock(Clock):
    """CUDA events, with the L2 cache emptied before every repeat."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 1 << 29), dtype=torch.uint8, device=device)

    def before_repeat(self) -> None:
        # Often enough to keep the device busy for a millisecond or so, while the host enqueues the
        # call: what is timed is the device's work.
        for _ in range(8):
            self._flush.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def clock_of(device: torch.device) -> Clock:
    """The clock that fits a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def time_forward(clock: Clock, call: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Median milliseconds without autograd, and how many repeats it is a median of."""

    def once() -> list[float]:
        with torch.no_grad():
            start = clock.mark()
            call()
            return [clock.milliseconds(start, clock.mark())]

    times, foreign = _repeat(clock, once, repeats)
    return {
        "forward_ms": _median(times, 0),
        "forward_repeats": len(times),
        "forward_foreign_share": foreign,
    }


def time_training(
    clock: Clock, call: Callable[[], Tensor], leaves: Sequence[Tensor], repeats: int
) -> dict[str, float]:
    """Median milliseconds of backward alone and of forward and backward with autograd."""
    with torch.no_grad():
        grad = torch.randn_like(call())

    def once() -> list[float]:
        start = clock.mark()
        output = call()
        middle = clock.mark()
        torch.autograd.grad(output, leaves, grad, allow_unused=True)
        end = clock.mark()
        return [clock.milliseconds(middle, end), clock.milliseconds(start, end)]

    times, foreign = _repeat(clock, once, repeats)
    return {
        "backward_ms": _median(times, 0),
        "forward_backward_ms": _median(times, 1),
        "training_repeats": len(times),
        "training_foreign_share": foreign,
    }


def copy_bandwidth(clock: Clock, device: torch.device, quick: bool) -> float:
    """Bytes a second, read plus written, of a copy far larger than any cache."""
    size = 1 << (24 if quick else 30 if device.type == "cuda" else 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def once() -> list[float]:
        start = clock.mark()
        target.copy_(source)
        return [clock.milliseconds(start, clock.mark())]

    times, _ = _repeat(clock, once, 15)
    milliseconds = min(row[0] for row in times)
    return 2 * size / milliseconds * 1e3


def _repeat(
    clock: Clock, once: Callable[[], list[float]], repeats: int
) -> tuple[list[list[float]], float]:
    """What `once` gave each time, and the share of the processor that others took meanwhile."""
    # The first call warms up; where it alone fills the time, it is also the measurement.
    times, seconds, foreign = _run(clock, once, lambda done, seconds: done == 1)
    if seconds < _MOST_SECONDS:
        is_enough = partial(_is_enough, repeats)
        times, seconds, foreign = _run(clock, once, is_enough)
    return times, foreign / (seconds * (os.cpu_count() or 1))


def _run(
    clock: Clock, once: Callable[[], list[float]], is_enough: Callable[[int, float], bool]
) -> tuple[list[list[float]], float, float]:
    """Results, wall seconds, and processor seconds of others, until there are enough."""
    times: list[list[float]] = []
    foreign, started, seconds = clock.foreign_seconds(), time.perf_counter(), 0.0
    while not times or not is_enough(len(times), seconds):
        clock.before_repeat()
        times.append(once())
        seconds = time.perf_counter() - started
    return times, seconds, max(clock.foreign_seconds() - foreign, 0.0)


def _is_enough(repeats: int, done: int, seconds: float) -> bool:
    if done >= repeats:
        return seconds >= _LEAST_SECONDS or done >= _MOST_REPEATS_OF_SHORT_CALLS
    return seconds * (done + 1) / done > _MOST_SECONDS


def _median(times: list[list[float]], column: int) -> float:
    return statistics.median(row[column] for row in times)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
