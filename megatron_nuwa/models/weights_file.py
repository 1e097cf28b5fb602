"""Weights in a safetensors file, which appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_nuwa.files import replaced_atomically


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file; raises `OSError`, which on a full disk says how much the file takes."""
    with replaced_atomically(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code[1])
            reason = os.strerror(number)
            if number in (errno.ENOSPC, errno.EDQUOT):
                taken = sum(tensor.nbytes for tensor in tensors.values())
                reason += f" (the file takes {taken / 1e6:,.1f} MB)"
            raise OSError(number, reason, str(path)) from error
