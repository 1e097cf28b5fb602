"""The CUDA kernels' own source, compiled with the simulated device and called from Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import c_int32, c_uint32
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from megatron_nuwa.ops import cuda
from megatron_nuwa.ops.tables import Geometry
from megatron_nuwa.ops.warp_tables import Sums

HERE = Path(__file__).parent
DEVICE = HERE / "cuda_simulator"
KERNELS = HERE.parents[1] / "megatron_nuwa/ops/csrc/cuda"


class Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> Array:
        if tensor is None:
            return cls(None, 0)
        assert tensor.is_contiguous()
        return cls(tensor.data_ptr(), tensor.numel() * tensor.element_size())


class Call(ctypes.Structure):
    """`Call` of simulate.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("batch", "heads", "queries", "keys")),
        *((name, c_int32 * 3) for name in ("blocks", "teams")),
        ("scale", ctypes.c_float),
        ("at_end", c_int32),
        ("pace", c_uint32),
        *(
            (name, Array)
            for name in (
                *("query", "key", "value", "mask", "grad", "output", "log_sum", "statistics"),
                *("grad_query", "grad_key", "grad_value"),
            )
        ),
        ("tables", Array * 7 * 3),
    )


_COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{DEVICE}")
# Loads and stores of shared memory are reported by the calls that the thread sanitizer is made of;
# the device takes them, in place of the sanitizer's library. As on the device, the same memory is
# read as scalars and as vectors. Line tables name the places of a race.
_INSTRUMENTED = ("-O2", "-g1", "-w", "-fno-strict-aliasing", "-fsanitize=thread")


def cxx_compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the simulated device with")
    return compiler


@cache
def _device() -> tuple[TemporaryDirectory[str], list[str]]:
    """The simulated device itself, whose own loads and stores are not looked at."""
    folder = TemporaryDirectory(prefix="simulated_device")
    names = ("block", "instructions", "instrumentation", "races")
    sources = [str(DEVICE / f"{name}.cpp") for name in names]
    command = [cxx_compiler(), *_COMMON, "-O3", "-w", "-c", *sources]
    subprocess.run(command, check=True, cwd=folder.name)
    return folder, [f"{folder.name}/{name}.o" for name in names]


def compiled_simulator(
    folder: Path, *flags: str, kernels: Path = KERNELS, source: str = "simulate.cpp"
) -> ctypes.CDLL:
    """A library of one of the device's sources with the kernels' headers of `kernels`."""
    _, objects = _device()
    built = folder / "simulator.o"
    compilation = [cxx_compiler(), *_COMMON, *_INSTRUMENTED, *flags, f"-I{kernels}"]
    subprocess.run([*compilation, "-c", str(DEVICE / source), "-o", str(built)], check=True)
    library = folder / "simulator.so"
    link = [cxx_compiler(), "-shared", "-o", str(library), str(built), *objects, "-ldl"]
    subprocess.run(link, check=True)
    return ctypes.CDLL(str(library))


_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


def raise_failure(run: Any, *arguments: Any) -> None:
    """Run a function of a simulator's library; AssertionError says what went wrong."""
    run.restype = ctypes.c_char_p
    failure = run(*arguments)
    assert failure is None, failure.decode()


def simulate(
    simulator: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    tables: Sequence[Sequence[Tensor]],
    scale: float,
    at_end: bool = True,
    pace: int = 0,
) -> tuple[Tensor, ...]:
    """Output, log_sum and three gradients; `tables` are those of the three passes."""
    batch, queries, heads, size = query.shape
    results = [torch.empty_like(t) for t in (query, query, key, value)]
    log_sum = torch.empty(batch, heads, queries)
    statistics = torch.empty(batch, heads, queries, 2)
    output, *gradients = results
    call = Call(
        *(batch, heads, queries, key.shape[1]),
        (c_int32 * 3)(*(len(t[0]) - 1 for t in tables)),
        (c_int32 * 3)(*(t[-1].shape[-1] for t in tables)),
        *(scale, at_end, pace),
        *map(Array.of, (query, key, value, mask, grad, output, log_sum, statistics, *gradients)),
        (Array * 7 * 3)(*((Array * 7)(*map(Array.of, t)) for t in tables)),
    )
    run = getattr(simulator, f"simulate_{_NAMES[query.dtype]}_{size}")
    raise_failure(run, ctypes.byref(call))
    return output, log_sum, *gradients


def tables_of(geometry: Geometry, query: Tensor) -> list[list[Tensor]]:
    return [cuda.tables(query, geometry, sums) for sums in get_args(Sums)]
