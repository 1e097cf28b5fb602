"""Linear layers over a few rows, whose results do not depend on the other rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Matrix libraries choose a kernel by the number of rows, and kernels differ in the order of their
# sums. On a CPU all numbers that are multiples of 4 give the same bits (MKL's and oneDNN's; a
# single row does not); on a GPU up to 16 rows cost what one does.
_MULTIPLES = {"cpu": 4, "cuda": 16}
# Below this a packed weight's fixed cost, some 10 µs, is more than what it saves.
_SMALLEST_PACKED = 1 << 15
# oneDNN lays a weight out for a number of rows.
_PACKED_FOR = 8


def padded_rows(rows: int, device: torch.device) -> int:
    """The number of rows to compute with, so that a row's bits do not depend on how many there are.

    A fact of the libraries in use, not of arithmetic: `tests/generation` holds them to it.
    """
    multiple = _MULTIPLES.get(device.type, 1)
    return -(-rows // multiple) * multiple


class RowLinear:
    """`x @ weight.T + bias`, followed by an exact GELU where asked for.

    fp32 and bf16 weights on a CPU are copied into oneDNN's own layout, in which 4 to 8 rows cost
    little more than one; MKL would repack them at every call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> None:
        self._weight, self._bias, self._gelu = weight.detach(), bias, gelu
        if bias is not None:
            self._bias = bias.detach()
        self._packed = _packed(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out); `rows` from `padded_rows`."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(
                x.contiguous(),
                self._packed,
                self._bias,
                "gelu" if self._gelu else "none",
                [],
                "none",
            )
        y = F.linear(x, self._weight, self._bias)
        return F.gelu(y) if self._gelu else y


class LogitHead:
    """`x @ weight.T` in fp32, whatever the weight's dtype.

    Half precision would round the sums: of 12,288 logits in bf16 every eighteenth row has two that
    share the first place, and a top-k of 256 keeps 260.
    """

    def __init__(self, weight: Tensor) -> None:
        self._turned = self._linear = None
        is_half = weight.dtype in (torch.bfloat16, torch.float16)
        if is_half and weight.device.type == "cuda":
            self._turned = weight.detach().t()
            return
        # Only a GPU's product takes halves and gives more. Those of halves are exact in fp32.
        self._dtype = torch.float32 if is_half else weight.dtype
        self._linear = RowLinear(weight.to(self._dtype), None)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) → fp32 (rows, out); `rows` from `padded_rows`."""
        if self._turned is not None:
            return torch.mm(x, self._turned, out_dtype=torch.float32)
        assert self._linear is not None
        return self._linear(x.to(self._dtype)).float()


def _packed(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.numel() < _SMALLEST_PACKED:
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    # What the compiler's CPU backend calls; torch has no public name for it.
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    ):
        return None
    if weight.dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
        return None
    packed = operators._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    assert isinstance(packed, Tensor)
    return packed
