"""What installing the package builds, with compilers and without, and the command that tells."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_nuwa.ops import build, cpu
from megatron_nuwa.ops.native import why_missing

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("c++", "g++", "clang++")), reason="no C++ compiler here"
)


def make_wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A wheel of a copy of this tree, and what building it said."""
    source, target = tmp_path / "source", tmp_path / "wheels"
    unwanted = shutil.ignore_patterns("*.so", "_native_build.json", "__pycache__")
    for name in ("megatron_nuwa", "preprocessing"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    options = ["-v", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(target), str(source)],
        capture_output=True,
        text=True,
        env={**os.environ, build.CUDA_SWITCH: "0", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel, done.stdout + done.stderr


def run_ops(
    *arguments: str, package: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, from the package that lies in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_nuwa.ops", *arguments],
        capture_output=True,
        text=True,
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), **environment},
    )


@needs_compiler
def test_a_wheel_carries_the_compiled_kernels(tmp_path: Path) -> None:
    wheel, _ = make_wheel(tmp_path)
    assert re.fullmatch(r"megatron_nuwa-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    ops = unpacked / "megatron_nuwa" / "ops"
    assert (ops / "_native_cpu.so").exists()
    assert not (ops / "_native_cuda.so").exists()
    report = json.loads((ops / build.REPORT_NAME).read_text())
    assert report["reasons"] == {
        "cpu": None,
        "cuda": "MEGATRON_NUWA_CUDA=0 was set at installation",
    }
    done = run_ops(package=unpacked)
    assert done.returncode == 0, done.stderr
    assert "instructions: " in done.stdout
    assert "MEGATRON_NUWA_CUDA=0 was set" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler"),
        ({"MEGATRON_NUWA_EXTENSION": "0"}, "MEGATRON_NUWA_EXTENSION=0 was set"),
    ],
)
def test_without_a_compiler_the_package_installs_and_says_so(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    wheel, said = make_wheel(tmp_path, **environment)
    assert "megatron-nuwa goes on without _native_cpu.so: " + message in said
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    done = run_ops(package=unpacked)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert "avx" not in done.stdout


def test_cuda_that_is_insisted_on_and_missing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.CUDA_SWITCH, "1")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CXX", "")
    with pytest.raises(build.CannotBuildError, match="nvcc is neither on PATH"):
        build.build_all(tmp_path)


def test_a_failed_compilation_leaves_no_library_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho boom\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(build.CUDA_SWITCH, "0")
    (tmp_path / "_native_cpu.so").write_text("from an older build")
    reasons = build.build_all(tmp_path)
    assert re.match(r"c\+\+ failed on \w+\.cpp", reasons["cpu"] or "")
    assert not (tmp_path / "_native_cpu.so").exists()


def test_nothing_is_compiled_for_the_machine_that_compiles() -> None:
    flags = {source.name: build.cpu_flags(source.name) for source in build.cpu_sources()}
    for name, given in flags.items():
        assert not any("native" in flag or "march" in flag for flag in given)
        wide = {"kernels_avx2.cpp", "kernels_avx512.cpp"}
        assert any(flag.startswith("-mavx") for flag in given) == (name in wide)


def test_the_command_shows_backends_and_checks_them() -> None:
    done = run_ops()
    assert done.returncode == 0, done.stdout + done.stderr
    for backend in ("reference", "cpu", "cuda"):
        assert backend in done.stdout
    if why_missing("cpu") is None:
        for instructions in cpu.available_instruction_sets():
            assert f"cpu, {instructions}" in done.stdout
    assert "WRONG" not in done.stdout


def test_the_command_has_help_and_names_bad_settings() -> None:
    assert "example:" in run_ops("--help").stdout
    if why_missing("cpu") is None:
        done = run_ops(MEGATRON_NUWA_CPU_INSTRUCTIONS="avx9000")
        assert done.returncode == 2
        assert done.stderr.startswith("error: MEGATRON_NUWA_CPU_INSTRUCTIONS must be one of")
        assert "Traceback" not in done.stderr


def test_a_wrong_kernel_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_nuwa.ops import __main__ as command
    from megatron_nuwa.ops import reference

    forward = reference.forward
    monkeypatch.setattr(sys, "argv", ["ops"])
    monkeypatch.setattr(reference, "forward", lambda *a: tuple(1.001 * t for t in forward(*a)))
    assert command.main() == 1
    assert "WRONG" in capsys.readouterr().out
