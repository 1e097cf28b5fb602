"""The compiled libraries: loading them, and the reason where one is missing."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_nuwa.ops.build import REPORT_NAME, library_name

_FOLDER = Path(__file__).parent


def build_report() -> dict[str, Any]:
    """What the build wrote about itself: `reasons` and `cuda_architectures`; {} without a build."""
    path = _FOLDER / REPORT_NAME
    try:
        report = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        report = {}
    return report if isinstance(report, dict) else {}


def library_path(name: str) -> Path:
    """Where `_native_<name>.so` lies, or would lie."""
    return _FOLDER / library_name(name)


@lru_cache
def why_missing(name: str) -> str | None:
    """Load `_native_<name>.so`; None when its operators are there, or else why not."""
    library = library_path(name)
    if not library.exists():
        reason = build_report().get("reasons", {}).get(name) or (
            "the package was not installed with pip; `python megatron_nuwa/ops/build.py` builds it"
        )
        return f"{library.name} was not built: {reason}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"{library.name} does not load with torch {torch.__version__}: {reason}"
    return None


def operators(name: str) -> Any:
    """The raw operators of a library; `RuntimeError` where it is missing."""
    reason = why_missing(name)
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.megatron_nuwa_native
