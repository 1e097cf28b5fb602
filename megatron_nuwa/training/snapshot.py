"""What a checkpoint's files hold, on its way from the device over host memory to the disk."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from megatron_nuwa.files import sha256_of, sync

_CHUNK = 64 << 20
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class FileRecord(TypedDict):
    """A file's line in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """The content of a safetensors file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint: text, weights, or containers of tensors and plain data."""

    name: str
    content: Any
    # Of the tensors.
    bytes: int
    # Whether nobody else changes the tensors.
    is_own: bool

    @staticmethod
    def capture(name: str, content: Any, *, is_own: bool = False) -> Part:
        """Everything as it is now, except that tensors are the given ones."""
        sizes: list[int] = []

        def taken(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor.detach()

        return Part(name, _with_tensors(content, taken), sum(sizes), is_own)

    def on_host(self, copies: dict[Any, Tensor]) -> Part:
        """The same with tensors of its own in host memory.

        `copies` has those that other parts made of the same tensors, and takes up the new ones.
        """
        if self.is_own:
            return self

        def copied(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in copies:
                copies[key] = tensor.clone() if tensor.is_cpu else tensor.cpu()
            return copies[key]

        return replace(self, content=_with_tensors(self.content, copied), is_own=True)

    def write(self, folder: Path) -> FileRecord:
        """Write the file, bring it to the disk, and hold what is read back against what was meant.

        Raises `OSError`, also where the two differ.
        """
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _HashedFile(path) as stream:
            if isinstance(self.content, str):
                stream.write(self.content.encode())
            elif isinstance(self.content, Weights):
                _write_safetensors(self.content, stream)
            else:
                torch.save(self.content, stream)  # type: ignore[arg-type]
        stream.raise_failure()
        sync(path)
        _forget_cached(path)
        digest = stream.digest.hexdigest()
        if sha256_of(path) != digest:
            raise OSError(f"{path} is not what was written")
        return {"bytes": path.stat().st_size, "sha256": digest}


def _with_tensors(item: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of nested containers with every tensor changed."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, Weights):
        return replace(item, tensors=_with_tensors(dict(item.tensors), change))
    if isinstance(item, dict):
        # Keeps the type, such as an OrderedDict, and what else such an object knows.
        result = copy.copy(item)
        result.update({key: _with_tensors(value, change) for key, value in item.items()})
        return result
    if type(item) in (list, tuple):
        return type(item)(_with_tensors(value, change) for value in item)
    return copy.deepcopy(item)


class _HashedFile:
    """A file for writing that knows the sha256 of what it was told to write.

    A failure is kept until `raise_failure`: PyTorch's writer must not meet an exception on the way.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._stream = path.open("wb", buffering=0)
        self._failure: OSError | None = None

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *reason: object) -> None:
        self._stream.close()

    def write(self, content: Any) -> int:
        """Take all of the bytes."""
        left = memoryview(content).cast("B")
        total = len(left)
        try:
            while left and self._failure is None:
                written = self._stream.write(left[:_CHUNK])
                self.digest.update(left[:written])
                left = left[written:]
        except OSError as error:
            self._failure = error
        return total

    def flush(self) -> None:
        """Nothing is held back."""

    def raise_failure(self) -> None:
        """Raise what went wrong in `write`."""
        if self._failure is not None:
            raise self._failure


def _write_safetensors(weights: Weights, stream: _HashedFile) -> None:
    """The format of the safetensors library, which would make a second copy in memory."""
    header: dict[str, Any] = {"__metadata__": dict(weights.metadata)}
    end = 0
    for name, tensor in weights.tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    # The tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for tensor in weights.tensors.values():
        if tensor.numel():
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())


def _forget_cached(path: Path) -> None:
    """Have the next reader meet what lies on the disk, not what lies in memory."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
