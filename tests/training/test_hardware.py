"""The peak speed that MFU is a share of."""

from __future__ import annotations

import pytest
import torch

from megatron_nuwa.training import hardware


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
    ],
)
def test_known_gpus_have_the_peak_that_their_maker_publishes(
    name: str, teraflops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda")) == teraflops * 1e12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_others_are_measured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(hardware, "_measured_peak", lambda device: 1.0)
    assert hardware.peak_flops(torch.device(device)) == 1.0
