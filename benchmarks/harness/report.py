"""The table that a person reads and the JSON that the next run is compared with."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.cases import Case, Load
from benchmarks.harness.measure import Result
from megatron_nuwa.files import write_text_atomically

OURS = "auto"
_NOTABLE_SHARE = 0.05
_NUMBERS = {"everywhere": "", "inside": "inside", "nowhere": "another function"}


@dataclass(frozen=True)
class Floors:
    """Milliseconds that memory traffic alone takes, from a measured copy."""

    forward_ms: float
    backward_ms: float

    @classmethod
    def of(cls, case: Case, load: Load, bytes_a_second: float) -> Floors:
        """Of one case, every input read and every output written once."""
        forward, backward = load.bytes_moved(case.geometry)
        return cls(forward / bytes_a_second * 1e3, backward / bytes_a_second * 1e3)

    @property
    def forward_backward_ms(self) -> float:
        """Of both passes."""
        return self.forward_ms + self.backward_ms


def device_name(device: torch.device) -> str:
    """What results are keyed by: the GPU, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def file_stem(device: torch.device) -> str:
    """The device's name as part of a file name."""
    return f"{device.type}-" + re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def show_case(
    console: Console, case: Case, floors: Floors, results: Sequence[Result], device: str
) -> None:
    """One table; peers without figures are listed under it with the reason."""
    ours = next((r for r in results if r.peer == OURS and r.reason is None), None)
    table = Table(
        title=f"{case.title}  ·  {case.pairs:,} pairs a head  ·  memory floor "
        f"{_ms(floors.forward_ms)} forward, {_ms(floors.backward_ms)} backward  ·  {device}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for heading in ("forward", "backward", "fwd+bwd"):
        for column in (heading, "÷ ours", "of floor"):
            table.add_column(column, justify="right")
    table.add_column("peak", justify="right")
    table.add_column("largest error", justify="right")
    for result in results:
        if result.reason is not None:
            continue
        cells: list[str] = []
        for name in ("forward_ms", "backward_ms", "forward_backward_ms"):
            value, floor = getattr(result, name), getattr(floors, name)
            mine = None if ours is None else getattr(ours, name)
            cells += [_ms(value), _ratio(value, mine), _share(floor, value)]
        peak = result.peak_forward_backward_bytes or result.peak_forward_bytes
        error = _NUMBERS[result.agrees] if result.largest_error is None else ""
        if result.largest_error is not None:
            error = f"{result.largest_error:.0e} {_NUMBERS[result.agrees]}".strip()
        style = "bold green" if result.peer == OURS else None
        table.add_row(result.peer, *cells, _mib(peak), error, style=style)
    console.print(table)
    for result in results:
        says = f"not timed: {result.reason}" if result.reason is not None else result.note
        if says:
            console.print(f"  {result.peer}: {says}", highlight=False, markup=False)
        if result.foreign_share > _NOTABLE_SHARE:
            console.print(
                f"  {result.peer}: other programs took {result.foreign_share:.0%} of the "
                "processor; time it again on a quiet machine",
                style="yellow",
                highlight=False,
            )
    console.print()


def case_json(case: Case, floors: Floors, results: Sequence[Result]) -> dict[str, object]:
    """One case of the file."""
    grid, context_grid, extent, causal = case.geometry
    return {
        "name": case.name,
        "grid": list(grid),
        "context_grid": list(context_grid),
        "extent": list(extent),
        "causal": causal,
        "pairs_a_head": case.pairs,
        "floor_ms": {
            "forward": floors.forward_ms,
            "backward": floors.backward_ms,
            "forward_backward": floors.forward_backward_ms,
        },
        "peers": [result.as_json() for result in results],
    }


def write_report(
    path: Path, load: Load, bytes_a_second: float, repeats: int, cases: Sequence[dict[str, object]]
) -> None:
    """Write the file whole or not at all."""
    report = {
        "device": device_name(load.device),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "batch": load.batch,
        "heads": load.heads,
        "head_size": load.head_size,
        "dtype": str(load.dtype).removeprefix("torch."),
        "repeats": repeats,
        "copy_gigabytes_a_second": bytes_a_second / 1e9,
        "cases": list(cases),
    }
    write_json(path, report)


def write_json(path: Path | None, report: object) -> None:
    """Write a report as a whole; nothing where there is no path."""
    if path is not None:
        write_text_atomically(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or f"{os.cpu_count()} cores"


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1e3:.0f} µs"
    return f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def _ratio(value: float | None, ours: float | None) -> str:
    return "–" if value is None or ours is None else f"{value / ours:.3g}"


def _share(floor: float, value: float | None) -> str:
    return "–" if value is None else f"{floor / value:.1%}"


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"
