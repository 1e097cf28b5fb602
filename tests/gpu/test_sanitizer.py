"""No kernel reads or writes out of bounds, or meets itself in shared memory: compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH"),
]
EXERCISE = Path(__file__).parent / "exercise_kernels.py"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    assert SANITIZER is not None
    done = subprocess.run(
        [
            *(SANITIZER, "--tool", tool, "--error-exitcode", "9"),
            # PyTorch's own kernels are not looked at.
            *("--kernel-regex", "kns=megatron_nuwa"),
            *(sys.executable, str(EXERCISE)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXERCISE.parents[2])},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 errors" in done.stdout + done.stderr or "0 hazards" in done.stdout
