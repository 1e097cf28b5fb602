"""What is timed: this project's backends, PyTorch's ways to the same result, and the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.cases import Case, Load
from benchmarks.harness.flex import flex_call, flex_strips_call
from benchmarks.harness.foreign import natten_call, sparse_3dna_call
from benchmarks.harness.layouts import GridFirst, HeadsFirst, Layout, Strips, TokensFirst
from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.ops import Backend, nearby_attention
from megatron_nuwa.ops.tables import dense_mask, key_table

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Agreement = Literal["everywhere", "inside", "unbounded", "nowhere"]


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    `agrees`: for which queries its result is the operator's, which is then checked: everywhere;
    inside, where no border cuts the window and without causality; where windows are unbounded; or
    nowhere. `note` says what it does otherwise. `trains_on`: device types on which it has a
    backward. `make` raises `UnavailableError`.
    """

    name: str
    make: Callable[[Case, Load], Call]
    layout: Layout
    agrees: Agreement = "everywhere"
    note: str = ""
    trains_on: tuple[str, ...] = ("cpu", "cuda")


def all_peers(device: torch.device) -> list[Peer]:
    """Everything that could run on a device; ratios are to "auto", the first."""
    ours = [Peer(name, _own(name), TokensFirst()) for name in get_args(Backend)]
    heads, forward_only = HeadsFirst(), ("cuda",)
    peers = [Peer("sdpa-mask", _masked_sdpa, heads, note="dense mask")]
    kernels: dict[str, SDPBackend | None] = {"sdpa-dense": None}
    if device.type == "cuda":
        kernels = {
            "sdpa-flash": SDPBackend.FLASH_ATTENTION,
            "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        }
    for name, kernel in kernels.items():
        note = "sees everything, when causal everything before it"
        peers.append(Peer(name, _dense_sdpa(kernel), heads, "unbounded", note))
    return [
        *ours,
        *peers,
        Peer("flex", flex_call, heads, note="compiled, exact mask_mod", trains_on=forward_only),
        Peer(
            "flex-strips",
            flex_strips_call,
            Strips(),
            note="compiled, 3-row strips in blocks of 64",
            trains_on=forward_only,
        ),
        Peer("gather", _gather, TokensFirst(), note="copies every window"),
        Peer(
            "natten",
            natten_call,
            GridFirst(),
            agrees="inside",
            note="windows shift at borders, causal along frames alone"
            + ("; uncompiled FlexAttention here" if device.type == "cpu" else ""),
            trains_on=forward_only,
        ),
        Peer(
            "nuwa-pytorch",
            sparse_3dna_call,
            TokensFirst(),
            agrees="nowhere",
            note="Sparse3DNA: projections, <bos> and head mixing included, causal along each axis",
        ),
    ]


def _own(backend: Backend) -> Callable[[Case, Load], Call]:
    def make(case: Case, load: Load) -> Call:
        grid, context_grid, extent, causal = case.geometry

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nearby_attention(
                query,
                key,
                value,
                grid=grid,
                context_grid=context_grid,
                extent=extent,
                causal=causal,
                backend=backend,
            )

        if (backend == "cpu" and load.device.type != "cpu") or (
            backend == "cuda" and load.device.type != "cuda"
        ):
            raise UnavailableError(f"runs on another device than {load.device.type}")
        return call

    return make


def _masked_sdpa(case: Case, load: Load) -> Call:
    mask = dense_mask(case.geometry, load.device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _dense_sdpa(kernel: SDPBackend | None) -> Callable[[Case, Load], Call]:
    def make(case: Case, load: Load) -> Call:
        causal = case.geometry.causal

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(kernel) if kernel is not None else nullcontext():
                return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

        return call

    return make


def _gather(case: Case, load: Load) -> Call:
    table = key_table(case.geometry, load.device)
    hidden = ~table.valid.view(1, *table.valid.shape, 1)
    scale = load.head_size**-0.5

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,bnmhd->bnmh", query, key[:, table.index]) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(2)
        return torch.einsum("bnmh,bnmhd->bnhd", weights, value[:, table.index])

    return call
