"""Which kernels a GPU spends a step in, from PyTorch's profiler."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What runs on the GPU, in the words of the profiler's trace.
_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that a kernel's name matches is its kind.
_KINDS = {
    "compiled": r"^triton_",
    "nearby attention": r"\bwalk<|\bdirect_(forward|backward)|nuwa",
    "other attention": r"fmha|flash|attention|sdpa|mha_",
    "matrix products": r"gemm|nvjet|xmma|cutlass|cublas|splitk",
    "optimizer": r"adam|multi_tensor_apply",
    "norms": r"layer_norm|LayerNorm|GammaBeta",
    "communication": r"nccl",
    "copies": r"memcpy|memset|copy_kernel|direct_copy",
    "reductions": r"reduce",
    "element by element": r"elementwise|vectorized",
}
_OTHER = "other"
_NAME_WIDTH = 100


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel: how many, and milliseconds."""

    name: str
    kind: str
    calls: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """`kernels` take the longest first; `span_ms` is from the first's begin to the last's end,
    and `busy_ms` the part of it in which any of them ran."""

    kernels: tuple[Kernel, ...]
    span_ms: float
    busy_ms: float

    def kinds(self) -> dict[str, float]:
        """Milliseconds of each kind, the longest first."""
        totals: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            totals[kernel.kind] += kernel.milliseconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def profiled(work: Callable[[], object]) -> Profile:
    """Run `work` once on the GPU and say what it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def read_trace(events: Iterable[Mapping[str, Any]]) -> Profile:
    """The profile of a trace's events; their times are microseconds."""
    runs = [event for event in events if event.get("cat") in _CATEGORIES]
    times: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        times[run["name"]].append(run["dur"] / 1e3)
    kernels = [Kernel(name, kind_of(name), len(ms), sum(ms)) for name, ms in times.items()]
    intervals = sorted((run["ts"] / 1e3, (run["ts"] + run["dur"]) / 1e3) for run in runs)
    busy, reached = 0.0, float("-inf")
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Profile(
        tuple(sorted(kernels, key=lambda kernel: -kernel.milliseconds)),
        reached - intervals[0][0] if intervals else 0.0,
        busy,
    )


def kind_of(name: str) -> str:
    """What a kernel of this name does."""
    for kind, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return _OTHER


def show_profile(console: Console, profile: Profile, rows: int = 25) -> None:
    """The longest kernels, and the share of each kind."""
    table = Table(title=f"The {rows} longest kernels of a step")
    for column in ("ms", "share", "calls", "kind", "kernel"):
        table.add_column(column, justify="left" if column in ("kind", "kernel") else "right")
    total = sum(kernel.milliseconds for kernel in profile.kernels) or 1.0
    for kernel in profile.kernels[:rows]:
        share = f"{kernel.milliseconds / total:.1%}"
        # Names hold brackets, which are no markup.
        name = Text(kernel.name[:_NAME_WIDTH])
        row = (f"{kernel.milliseconds:.2f}", share, f"{kernel.calls}", kernel.kind, name)
        table.add_row(*row)
    console.print(table)
    for kind, milliseconds in profile.kinds().items():
        print(f"{kind:>20} {milliseconds:9.2f} ms  {milliseconds / total:6.1%}")
    span = profile.span_ms or 1.0
    print(
        f"GPU busy {profile.busy_ms:.1f} of {profile.span_ms:.1f} ms "
        f"({profile.busy_ms / span:.1%})",
        flush=True,
    )
