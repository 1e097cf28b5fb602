"""Compiles the native libraries; used by setup.py, and by the tests that look at the compiler.

Needs nothing but a compiler and the headers of an installed torch, and imports neither torch nor
the rest of the package, so that setup.py can load this file alone.

    python megatron_nuwa/ops/build.py      # rebuild in place after a change in csrc/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent / "csrc"
REPORT_NAME = "_native_build.json"
LIBRARIES = ("cpu", "cuda")
CUDA_ARCHITECTURES = ("80", "90a")

CUDA_SWITCH = "MEGATRON_NUWA_CUDA"
EXTENSION_SWITCH = "MEGATRON_NUWA_EXTENSION"

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# The oldest torch whose stable ABI the libraries use.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_INSTRUCTION_FLAGS = {
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": (*_AVX512, "-mprefer-vector-width=512"),
}


# The commands that compile a library's sources into a folder.
CommandsIn = Callable[[Path], "list[list[str]]"]


class CannotBuildError(Exception):
    """Why a library cannot be compiled here, in one sentence."""


def library_name(name: str) -> str:
    """File name of the library "cpu" or "cuda"."""
    return f"_native_{name}.so"


def build(name: str, target: Path, commands_in: CommandsIn | None = None) -> str:
    """Compile the library "cpu" or "cuda" into the file `target`; what the compilers said.

    `commands_in` gives other commands than `compile_commands` does. Raises `CannotBuildError`.
    """
    with TemporaryDirectory() as folder:
        find = commands_in or partial(compile_commands, name)
        commands = find(Path(folder))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            said = list(pool.map(_run, commands))
        objects = [command[-1] for command in commands]
        # Under another name first: a process may have the old library mapped.
        linked = target.with_suffix(".new")
        said.append(_run(link_command(name, objects, linked)))
        linked.replace(target)
    return "".join(said)


def build_all(folder: Path) -> dict[str, str | None]:
    """Compile what can be compiled into `folder`, with a report; why each library is missing.

    Raises `CannotBuildError` where the environment insists on a library that fails.
    """
    reasons: dict[str, str | None] = {}
    for name in LIBRARIES:
        target = folder / library_name(name)
        try:
            _check_switches(name)
            build(name, target)
            reasons[name] = None
        except CannotBuildError as error:
            target.unlink(missing_ok=True)
            if name == "cuda" and os.environ.get(CUDA_SWITCH) == "1":
                raise
            reasons[name] = str(error)
    architectures = [] if reasons["cuda"] else [f"sm_{a}" for a in CUDA_ARCHITECTURES]
    report = {"reasons": reasons, "cuda_architectures": architectures}
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    return reasons


def compile_commands(name: str, folder: Path) -> list[list[str]]:
    """One command a source file, which ends in the object file that it makes in `folder`."""
    return _cpu_commands(folder) if name == "cpu" else cuda_compile_commands(folder)


def cpu_flags(source: str) -> list[str]:
    """The flags for a file of `csrc/cpu`; never those of the machine that compiles."""
    machine = ["-DMEGATRON_NUWA_X86"] if _IS_X86 else []
    return [
        *("-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC"),
        # GCC warns of its own headers' undefined vectors.
        *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"),
        *machine,
        *_INSTRUCTION_FLAGS.get(source, ()),
    ]


def cpu_sources() -> list[Path]:
    """The sources of the CPU library that this kind of machine needs."""
    return [
        source
        for source in sorted((SOURCES / "cpu").glob("*.cpp"))
        if _IS_X86 or source.name not in _INSTRUCTION_FLAGS
    ]


def cxx_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if candidate and shutil.which(candidate):
            return candidate
    raise CannotBuildError("no C++ compiler (c++, g++, clang++ or $CXX) is on PATH")


def cuda_compile_commands(
    folder: Path,
    architectures: Sequence[str] = CUDA_ARCHITECTURES,
    more_flags: Sequence[str] = (),
) -> list[list[str]]:
    """nvcc on every `csrc/cuda/*.cu`; its output tells registers and spills of every kernel."""
    nvcc, torch = _nvcc(), _torch_folder()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    flags = [
        *("-O3", "-std=c++20", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *("-DUSE_CUDA", _TORCH_TARGET, f"-I{torch / 'include'}", *targets),
        *more_flags,
    ]
    return [
        [nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        for source in sorted((SOURCES / "cuda").glob("*.cu"))
    ]


def link_command(name: str, objects: Sequence[str], target: Path) -> list[str]:
    """The command that makes the library `target` of its object files."""
    torch = _torch_folder()
    linker = [_nvcc(), "-shared"] if name == "cuda" else [cxx_compiler(), "-shared"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if sys.platform == "linux":
        # Without this the linker drops libraries whose symbols are only looked up at load.
        libraries.insert(0, "-Xlinker" if name == "cuda" else "-Wl,--no-as-needed")
        if name == "cuda":
            libraries.insert(1, "--no-as-needed")
    return [*linker, *objects, *libraries, "-o", str(target)]


def _cpu_commands(folder: Path) -> list[list[str]]:
    compiler, torch = cxx_compiler(), _torch_folder()
    headers = [_TORCH_TARGET, f"-I{torch / 'include'}"]
    return [
        [
            *(compiler, *cpu_flags(source.name), *headers),
            *("-c", str(source), "-o", str(folder / f"{source.stem}.o")),
        ]
        for source in cpu_sources()
    ]


def _check_switches(name: str) -> None:
    if os.environ.get(EXTENSION_SWITCH) == "0":
        raise CannotBuildError(f"{EXTENSION_SWITCH}=0 was set at installation")
    if name == "cuda" and os.environ.get(CUDA_SWITCH) == "0":
        raise CannotBuildError(f"{CUDA_SWITCH}=0 was set at installation")


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("nvcc")
    if found is None:
        raise CannotBuildError("nvcc is neither on PATH nor in $CUDA_HOME/bin")
    return found


def _torch_folder() -> Path:
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise CannotBuildError(
            "torch was not there to compile against; install torch first and then this package "
            "with pip's --no-build-isolation"
        )
    folder = Path(found.submodule_search_locations[0])
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise CannotBuildError(
            f"the torch in {folder} has no stable-ABI headers; torch >= 2.11 has"
        )
    return folder


def _run(command: Sequence[str]) -> str:
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        print(finished.stdout, file=sys.stderr)
        source = next((part for part in command if part.endswith((".cpp", ".cu"))), "the library")
        raise CannotBuildError(f"{Path(command[0]).name} failed on {Path(source).name}")
    return finished.stdout


def main() -> int:
    """Rebuild the libraries next to this file."""
    missing = 0
    for name, reason in build_all(Path(__file__).parent).items():
        print(f"{library_name(name)}: {'built' if reason is None else f'not built: {reason}'}")
        missing += reason is not None
    return int(missing == len(LIBRARIES))


if __name__ == "__main__":
    sys.exit(main())
