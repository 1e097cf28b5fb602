"""The devices that a run can be planned for.

Peaks, memories and link speeds are the makers' published figures. `efficiency` is the share of
the peak that the model's counted FLOPs reach on one device, nothing recomputed and nothing
communicated. It is calibrated on published runs of decoders of this size, whose figures include
their norms, softmax and the little communication they cannot hide: llm-foundry reports 56.9 % MFU
at 760 M and 59.9 % at 1 B on 8 A100, 37.9 % at 760 M on 16 H100 and 41.8 % at 1 B on 8 H100;
Megatron-LM 41–48 % and torchtitan 33–39 % on H100 at larger sizes. So A100 has 0.58 and H100 0.42.
H200 has H100's, and L40S lies between them; no run of this size is published for these two. The
entry `cpu` was measured: two cores with AVX-512 bf16 products, with `benchmarks.real_step`. Its
memory is this machine's; glibc's heaps keep up to a tenth more than is in use, unless
`MALLOC_MMAP_THRESHOLD_` is set.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import Literal

from megatron_nuwa.errors import UserError

GIB = 2**30
# Collectives reach about this share of a link's published speed.
LINK_EFFICIENCY = 0.75


@dataclass(frozen=True)
class Device:
    """One accelerator and its links.

    `half_peak`, `full_peak`: dense FLOP/s in bf16 or fp16, and in fp32. `memory` in bytes,
    `memory_bandwidth` in bytes/s. `node_link` is bytes/s one way between devices of a node,
    `network` bytes/s one way of one device's share of the node's network cards. `framework` is
    what the process holds before the first tensor: CUDA context and NCCL, or the interpreter.
    `slack` is the share of activations and buffers that the allocator loses to fragments.
    """

    name: str
    memory: int
    half_peak: float
    full_peak: float
    efficiency: float
    memory_bandwidth: float
    node_link: float
    network: float
    framework: int
    slack: float = 0.05

    def peak(self, precision: Literal["fp32", "bf16", "fp16"]) -> float:
        """FLOP/s of matrix products in this precision."""
        return self.full_peak if precision == "fp32" else self.half_peak


def _gpu(
    name: str,
    memory: int,
    half_peak: float,
    full_peak: float,
    efficiency: float,
    memory_bandwidth: float,
    node_link: float,
    network: float,
) -> Device:
    """GPU figures in GiB, TFLOP/s and GB/s."""
    return Device(
        name,
        memory * GIB,
        half_peak * 1e12,
        full_peak * 1e12,
        efficiency,
        memory_bandwidth * 1e9,
        node_link * 1e9,
        network * 1e9,
        int(1.5 * GIB),
    )


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


DEVICES = {
    device.name: device
    for device in (
        # NVLink 3 and HDR InfiniBand, one card a GPU, as in a DGX A100.
        _gpu("a100-40gb", 40, 312, 19.5, 0.58, 1555, 300, 25),
        _gpu("a100-80gb", 80, 312, 19.5, 0.58, 2039, 300, 25),
        # NVLink 4 and NDR InfiniBand.
        _gpu("h100-80gb", 80, 989, 67, 0.42, 3350, 450, 50),
        _gpu("h200-141gb", 141, 989, 67, 0.42, 4800, 450, 50),
        # PCIe 4 ×16 and half an HDR card.
        _gpu("l40s", 48, 362, 91.6, 0.50, 864, 32, 12.5),
        Device(
            "cpu",
            memory=_machine_memory(),
            half_peak=0.3e12,
            full_peak=0.1e12,
            efficiency=0.85,
            memory_bandwidth=20e9,
            node_link=2e9,
            network=1e9,
            framework=int(0.4 * GIB),
            slack=0.0,
        ),
    )
}


def device_named(name: str) -> Device:
    """The device of the table; `UserError` lists them for a name that it lacks."""
    device = DEVICES.get(name.lower())
    if device is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
        hint = f"did you mean '{near[0]}'? Known are" if near else "known are"
        raise UserError(f"--device '{name}' is not in the table; {hint} {', '.join(DEVICES)}")
    return device
