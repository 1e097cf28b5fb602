"""Peak speed of the device, the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time

import torch

# Dense bf16 peaks that the makers publish, FLOP/s. A name holds the first that is found in it.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A10": 125e12,
}
_MATMUL_SIDE = 1024
# Long enough that another program's burst does not pass for a slow machine.
_SECONDS, _REPEATS = 0.5, 16


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one process's device: published for known GPUs, else a measured fp32 product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, peak in _PEAKS.items():
            if model in name:
                return peak
    return _measured_peak(device)


def _measured_peak(device: torch.device) -> float:
    matrix = torch.randn(_MATMUL_SIDE, _MATMUL_SIDE, device=device)
    best = 0.0
    end, repeats = time.perf_counter() + _SECONDS, 0
    while time.perf_counter() < end or repeats < _REPEATS:
        repeats += 1
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = max(best, 2 * _MATMUL_SIDE**3 / (time.perf_counter() - start))
    return best


def allocated_gib(device: torch.device) -> float:
    """Memory in use: the device's peak on a GPU, this process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
