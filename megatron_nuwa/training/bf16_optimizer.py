"""Fewer passes over the gradients in DeepSpeed's bf16 optimizer, with the same numbers.

It walks through the weights one by one. On a GPU that is thousands of tiny kernels a step, and
each micro-batch's gradients are written once more than they have to be.
"""

from __future__ import annotations

from typing import Any


def streamline(optimizer: Any, norm_at_once: bool) -> None:
    """Change how a DeepSpeed optimizer adds gradients up, and with `norm_at_once` measures them.

    Those of other precisions and ZeRO stages are left alone. `norm_at_once` is for processes whose
    weights no other process has or shares, as in a pipeline or a tensor group.
    """
    if not hasattr(optimizer, "fp32_groups_gradients_flat"):
        return
    if norm_at_once:
        # All fp32 gradients lie side by side; what is between them is zero.
        flat = optimizer.fp32_groups_gradients_flat
        optimizer.get_grads_for_norm = lambda for_clipping=False: (
            flat if for_clipping else (flat, {})
        )

    def accumulate(weight: Any, group: int, index: int) -> None:
        if weight.grad is None:
            return
        # DeepSpeed widens a gradient to fp32 first, and so moves 18 bytes a weight instead of 10.
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(weight.grad.reshape(total.shape))
        # Pipelines sum the gradients of tied weights over stages from here.
        weight._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        weight.grad = None

    # Only with bf16.immediate_grad_update it is called, as soon as a gradient is complete.
    optimizer.accumulate_hp_grads_and_remove_lp = accumulate
