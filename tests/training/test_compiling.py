"""Compiled layers are refused, with the reason, where they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_nuwa.errors import UserError
from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training.compiling import check_compile
from megatron_nuwa.training.recipe import TrainingSettings

CPU = torch.device("cpu")


def layout(tensor: int = 1, zero: int = 1, precision: Any = "fp32", pipeline: int = 1) -> Layout:
    return Layout(pipeline, tensor, 1, zero, precision, False, False, "flops")


@pytest.mark.parametrize(
    ("place", "norm", "reason"),
    [
        (layout(tensor=2), "auto", "parallel.tensor 2"),
        (layout(zero=3), "auto", "ZeRO stage 3"),
        (layout(), "apex", "training.norm 'apex'"),
        (layout(precision="bf16"), "auto", "fp32 only, not in bf16"),
    ],
)
def test_a_reason_is_given_where_layers_cannot_be_compiled(
    place: Layout, norm: Any, reason: str
) -> None:
    settings = TrainingSettings(compile=True, norm=norm)
    with pytest.raises(UserError, match=r"^training\.compile: .*; set it to false$") as error:
        check_compile(settings, place, CPU)
    assert reason in str(error.value)
    check_compile(TrainingSettings(norm=norm), place, CPU)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSettings(compile=True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        check_compile(settings, layout(pipeline=2), CPU)
