"""The CPU kernels in a plain C++ program, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_nuwa.ops import build

DRIVER = Path(__file__).parent / "cpu_driver" / "driver.cpp"
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler_with_sanitizers(folder: Path) -> str:
    try:
        compiler = build.cxx_compiler()
    except build.CannotBuildError as error:
        pytest.skip(str(error))
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [compiler, *SANITIZERS, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers here")
    return compiler


def test_kernels_stay_in_bounds_and_are_right(tmp_path: Path) -> None:
    compiler = compiler_with_sanitizers(tmp_path)
    # library.cpp is all of PyTorch and no kernel.
    sources = [s for s in build.cpu_sources() if s.name != "library.cpp"] + [DRIVER]
    headers = f"-I{build.SOURCES / 'cpu'}"

    def compile_one(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        flags = [flag for flag in build.cpu_flags(source.name) if flag != "-O3"]
        command = [compiler, *flags, *SANITIZERS, headers, "-c", str(source), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = str(tmp_path / "driver")
    subprocess.run([compiler, *SANITIZERS, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "geometries are right" in done.stdout
