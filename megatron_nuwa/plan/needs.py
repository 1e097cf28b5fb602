"""How much memory a run will need, for the check before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.plan.candidates import Machine, judge
from megatron_nuwa.plan.devices import device_named
from megatron_nuwa.training.recipe import Recipe


def memory_needed(recipe: Recipe, device_type: str) -> Callable[[Layout, dict[str, Any]], int]:
    """Bytes that a process of the fullest stage needs on its device, as a function of the layout.

    `device_type` is torch's, "cpu" or "cuda".
    """
    # Of GPUs only what the framework takes counts here, which is the same on all of them.
    device = device_named("cpu" if device_type == "cpu" else "a100-80gb")

    def needed(layout: Layout, deepspeed: dict[str, Any]) -> int:
        assert recipe.data is not None
        machine = Machine(device, layout.world_size, layout.world_size)
        recompute, tokens = recipe.training.checkpoint_activations, recipe.data.micro_batch_tokens
        return judge(recipe, layout, deepspeed, machine, recompute, tokens).memory.total

    return needed
