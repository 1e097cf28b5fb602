"""apex is taken where it is, told from PyPI's package of the same name, and asked for by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT, SmallWorld, lone_process
from torch import nn

import megatron_nuwa.training.engine as engines
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.fused import AdamKind, fuse_norms, make_adam
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class FusedLayerNorm(nn.LayerNorm):
    """Stands in for apex's."""


class FusedAdam(torch.optim.Optimizer):
    """Stands in for apex's, with its argument, and keeps what that keeps where that keeps it."""

    def __init__(self, parameters: list, adam_w_mode: bool = True, **settings: object) -> None:
        super().__init__(parameters, {"bias_correction": True, **settings})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            assert group["bias_correction"]
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(weight.grad, 1 - first)
                square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                deviation = (square / (1 - second ** group["step"])).sqrt() + group["eps"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] / (1 - first ** group["step"]) * mean / deviation)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("", ".normalization", ".optimizers"):
        monkeypatch.setitem(sys.modules, f"apex{part}", ModuleType(f"apex{part}"))
    sys.modules["apex.normalization"].FusedLayerNorm = FusedLayerNorm
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam


@pytest.fixture
def web_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex: a module without NVIDIA's parts."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.LayerNorm(6)))


def test_norms_become_apex_with_the_same_weights_and_names(apex: None) -> None:
    plain, fused = model(), model()
    assert fuse_norms("apex", fused, torch.device("cpu")) == "apex FusedLayerNorm"
    assert isinstance(fused[1], FusedLayerNorm)
    assert isinstance(fused[2][0], FusedLayerNorm)
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(fused(x), plain(x))


def test_adam_of_apex_is_told_which_weight_decay(apex: None) -> None:
    for decoupled in (False, True):
        adam, name = make_adam("apex", model().parameters(), decoupled=decoupled, **SETTINGS)
        assert name == "apex FusedAdam"
        assert adam.adam_w_mode is decoupled


def test_auto_takes_torch_on_cpus(apex: None) -> None:
    assert fuse_norms("auto", model(), torch.device("cpu")) == "torch LayerNorm"
    adam, name = make_adam("auto", model().parameters(), decoupled=True, **SETTINGS)
    assert name == "torch AdamW (fused)"
    assert type(adam) is torch.optim.AdamW


def test_another_package_called_apex_is_not_taken(web_toolkit: None) -> None:
    assert fuse_norms("auto", model(), torch.device("cuda")) == "torch LayerNorm"
    with pytest.raises(UserError, match=r"training\.norm is 'apex'"):
        fuse_norms("apex", model(), torch.device("cpu"))
    with pytest.raises(UserError, match=r"optimizer\.implementation is 'apex'"):
        make_adam("apex", model().parameters(), decoupled=True, **SETTINGS)


@pytest.mark.parametrize("kind", ["auto", "torch"])
def test_adam_and_adamw_are_torchs(kind: AdamKind) -> None:
    for decoupled, expected in ((False, torch.optim.Adam), (True, torch.optim.AdamW)):
        adam, _ = make_adam(kind, model().parameters(), decoupled=decoupled, **SETTINGS)
        assert type(adam) is expected


class OnGpu(nn.Parameter):
    """Says that it is on a GPU, which is what the choice looks at."""

    is_cuda = True


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Stands in for DeepSpeed's, which is compiled when it is made."""

    def __init__(self, parameters: list, adamw_mode: bool, **settings: Any) -> None:
        super().__init__(parameters, **settings)


@pytest.mark.parametrize(
    ("kind", "on_gpu", "offloaded"),
    [
        ("auto", "apex FusedAdam", "torch Adam (fused)"),
        ("torch", "torch Adam (fused)", "torch Adam (fused)"),
        ("deepspeed", "DeepSpeed FusedAdam", "DeepSpeed DeepSpeedCPUAdam"),
    ],
)
@pytest.mark.usefixtures("apex")
def test_weights_that_deepspeed_offloads_get_an_adam_of_the_host(
    monkeypatch: pytest.MonkeyPatch, kind: AdamKind, on_gpu: str, offloaded: str
) -> None:
    """Although the parameters are on a GPU while the choice is made."""
    for stand_in in (FusedAdam, DeepSpeedCPUAdam):
        monkeypatch.setattr(f"deepspeed.ops.adam.{stand_in.__name__}", stand_in)
    for offload, expected in ((False, on_gpu), (True, offloaded)):
        parameters = [OnGpu(torch.ones(3))]
        _, taken = make_adam(kind, parameters, decoupled=False, offloaded=offload, **SETTINGS)
        assert taken == expected


@pytest.mark.usefixtures("apex")
def test_apex_is_refused_for_a_layout_that_offloads(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"run={tmp_path / 'run'}", "optimizer.implementation=apex", "evaluation=null"]
    recipe = load_recipe(small_world.recipe, [*overrides, "training.stop_at_step=1"])
    with pytest.raises(
        UserError, match=r"^optimizer\.implementation is 'apex', .* 'auto' or 'deep"
    ):
        pretrain(recipe, ROOT / "ds_configs/zero2_offload_bf16.json", lone_process())

    def noted(*arguments: Any, offloaded: bool, **settings: Any) -> Any:
        assert not offloaded
        raise UserError("noted")

    monkeypatch.setattr(engines, "make_adam", noted)
    with pytest.raises(UserError, match="noted"):
        pretrain(recipe, ROOT / "ds_configs/zero2_bf16.json", lone_process())


@pytest.mark.parametrize("layout", ["zero1_bf16", "zero1_fp32", "zero3_bf16"])
@pytest.mark.usefixtures("apex")
def test_a_run_goes_on_with_another_adam(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Where apex was installed in between, or is gone again."""
    # DeepSpeed lists apex's when it is imported.
    known = "deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS"
    monkeypatch.setattr(known, [torch.optim.Adam, FusedAdam])
    losses = {}
    for kinds in (("torch", "torch", "torch"), ("torch", "apex", "torch")):
        run = tmp_path / "-".join(kinds)
        for number, kind in enumerate(kinds, 1):
            overrides = [f"optimizer.implementation={kind}", f"training.stop_at_step={2 * number}"]
            recipe = load_recipe(small_world.recipe, [f"run={run}", "evaluation=null", *overrides])
            pretrain(recipe, ROOT / f"ds_configs/{layout}.json", lone_process())
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses[kinds] = [line["train/loss"] for line in lines]
    of_torch, changed = losses.values()
    assert len(changed) == 6
    assert changed == pytest.approx(of_torch, rel=1e-5 if "fp32" in layout else 2e-3)
