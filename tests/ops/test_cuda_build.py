"""Every CUDA source compiles for both architectures without a register spill, and links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks import kernel_layouts
from benchmarks.cuda_resources import (
    Block,
    Kernel,
    blocks_a_processor,
    compiled_kernels,
    walking_blocks,
)
from benchmarks.kernel_layouts import CANDIDATES
from megatron_nuwa.ops import build, cuda
from megatron_nuwa.ops.warp_tables import Sums, shape_of

# What only a PyTorch with CUDA has; the library asks for it weakly.
ONLY_WITH_CUDA = {"aoti_torch_get_current_cuda_stream"}
SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Build:
    """What the compilers made of the sources."""

    kernels: list[Kernel]
    blocks: dict[tuple[str, str], Block]
    library: Path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("cuda")
    try:
        commands = build.cuda_compile_commands(folder)
    except build.CannotBuildError as error:
        pytest.skip(f"the CUDA kernels cannot be compiled here: {error}")
    kernels = compiled_kernels(folder)
    library = folder / build.library_name("cuda")
    link = build.link_command("cuda", [command[-1] for command in commands], library)
    subprocess.run(link, check=True)
    return Build(kernels, walking_blocks(folder), library)


def test_no_kernel_spills_registers(compiled: Build) -> None:
    spilling = [k for k in compiled.kernels if k.spilled_bytes or k.stack_bytes]
    assert not spilling


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_every_kernel_is_there_once_an_architecture(compiled: Build, architecture: str) -> None:
    passes = ("forward", "backward dQ", "backward dK dV")
    expected = [
        *(f"{p} {t} {s}" for p in passes for t in ("bf16", "fp16") for s in SIZES),
        *(f"direct_{p} fp32 {s}" for p in passes for s in SIZES),
        *(f"query_statistics fp32 {s}" for s in SIZES),
    ]
    titles = [k.title for k in compiled.kernels if k.architecture == architecture]
    assert sorted(titles) == sorted(expected)


def test_every_kernel_fits_a_processor_of_its_architecture(compiled: Build) -> None:
    for kernel in compiled.kernels:
        own = (kernel.architecture, kernel.title)
        block = compiled.blocks[own] if kernel.is_tensor_core else Block()
        assert blocks_a_processor(kernel, block)[0] >= 1, kernel
        # The most that one block may have is a KiB less than the processor's.
        assert block.shared_bytes <= (163 if kernel.architecture == "sm_80" else 227) * 1024


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_backend_asks_for_the_shared_memory_that_its_kernels_take(
    compiled: Build, architecture: str
) -> None:
    taken = {
        size: max(
            block.shared_bytes
            for (found, title), block in compiled.blocks.items()
            if found == architecture and title.endswith(f" {size}")
        )
        for size in SIZES
    }
    assert taken == cuda.SHARED_BYTES[architecture == "sm_90a"]


def test_the_first_of_the_layouts_to_be_timed_is_what_the_package_ships() -> None:
    for sums in get_args(Sums):
        assert CANDIDATES[0].shape_of(64, sums, True) == shape_of(64, sums, True)


@pytest.mark.slow
def test_every_layout_to_be_timed_compiles_and_tells_its_registers(tmp_path: Path) -> None:
    output = tmp_path / "layouts.json"
    assert kernel_layouts.main(["--build-only", "--output", str(output)]) == 0
    candidates = json.loads(output.read_text())["candidates"]
    assert len(candidates) == len(CANDIDATES)
    for candidate in candidates:
        assert candidate.keys() == set(get_args(Sums))
        assert all(0 < of["registers"] <= 168 for of in candidate.values())
    # What is shipped spills nothing.
    assert all(of["spilled_bytes"] == 0 for of in candidates[0].values())


def test_the_library_needs_nothing_that_this_torch_lacks(compiled: Build) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    offered = set()
    for name in ("libtorch_cpu.so", "libtorch.so", "libc10.so"):
        listed = _symbols(libraries / name, "--defined-only")
        offered |= {symbol for _, symbol in listed}
    needed = {
        (kind, symbol)
        for kind, symbol in _symbols(compiled.library, "--undefined-only")
        if re.search("torch|c10", symbol)
    }
    assert needed
    assert {symbol for kind, symbol in needed if kind != "w"} <= offered
    assert {symbol for kind, symbol in needed if kind == "w"} <= ONLY_WITH_CUDA


def test_the_library_loads_where_there_is_no_gpu(compiled: Build) -> None:
    # In a process of its own: this one may hold the installed library, with the same operators.
    program = f"import torch; torch.ops.load_library({str(compiled.library)!r}); print('loaded')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr


def _symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """(kind, name) of a shared library's dynamic symbols."""
    listed = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [(line.split()[-2], line.split()[-1]) for line in listed.splitlines()]
