"""Compiles the native kernels at installation, where that is possible; the rest is pyproject.toml.

MEGATRON_NUWA_EXTENSION=0 leaves both libraries out; MEGATRON_NUWA_CUDA=0 leaves the CUDA one out,
and =1 makes the installation fail without it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPS = Path("megatron_nuwa") / "ops"

# Loaded by its path, because importing the package would need torch.
_spec = importlib.util.spec_from_file_location("native_build", OPS / "build.py")
assert _spec is not None
assert _spec.loader is not None
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Both libraries at once; what cannot be compiled is left out with a clear message."""

    def run(self) -> None:
        folder = OPS if self.inplace else Path(self.build_lib) / OPS
        folder.mkdir(parents=True, exist_ok=True)
        for name, reason in native_build.build_all(folder).items():
            if reason is not None:
                self.warn(
                    f"megatron-nuwa goes on without {native_build.library_name(name)}: {reason}. "
                    "Nearby attention falls back to a slower backend; "
                    "`python -m megatron_nuwa.ops` says which."
                )

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self._made(Path(self.build_lib) / OPS)]

    def get_output_mapping(self) -> dict[str, str]:
        built = Path(self.build_lib) / OPS
        return {str(path): str(OPS / path.name) for path in self._made(built)}

    @staticmethod
    def _made(folder: Path) -> list[Path]:
        return [*folder.glob("_native_*.so"), folder / native_build.REPORT_NAME]


class PlatformWheel(bdist_wheel):
    """The libraries know no Python, only a platform: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # A name that makes this a platform's package; BuildNative does not compile by it.
    ext_modules=[Extension("megatron_nuwa.ops._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
