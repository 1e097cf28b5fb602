"""No kernel reads or writes out of bounds, or meets itself in shared memory: compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_nuwa.ops import build

SANITIZER = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on PATH"),
]
EXERCISE = Path(__file__).parent / "exercise_kernels.py"


@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    exercise(tool)


def test_the_sanitizer_finds_no_race(tmp_path: Path) -> None:
    """With kernels that are compiled to be looked at: see `kArrivals` of ring.cuh."""
    library = tmp_path / build.library_name("cuda")
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if major == 9 else f"{major}{minor}"
    try:
        commands = partial(
            build.cuda_compile_commands,
            architectures=(architecture,),
            more_flags=("-DMEGATRON_NUWA_TRACED",),
        )
        build.build("cuda", library, commands)
    except build.CannotBuildError as error:
        pytest.skip(f"the CUDA kernels cannot be compiled here: {error}")
    exercise("racecheck", str(library))


def exercise(tool: str, *arguments: str) -> None:
    """Run every kernel under a tool, which must find nothing."""
    assert SANITIZER is not None
    done = subprocess.run(
        [
            *(SANITIZER, "--tool", tool, "--error-exitcode", "9"),
            # PyTorch's own kernels are not looked at.
            *("--kernel-regex", "kns=megatron_nuwa"),
            *(sys.executable, str(EXERCISE), *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXERCISE.parents[2])},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 errors" in done.stdout + done.stderr or "0 hazards" in done.stdout
