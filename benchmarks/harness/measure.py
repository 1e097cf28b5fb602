"""One case against all peers: outputs are compared first, and only what agrees is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.harness.cases import Case, Load
from benchmarks.harness.peers import Call, Peer
from benchmarks.harness.timing import Clock, time_forward, time_training
from benchmarks.harness.unavailable import UnavailableError
from megatron_nuwa.ops import nearby_attention
from megatron_nuwa.ops.tables import key_table

# Largest error of an output or gradient, relative to the largest value in it.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Result:
    """What one peer did with one case: either figures or the reason why there are none."""

    peer: str
    agrees: str
    note: str
    forward_ms: float | None = None
    forward_repeats: int | None = None
    forward_foreign_share: float | None = None
    backward_ms: float | None = None
    forward_backward_ms: float | None = None
    training_repeats: int | None = None
    training_foreign_share: float | None = None
    peak_forward_bytes: int | None = None
    peak_forward_backward_bytes: int | None = None
    largest_error: float | None = None
    reason: str | None = None

    @property
    def foreign_share(self) -> float:
        """Largest share of the processor that other programs took while this was timed."""
        return max(self.forward_foreign_share or 0.0, self.training_foreign_share or 0.0)

    def as_json(self) -> dict[str, object]:
        """The fields that have a value."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


class Inputs:
    """Queries, keys, values and an output gradient of a case, with what the definition gives."""

    def __init__(self, case: Case, load: Load) -> None:
        grid, context_grid, extent, causal = case.geometry
        self.grids = (grid, context_grid, context_grid)
        self.tensors = [load.random(g.cells, seed) for seed, g in enumerate(self.grids)]
        self.grad = load.random(grid.cells, 3)
        samples = []
        # The reference may hold dense scores, so it gets one sample at a time.
        for b in range(load.batch):
            leaves = [t[b : b + 1].clone().requires_grad_() for t in self.tensors]
            output = nearby_attention(
                *leaves,
                grid=grid,
                context_grid=context_grid,
                extent=extent,
                causal=causal,
                backend="reference",
            )
            gradients = torch.autograd.grad(output, leaves, self.grad[b : b + 1])
            samples.append([output.detach(), *gradients])
        self.expected = [torch.cat(parts) for parts in zip(*samples, strict=True)]


def measure_case(
    case: Case, load: Load, peers: Sequence[Peer], clock: Clock, repeats: int
) -> Iterator[Result]:
    """Results one by one, as they come."""
    inputs = Inputs(case, load)
    for peer in peers:
        try:
            yield _measure(peer, case, load, inputs, clock, repeats)
        except Exception as error:
            # A peer that breaks must not end the run, and the table says how it broke.
            yield Result(peer.name, peer.agrees, peer.note, reason=reason_of(error))
        if load.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    peer: Peer, case: Case, load: Load, inputs: Inputs, clock: Clock, repeats: int
) -> Result:
    call = peer.make(case, load)
    trains = load.device.type in peer.trains_on
    leaves = [
        peer.layout.pack(t, grid).requires_grad_(trains)
        for t, grid in zip(inputs.tensors, inputs.grids, strict=True)
    ]
    agrees = _agreement(peer, case)
    error = _largest_error(peer, call, leaves, inputs, _comparable(agrees, case, load), trains)
    if not error <= _TOLERANCES[load.dtype]:
        raise UnavailableError(f"gives another result: relative error {error:.1e}")

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    def train() -> object:
        output = call(*leaves)
        return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    figures = time_forward(clock, lambda: call(*leaves), repeats)
    peaks = {"peak_forward_bytes": clock.peak_bytes(forward)}
    if trains:
        figures |= time_training(clock, lambda: call(*leaves), leaves, repeats)
        peaks["peak_forward_backward_bytes"] = clock.peak_bytes(train)
    note = peer.note if trains else f"{peer.note}; no backward on this device".lstrip("; ")
    shown = None if agrees == "nowhere" else error
    return Result(peer.name, agrees, note, largest_error=shown, **figures, **peaks)  # type: ignore[arg-type]


def _agreement(peer: Peer, case: Case) -> str:
    """Where the peer's result must be the operator's in this case."""
    if peer.agrees == "unbounded":
        return "everywhere" if case.geometry.sees_everything else "nowhere"
    if peer.agrees == "inside" and case.geometry.causal:
        return "nowhere"
    return peer.agrees


def _comparable(agrees: str, case: Case, load: Load) -> Tensor:
    """Bool (queries,): for which the peer's result must be the operator's."""
    seen = key_table(case.geometry, load.device).valid.sum(1)
    whole_window = math.prod(
        side if width is None else width
        for side, width in zip(case.geometry.context_grid, case.geometry.extent, strict=True)
    )
    return {
        "everywhere": torch.ones_like(seen, dtype=torch.bool),
        "inside": seen == whole_window,
        "nowhere": torch.zeros_like(seen, dtype=torch.bool),
    }[agrees]


def _largest_error(
    peer: Peer,
    call: Call,
    leaves: Sequence[Tensor],
    inputs: Inputs,
    comparable: Tensor,
    trains: bool,
) -> float:
    """Of the output at these queries and, where they are all, of the gradients; 0 where none is."""
    output = peer.layout.unpack(call(*leaves), inputs.grids[0])
    if output.shape != inputs.expected[0].shape:
        raise UnavailableError(f"gives {tuple(output.shape)}, not {tuple(inputs.grad.shape)}")
    if not bool(output.isfinite().all()):
        return math.inf
    pairs = [(output.detach()[:, comparable], inputs.expected[0][:, comparable])]
    if trains and bool(comparable.all()):
        gradients = torch.autograd.grad(output, leaves, inputs.grad)
        found = [peer.layout.unpack(g, at) for g, at in zip(gradients, inputs.grids, strict=True)]
        pairs += list(zip(found, inputs.expected[1:], strict=True))
    errors = [
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in pairs
        if a.numel()
    ]
    return max(errors, default=0.0) if all(map(math.isfinite, errors)) else math.inf


def reason_of(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "needs more memory than the device has"
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return first if isinstance(error, UnavailableError) else f"{type(error).__name__}: {first}"
